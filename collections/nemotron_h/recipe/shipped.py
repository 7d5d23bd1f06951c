"""Read shipped recipes a hundred times as fast as `compose`: no overrides, no checks, no origins.

What ships composes and passes its checks: tests hold it to that, and to being what is read here.
"""

from __future__ import annotations

import functools
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from nemotron_h.core.strict_yaml import parse_yaml, read_bounded
from nemotron_h.recipe.compose import configs_dir, recipes_dir
from nemotron_h.schema.recipe import RecipeConfig

_PACKAGE = re.compile(r"^# @package (\S+)", re.MULTILINE)
_NUMBERS = {int: int, float: float, str: str}


def read_shipped(name: str) -> RecipeConfig:
    """Return a shipped recipe (`<model>/<stage>`); its `sources` are those of all its files, the last one's winning."""
    merged: dict[str, Any] = {}
    for layer in _layers(name):
        merged = _over(merged, layer)
    return _typed(RecipeConfig, merged)


def _layers(name: str) -> Iterator[Mapping[str, Any]]:
    """Yield the contents of a recipe's files in the order of their merge."""
    content, _ = _file(recipes_dir() / f"{name}.yaml")
    entries = content.get("defaults", [])
    for entry in entries if "_self_" in entries else [*entries, "_self_"]:
        if entry == "_self_":
            yield {key: value for key, value in content.items() if key != "defaults"}
        elif isinstance(entry, str):
            yield from _layers(entry.removeprefix("/") if "/" in entry else f"{name.split('/')[0]}/{entry}")
        else:
            ((group, part),) = entry.items()
            group = group.removeprefix("/")
            values, package = _file(configs_dir() / group / f"{part}.yaml")
            yield values if package == "_global_" else {package or group: values}


@functools.cache
def _file(path: Path) -> tuple[Mapping[str, Any], str]:
    """Return a file's content, and the package of its first lines."""
    text = read_bounded(path)
    package = _PACKAGE.search(text)
    return parse_yaml(text, str(path)) or {}, package[1] if package else ""


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        before = merged.get(key)
        merged[key] = _over(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return merged


def _typed(kind: Any, value: Any) -> Any:
    """Return a value of a file as the type of its key."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        if value is None:
            return None
        kind = next(part for part in typing.get_args(kind) if part is not types.NoneType)
    if is_dataclass(kind):
        return kind(**{key: _typed(_types(kind)[key], entry) for key, entry in value.items()})
    if typing.get_origin(kind) is dict:
        return {key: _typed(typing.get_args(kind)[1], entry) for key, entry in value.items()}
    if typing.get_origin(kind) is list:
        return [_typed(typing.get_args(kind)[0], entry) for entry in value]
    return _NUMBERS[kind](value) if kind in _NUMBERS else value


@functools.cache
def _types(schema: type) -> dict[str, Any]:
    hints = typing.get_type_hints(schema)
    return {each.name: hints[each.name] for each in fields(schema)}
