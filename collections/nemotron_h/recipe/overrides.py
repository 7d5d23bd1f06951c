"""Settings `key=value` beyond a recipe's file: of its own keys, and of the graph that NeMo runs. Imports no torch.

A value's name is its key in the recipe. Where NeMo's graph has another name for the same value (`trainer.devices`,
`parallel.devices`), that one is read as the recipe's; what a recipe does not name (`trainer.max_steps`) goes to the
built task.

nemo-run takes a value as the name of a function and calls it (`data=package.make()`). On a command line that is its
user's own doing; a file may be somebody else's: the values of its `overrides` are data.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import itertools
import json
import math
import re
import typing
from collections.abc import Iterable, Sequence

from nemotron_h.core.errors import UserError
from nemotron_h.core.strict_yaml import parse_yaml
from nemotron_h.core.units import parse_count
from nemotron_h.recipe.former_keys import DROPPED, FORMER, trackers_of
from nemotron_h.schema.nemo_names import DERIVED, SAME
from nemotron_h.schema.recipe import RecipeConfig

_SETTING = re.compile(r"([\w.\[\]]+?)\s*([-+*/|&]?=)\s*(.+)", re.DOTALL)
#: a call of a name, and how nemo-run writes an object to build, also inside of a list
_CALL = re.compile(r"[A-Za-z_][\w.]*\(")
_OBJECT = re.compile(r"<?(?:Config|Partial)(?:[^\w/.].*|$)", re.DOTALL)
HINT = "write a number, text, list or null; what has to be built is for the command line, which is its user's own"
_ARITHMETIC = {
    "+=": lambda a, b: a + b,
    "-=": lambda a, b: a - b,
    "*=": lambda a, b: a * b,
    "/=": lambda a, b: a / b,
}


def parts(setting: str) -> tuple[str, str, str]:
    """Return the dotted key of a setting, its operator and its value; empty texts where it is none."""
    match = _SETTING.fullmatch(setting)
    return match.groups() if match else ("", "", "")


@functools.cache
def recipe_keys(schema: type = RecipeConfig, prefix: str = "") -> frozenset[str]:
    """Return the dotted keys of a recipe's values; that of a mapping with free keys ends with a dot (`sources.`)."""
    hints, keys = typing.get_type_hints(schema), set()
    for each in dataclasses.fields(schema):
        kinds = (hints[each.name], *typing.get_args(hints[each.name]))
        inner = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
        if inner is not None:
            keys |= recipe_keys(inner, f"{prefix}{each.name}.")
        elif dict in map(typing.get_origin, kinds):
            keys.add(f"{prefix}{each.name}.")
        else:
            keys.add(f"{prefix}{each.name}")
    return frozenset(keys - {"overrides"})


def is_of_recipe(key: str) -> bool:
    """Tell whether a dotted key is of a recipe's value, or of one that recipes once had."""
    free = tuple(known for known in recipe_keys() if known.endswith("."))
    return key in recipe_keys() or key in DROPPED or key.startswith(free)


def names_under(part: str) -> set[str]:
    """Return the names that a recipe has in a part of it, at the top for an empty text."""
    prefix = f"{part}." if part else ""
    return {key.removeprefix(prefix).split(".")[0] for key in recipe_keys() if key.startswith(prefix)}


def flattened(setting: str) -> list[str]:
    """Return `part={key: value}` of a recipe's part as a setting for each value, and any other setting alone.

    Errors:
        UserError: the mapping is not valid YAML.
    """
    part, operator, value = parts(setting)
    if operator != "=" or not value.startswith("{") or is_of_recipe(part) or not names_under(part) - {""}:
        return [setting]
    content = parse_yaml(value, setting)
    return [
        each
        for name, entry in content.items()
        for each in flattened(f"{part}.{name}={json.dumps(entry, ensure_ascii=False)}")
    ]


def split(settings: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the settings that set a recipe's values, by its keys, and the others as they are.

    Args:
        settings: `key=value` by either name, as `nemo` takes them: `None` is YAML's `null`.
    Errors:
        UserError: a value is set by two names, to different values; names both. A key of NeMo's trackers.
    """
    values, others, names = [], [], {}
    for setting in itertools.chain.from_iterable(map(flattened, settings)):
        written, operator, value = parts(setting)
        key = SAME.get(written, written)
        if former := key == "log.tensorboard" and operator == "=":  # NeMo's key too, `null` for none
            key = FORMER[key]
        if key.startswith(("log.wandb.", "log.tensorboard.")):
            raise UserError(
                f"{setting}: trackers are made of log.trackers and log.project",
                hint="what else a tracker takes are its own variables: WANDB_ENTITY, WANDB_RUN_GROUP, WANDB_TAGS",
            )
        if not is_of_recipe(key):
            others.append(setting)
            continue
        before, text = names.setdefault(key, (written, value))
        if before != written and text != value:
            raise UserError(f"{before}={text} and {setting} set one value", hint=f"keep one of them: {key}={value}")
        names[key] = written, value
        value = f"[{', '.join(trackers_of(value))}]" if former else "null" if value == "None" else value
        values.append(f"{key}{operator}{value}")
    for setting in others:
        derived = next((key for key in DERIVED.get(parts(setting)[0], ()) if key in names), None)
        if derived is not None and parts(setting)[0] != "trainer.max_steps":  # ends a run of so many tokens earlier
            raise UserError(f"{setting} and {names[derived][0]}={names[derived][1]} set one value", hint="keep one")
    return values, others


def superseded(settings: Sequence[str], keys: Iterable[str]) -> list[str]:
    """Return the settings of a built task that are left when these keys of its recipe are given anew."""
    given = tuple(keys)

    def is_given(source: str) -> bool:
        return any(source == key or source.startswith(f"{key}.") for key in given)

    return [setting for setting in settings if not any(map(is_given, DERIVED.get(parts(setting)[0], ())))]


def assigned(settings: Sequence[str], recipe: RecipeConfig) -> list[str]:
    """Return settings of a recipe's keys with `+=`, `-=`, `*=` and `/=` carried out on the recipe's numbers.

    Errors:
        UserError: another operator, or a value that is no number.
    """
    values: dict[str, str] = {}
    assignments = []
    for setting in settings:
        key, operator, value = parts(setting)
        if is_of_recipe(key):
            if operator != "=":
                current = functools.reduce(lambda part, name: getattr(part, name, None), key.split("."), recipe)
                value = _number(setting, operator, values.get(key, str(current)), value)
            values[key] = value
            setting = f"{key}={value}"
        assignments.append(setting)
    return assignments


def _number(setting: str, operator: str, before: str, value: str) -> str:
    if operator not in _ARITHMETIC:
        raise UserError(f"{setting}: {operator} is for lists of NeMo's", hint="write key=value")
    try:
        number = _ARITHMETIC[operator](*map(_read_number, (before, value)))
        return str(number) if math.isfinite(number) else f".{number}".replace(".-", "-.")  # YAML's .inf
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise UserError(f"{setting}: {before} {operator[0]} {value} is no number", hint="write key=value") from error


def _read_number(text: str) -> float:
    number = parse_yaml(text, text)
    if isinstance(number, str):
        try:
            number = parse_count(number)
        except ValueError:
            number = float(number)
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise ValueError(text)
    return number


def check_data(setting: str, where: str) -> None:
    """Refuse a setting whose value names something to build or to call.

    Args:
        setting: `key=value`.
        where: it is written, to name in the error.
    Errors:
        UserError: it does, or is no setting.
    """
    key, _, value = parts(setting)
    if not key:
        raise UserError(f"{where}: {setting!r} is not a setting", hint="write key=value: trainer.max_steps=20")
    if code := _code_in(value):
        raise UserError(f"{where}: {setting}: {code} is code, and the values of a file are data", hint=HINT)


def check_overrides(settings: Sequence[str], where: str) -> None:
    """Refuse what `check_data` refuses, of a recipe.

    Args:
        settings: its `overrides`.
        where: names the recipe.
    Errors:
        UserError: see `check_data`.
    """
    for setting in settings:
        check_data(setting, f"{where}: overrides")


def is_object(text: str) -> bool:
    """Tell whether a text is nemo-run's spelling of an object to build: `Config[package.Name]`, `<Partial[...]>`."""
    return _OBJECT.fullmatch(text.strip()) is not None


def _code_in(value: str) -> str:
    """Return what a value would build or call; an empty text where it is data."""
    try:
        texts = _texts(ast.literal_eval(value))
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        texts = [value]
        if call := _CALL.search(value):
            return call.group() + "...)"
    return next(filter(is_object, texts), "")


def _texts(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for pair in value.items() for part in pair for text in _texts(part)]
    return [text for part in value for text in _texts(part)] if isinstance(value, list | tuple | set) else []
