"""Hugging Face's types of models that are read and written, each in a file of its own. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.core.errors import UserError
from nemotron_h.export import config as nemotron_h
from nemotron_h.export import dense_config as dense
from nemotron_h.export import falcon_config as falcon_h1
from nemotron_h.export import vision_config

#: `model_type` of config.json -> to_config, from_config, check_expressible
TYPES: dict[str, ModuleType] = {
    **{each.MODEL_TYPE: each for each in (nemotron_h, falcon_h1)},
    **dict.fromkeys(dense.TYPES, dense),
}
#: family of a definition -> its types, where it has some of its own
_OF_FAMILIES = {falcon_h1.FAMILY: falcon_h1, dense.FAMILY: dense}


def _of(definition: ModelDefinition) -> ModuleType:
    """Return the type of a model's family."""
    return _OF_FAMILIES.get(definition.family, nemotron_h)


def check_expressible(definition: ModelDefinition) -> None:
    """Refuse a model that its type cannot express.

    Errors:
        UserError: names what the type lacks.
    """
    _of(definition).check_expressible(definition)


def to_config(definition: ModelDefinition, **facts: Any) -> dict[str, Any]:
    """Return the content of `config.json`; arguments as of `config.to_config`."""
    return _of(definition).to_config(definition, **facts)


def from_config(config: Mapping[str, Any], name: str, origin: str) -> ModelDefinition:
    """Return the definition that a `config.json` describes; arguments as of `config.from_config`.

    Errors:
        UserError: of no type that is read, or as the type's.
    """
    found = config.get("model_type")
    if found in vision_config.TYPES:
        raise UserError(
            f"{origin}: it is an image encoder ({found}), which is no model alone",
            hint="put it in front of a language model: nemotron-h import vision CHECKPOINT DIR OUT",
        )
    if found not in TYPES:
        *others, last = TYPES
        raise UserError(
            f"{origin}: model_type is {found}; only {', '.join(others)} and {last} can be imported",
            hint="give the folder of such a model, as `nemotron-h export hf` or transformers writes it",
        )
    return TYPES[found].from_config(config, name, origin)
