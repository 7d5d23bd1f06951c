"""A model's definition from a checkpoint's record or a YAML file, for recipes of models that do not ship. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nemotron_h.architecture.definition import Expect, ModelDefinition
from nemotron_h.checkpoint import folders
from nemotron_h.core.errors import UserError
from nemotron_h.core.files import read_json_object
from nemotron_h.core.strict import typed
from nemotron_h.core.strict_yaml import read_yaml
from nemotron_h.schema.recipe import ModelSchema


def is_path(text: str) -> bool:
    """Tell whether a recipe's `model` names a file or folder, not a shipped definition."""
    return "/" in text or text.endswith((".yaml", ".yml"))


def check_repairable(tied: bool, key: str) -> None:
    """Refuse to give rows of an embedding new numbers where they are the output matrix's too.

    Args:
        tied: the model's `tied_embeddings`.
        key: that asks for it, with the recipe that has it.
    Errors:
        UserError: names the key.
    """
    if tied:
        raise UserError(
            f"{key}: the embedding is the output matrix too (model.tied_embeddings): other rows give other scores",
            hint="leave it out",
        )


def read_model(path: Path, origin: str) -> dict[str, Any]:
    """Read the part `model` of a recipe from a checkpoint, a run's folder (its newest checkpoint) or a YAML file such
    as those of `configs/model`.

    Args:
        origin: the recipe to name in an error.
    Errors:
        UserError: nothing is there, it is not readable, or a run's newest checkpoint is torn.
    """
    if path.is_file() and path.suffix in (".yaml", ".yml"):
        found = read_yaml(path, f"{origin}: model = {path}")
        if not isinstance(found, dict):
            raise UserError(f"{origin}: model = {path}: it holds no keys", hint="see the files of configs/model")
        if isinstance(overrides := found.get("overrides"), dict):
            found["overrides"] = {str(layer): widths for layer, widths in overrides.items()}  # as Hydra reads keys
        return found
    if not path.is_dir():
        raise UserError(f"{origin}: model = {path}: there is no such file or checkpoint")
    if not (path / "weights").is_dir():
        path = folders.newest(path) or path
    try:
        recorded = read_json_object(path / folders.RECORD).get("model")
        known = {f.name for f in dataclasses.fields(ModelSchema)} - {"expect"}
        values = {key: value for key, value in dict(recorded).items() if key in known}
        none = dataclasses.asdict(Expect())
        model = typed(ModelSchema, {**values, "expect": none}, f"{path / folders.RECORD}: model")
    except (UserError, TypeError, ValueError) as error:
        reason = error.message if isinstance(error, UserError) else "it has no `model`"
        raise UserError(
            f"{origin}: model = {path}: it is no checkpoint with a readable {folders.RECORD}: {reason}",
            hint="name a run's folder or one of its checkpoints",
        ) from error
    counts = ModelDefinition(**{**dataclasses.asdict(model), "expect": Expect()}).counts()
    return {**values, "expect": dataclasses.asdict(counts)}


def read_definition(record: Mapping[str, Any], origin: str) -> ModelDefinition:
    """Return the model that a run record describes.

    Errors:
        UserError: a value is missing, unknown or impossible.
    """
    try:
        values = dict(record["model"])
        definition = ModelDefinition(**{**values, "expect": Expect(**values["expect"])})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{origin}: its record of the model is not readable: {error}") from error
    definition.validate_structure(origin)
    return definition


def definition_text(definition: ModelDefinition, comment: str) -> str:
    """Return the text of a file for `configs/model/`, without the schema's defaults."""
    values = _but(dataclasses.asdict(definition), dataclasses.asdict(ModelSchema()))
    return f"# {comment}\n" + yaml.safe_dump(values, sort_keys=False, width=120)


def _but(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _but(value, defaults[key]) if isinstance(value, dict) and isinstance(defaults.get(key), dict) else value
        for key, value in values.items()
        if key not in defaults or value != defaults[key]
    }
