"""Typed, strict reading: an unknown key or name is an error that suggests the nearest known one, every number is finite
and in the range that its field states, every name can be a folder's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from nemotron_h.core.errors import UserError

T = TypeVar("T")


def nearest(word: str, known: Any) -> str:
    """Return `Did you mean X? ` for the nearest of the known words, or an empty string."""
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


#: ours: letters of names that become a folder's or a file's; 200 of them leave room for what is added to a name
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")
#: ours: the text that interpolations may make of a file
_MAX_INTERPOLATED = 2**22


def is_name(text: str) -> bool:
    """Return True for a text that can name a folder: letters, digits, `_ . -`, no path."""
    return bool(_NAME.fullmatch(text))


def check_name(key: str, value: str, where: str = "") -> None:
    """Refuse a name that is no name (`is_name`): a path would be written somewhere else.

    Errors:
        UserError: names key and value after `where`.
    """
    if not is_name(value):
        shown = repr(value) if len(value) <= 60 else f"{value[:50]!r}... ({len(value):,} characters)"
        raise UserError(
            f"{where}{key}{' = ' if key else ''}{shown} is not a name",
            hint="use letters, digits, _ . - (the first a letter or digit, 200 at most): a folder is named after it",
        )


def check_yaml_place(option: str, path: Path, example: str) -> None:
    """Refuse a file to write that is no YAML file, or in a folder that is not there; `example` is such a name."""
    if path.suffix not in (".yaml", ".yml") or not path.absolute().parent.is_dir():
        raise UserError(
            f"{option} {path} is no YAML file in a folder that is there", hint=f"name one, such as {example}"
        )


def check_folder(key: str, value: str, where: str = "") -> None:
    """Refuse a folder that can be none: no text, control characters, a file in its way.

    Errors:
        UserError: names key and value after `where`.
    """
    if not value.strip() or re.search(r"[\x00-\x1f\x7f]", value) or len(value) > 1000:
        raise UserError(f"{where}{key} = {value[:60]!r} is not a folder", hint="write a path, such as runs")
    path = Path(value).expanduser()
    there = next((parent for parent in (path, *path.parents) if parent.exists()), None)
    if there is not None and not there.is_dir():
        raise UserError(f"{where}{key} = {value!r}: {there} is a file", hint="name a folder, or one that can be made")


@dataclass(frozen=True)
class Range:
    """The values that a number may have.

    Attributes:
        least, most: smallest and largest, themselves included.
        above, below: limits that are not reached.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def problem(self, value: float) -> str:
        """Return what is wrong with a number, or an empty text."""
        if not isinstance(value, int) and not math.isfinite(value):
            return "is not a finite number"
        outside = (
            ("below", self.least, self.least is not None and value < self.least),
            ("above", self.most, self.most is not None and value > self.most),
            ("not above", self.above, self.above is not None and value <= self.above),
            ("not below", self.below, self.below is not None and value >= self.below),
        )
        return next((f"is {word} {_shown(limit)}" for word, limit, wrong in outside if wrong), "")

    def __str__(self) -> str:
        limits = (("at least", self.least), ("above", self.above), ("at most", self.most), ("below", self.below))
        return ", ".join(f"{word} {_shown(limit)}" for word, limit in limits if limit is not None)


def _shown(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


#: of numbers that state no range
FINITE = Range(least=-1.7e308, most=1.7e308)


def within(**limits: float) -> dict[str, Range]:
    """Return a dataclass field's metadata with the range of its numbers, which `typed` checks; limits as of `Range`."""
    return {"range": Range(**limits)}


def number(default: Any = MISSING, **limits: float) -> Any:
    """Return a dataclass field of a number `within` limits; without a default it has to be written."""
    return field(default=default, metadata=within(**limits))


def from_json(schema: type[T], content: Any, key: str = "") -> T:
    """Return a dataclass of what a file of our own making holds: a hundred times as fast as `typed`, which recipes need
    for defaults in layers and interpolations.

    Args:
        schema: a dataclass of numbers, text, dictionaries by name, and other such dataclasses.
        content: the JSON.
        key: stands before the names of fields in errors.
    Errors:
        UserError: names the field that is missing, unknown or of another type.
    """
    if not isinstance(content, dict):
        raise UserError(f"{key or 'the file'} is {_short(content)}, not an object")
    fields = [each for each in dataclasses.fields(schema) if not each.metadata.get("omegaconf_ignore")]
    unknown = sorted(content.keys() - {each.name for each in fields})
    if unknown:
        raise UserError(f"{_dotted(key, unknown[0])} is unknown")
    types, values = _types_of(schema), {}
    for each in fields:
        name = _dotted(key, each.name)
        if each.name in content:
            values[each.name] = _value_of(types[each.name], content[each.name], name)
        elif each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING:
            raise UserError(f"{name} is missing")
    return schema(**values)


def _value_of(kind: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return from_json(kind, value, key)
    if typing.get_origin(kind) is dict and isinstance(value, dict):
        return {name: _value_of(typing.get_args(kind)[1], entry, _dotted(key, name)) for name, entry in value.items()}
    if type(value) is not (typing.get_origin(kind) or kind):
        raise UserError(f"{key} is {_short(value)}, not of type {getattr(kind, '__name__', kind)}")
    return value


_types_of = functools.cache(typing.get_type_hints)


def _dotted(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def typed(schema: type[T] | T, written: DictConfig | dict[str, Any], origin: str) -> T:
    """Merge what was written into the schema's defaults and check every type.

    Args:
        schema: a dataclass, nested as deep as wanted; fields without a default are `MISSING`, those with the metadata
            `omegaconf_ignore` cannot be written. An instance gives the defaults.
        written: the keys that were given, or what `merged` returned for the schema.
        origin: the file or recipe to name in an error.
    Errors:
        UserError: unknown key (with the nearest), wrong type, a number out of its range, or a missing value, naming
            key and origin.
    """
    with _explained(schema, written, origin):
        whole = OmegaConf.get_type(written) is schema  # it has been merged into the defaults already
        value = OmegaConf.to_object(written if whole else merged(schema, (written, origin)))
    for key, entry, kind, allowed in entries(value):
        if kind in (int, float) or isinstance(entry, float):
            check_number(key, entry, allowed, f"{origin}: ")
        elif kind is not Any and isinstance(entry, dict | list):  # OmegaConf takes them in a typed mapping
            raise UserError(f"{origin}: {key}: {str(entry)[:60]} is not a {kind.__name__}")
    return value  # type: ignore[return-value]


def merged(schema: Any, *layers: tuple[DictConfig | dict[str, Any], str]) -> DictConfig:
    """Return a schema's defaults with what was written merged over them; values may be missing.

    Args:
        schema: as `typed` takes it.
        layers: what was written and where, later ones over earlier ones.
    Errors:
        UserError: unknown key or wrong type, naming key and origin.
    """
    content = _defaults(schema) if isinstance(schema, type) else OmegaConf.structured(schema)
    for written, origin in layers:
        with _explained(schema, written, origin):
            layer = written if isinstance(written, DictConfig) else OmegaConf.create(written)
            check_interpolations(layer, origin)
            content = OmegaConf.merge(content, layer)
    return content


@functools.cache
def _defaults(schema: type) -> DictConfig:
    """Return a schema's defaults, which `OmegaConf.merge` copies."""
    return OmegaConf.structured(schema)


@contextlib.contextmanager
def _explained(schema: Any, written: DictConfig | dict[str, Any], origin: str) -> Iterator[None]:
    """Turn OmegaConf's errors into those of `typed`."""
    try:
        yield
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
        key = error.full_key or (culprit(schema, written) if isinstance(written, DictConfig) else "")
        if "not a ListConfig" in str(error):
            raise UserError(f"{origin}: {key or 'value'} is not a list", hint="write it in brackets: [A, B]") from error
        raise UserError(f"{origin}: {key or 'value'}: {_first_line(error)}") from error


def check_number(key: str, value: Any, allowed: Range, where: str = "") -> None:
    """Refuse what is no number, or none of a range.

    Errors:
        UserError: names key and value after `where`, and the range.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where}{key}: {value!r} is not a number")
    if problem := allowed.problem(value):
        hint = f"write a number for {key}" if allowed is FINITE else f"{key} has to be {allowed}"
        raise UserError(f"{where}{key} = {str(value)[:60]} {problem}", hint=hint)


@functools.cache
def ranges(schema: type, prefix: str = "") -> dict[str, Range]:
    """Return the ranges that a dataclass and those in it state, by dotted key."""
    found: dict[str, Range] = {}
    for each in dataclasses.fields(schema):
        annotation = _hints(schema)[each.name]
        parts = [part for part in (annotation, *typing.get_args(annotation)) if dataclasses.is_dataclass(part)]
        if parts:
            found |= ranges(parts[0], f"{prefix}{each.name}.")
        elif "range" in each.metadata:
            found[f"{prefix}{each.name}"] = each.metadata["range"]
    return found


def entries(value: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any, Range]]:
    """Yield dotted key, value, type and range of all that a dataclass instance holds, nested ones too.

    Values that are None are left out. The type is `Any` where the field's is, a plain one such as int otherwise.
    """
    for each in dataclasses.fields(value):
        if not each.metadata.get("omegaconf_ignore"):
            key, allowed = f"{prefix}{each.name}", each.metadata.get("range", FINITE)
            yield from _entries(getattr(value, each.name), key, _hints(type(value))[each.name], allowed)


def _entries(value: Any, key: str, annotation: Any, allowed: Range) -> Iterator[tuple[str, Any, Any, Range]]:
    parts = [part for part in typing.get_args(annotation) if part is not type(None)]
    kind = typing.get_origin(annotation)
    if value is None:
        return
    if kind in (types.UnionType, typing.Union):
        yield from _entries(value, key, parts[0] if len(parts) == 1 else Any, allowed)
    elif dataclasses.is_dataclass(value):
        yield from entries(value, f"{key}.")
    elif isinstance(value, dict) and (kind is dict or annotation is Any):
        for name, entry in value.items():
            yield from _entries(entry, f"{key}.{name}", parts[1] if parts else Any, allowed)
    elif isinstance(value, list) and (kind is list or annotation is Any):
        for index, entry in enumerate(value):
            yield from _entries(entry, f"{key}[{index}]", parts[0] if parts else Any, allowed)
    else:
        yield key, value, annotation, allowed


@functools.cache
def _hints(schema: type) -> dict[str, Any]:
    return typing.get_type_hints(schema)


def culprit(schema: Any, written: DictConfig) -> str:
    """Return the dotted key that alone cannot be merged into a schema; empty where there is none."""

    def fails(path: list[str], value: Any) -> bool:
        for key in reversed(path):
            value = {key: value}
        try:
            OmegaConf.merge(OmegaConf.structured(schema), value)
        except OmegaConfBaseException:
            return True
        return False

    path: list[str] = []
    content = OmegaConf.to_container(written, resolve=False)
    while isinstance(content, dict):
        key = next((key for key, value in content.items() if fails([*path, key], value)), None)
        if key is None:
            break
        path.append(key)
        content = content[key]
    return ".".join(path)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def check_interpolations(written: DictConfig, origin: str) -> None:
    """Refuse interpolations (`${optim.peak_lr}`) that could multiply to more text than a file is allowed to be.

    The bound is that of a chain in which each value names the next as often as it can; `${oc.env:NAME}` names none.

    Errors:
        UserError: names the origin.
    """
    texts = [text for text in _texts(OmegaConf.to_container(written, resolve=False)) if text]
    chain = math.prod(1 + re.sub(r"\$\{oc\.env:[^{}]*\}", "", text).count("${") for text in texts)
    if chain > 1 and chain * max(map(len, texts)) > _MAX_INTERPOLATED:
        raise UserError(f"{origin}: too many interpolations (${{...}})", hint="write the values out")


def _texts(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict | list):
        for entry in content.values() if isinstance(content, dict) else content:
            yield from _texts(entry)


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value that is not a mapping with content, as dotted key and value, in order."""
    for key, value in values.items():
        dotted = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping) and value:
            yield from leaves(value, dotted)
        else:
            yield dotted, value
