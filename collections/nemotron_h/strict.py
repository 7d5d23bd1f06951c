"""Typed, strict reading of YAML: an unknown key or name is an error that suggests the nearest known one."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from nemotron_h.errors import UserError

T = TypeVar("T")


def nearest(word: str, known: Any) -> str:
    """`Did you mean X? ` for the nearest of the known words, or an empty string."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"Did you mean {found[0]}? " if found else ""


def check_one_of(key: str, value: str, allowed: Iterable[str], where: str = "") -> None:
    """Refuse a value that is not among the allowed, naming the nearest.

    Errors:
        UserError: names key and value after `where`.
    """
    allowed = list(allowed)
    if value not in allowed:
        raise UserError(f"{where}{key} = {value!r}", hint=f"{nearest(value, allowed)}Known: {', '.join(allowed)}.")


def typed(schema: type[T], written: DictConfig | dict[str, Any], origin: str) -> T:
    """Merge what was written into the schema's defaults and check every type.

    Args:
        schema: a dataclass, nested as deep as wanted; fields without a default are `MISSING`, those with the metadata
            `omegaconf_ignore` cannot be written.
        written: the keys that were given.
        origin: the file or recipe to name in an error.
    Errors:
        UserError: unknown key (with the nearest), wrong type, or a missing value, naming key and origin.
    """
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), written))  # type: ignore[return-value]
    except ConfigKeyError as error:
        fields = dataclasses.fields(error.object_type) if dataclasses.is_dataclass(error.object_type) else ()
        known = [f.name for f in fields if not f.metadata.get("omegaconf_ignore")]
        raise UserError(
            f"{origin}: unknown key {error.full_key}",
            hint=f"{nearest(str(error.key), known)}Known keys there: {', '.join(known)}." if known else "",
        ) from error
    except MissingMandatoryValue as error:
        raise UserError(f"{origin}: {error.full_key} is missing", hint="write a value for it in the recipe") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{origin}: {error.full_key or 'value'}: {str(error).splitlines()[0]}") from error
