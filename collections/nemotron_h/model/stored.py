"""A model's definition from a checkpoint's record or a YAML file, for recipes of models that do not ship. No torch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml

from nemotron_h.errors import UserError
from nemotron_h.model.definition import ATTENTION, FFN, MAMBA, Expect, ModelDefinition
from nemotron_h.schema import ModelSchema
from nemotron_h.training import checkpoints


def is_path(text: str) -> bool:
    """Whether a recipe's `model` names a file or folder, not a shipped definition."""
    return "/" in text or text.endswith((".yaml", ".yml"))


def read_model(path: Path, origin: str) -> dict[str, Any]:
    """The part `model` of a recipe, from a checkpoint, a run's folder (its newest checkpoint) or a YAML file such as
    those of `configs/model`.

    Args:
        origin: the recipe to name in an error.
    Errors:
        UserError: nothing is there, it is not readable, or a run's newest checkpoint is torn.
    """
    if path.is_file() and path.suffix in (".yaml", ".yml"):
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise UserError(f"{origin}: model = {path}: it is not readable YAML: {error}") from error
        if not isinstance(found, dict):
            raise UserError(f"{origin}: model = {path}: it holds no keys", hint="see the files of configs/model")
        return found
    if not path.is_dir():
        raise UserError(f"{origin}: model = {path}: there is no such file or checkpoint")
    if not (path / "weights").is_dir():
        path = checkpoints.newest(path) or path
    try:
        recorded = json.loads((path / checkpoints.RECORD).read_text(encoding="utf-8"))["model"]
        known = {f.name for f in dataclasses.fields(ModelSchema)} - {"expect"}
        values = {key: value for key, value in recorded.items() if key in known}
        counted = ModelDefinition(**values, expect=Expect(0, 0, 0, 0))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{origin}: model = {path}: it is no checkpoint with a readable {checkpoints.RECORD} ({error!r})",
            hint="name a run's folder or one of its checkpoints",
        ) from error
    expect = Expect(*(counted.count(symbol) for symbol in (MAMBA, ATTENTION, FFN)), counted.parameters)
    return {**values, "expect": dataclasses.asdict(expect)}
