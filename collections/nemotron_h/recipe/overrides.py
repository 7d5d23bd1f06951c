"""The `overrides` of a recipe: settings `key=value` of the built task, whose values are data. Imports no torch.

nemo-run takes a value as the name of a function and calls it (`data=package.make()`). On a command line that is its
user's own doing; a file may be somebody else's.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence

from nemotron_h.core.errors import UserError

_SETTING = re.compile(r"([\w.\[\]]+?)\s*([-+*/|&]?=)\s*(.+)", re.DOTALL)
#: a call of a name, and how nemo-run writes an object to build, also inside of a list
_CALL = re.compile(r"[A-Za-z_][\w.]*\(")
_OBJECT = re.compile(r"<?(?:Config|Partial)(?:[^\w/.].*|$)", re.DOTALL)
HINT = "write a number, text, list or null; what has to be built is for the command line, which is its user's own"


def parts(setting: str) -> tuple[str, str, str]:
    """Return the dotted key of a setting, its operator and its value; empty texts where it is none."""
    match = _SETTING.fullmatch(setting)
    return match.groups() if match else ("", "", "")


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
