"""Dotted settings (`trainer.max_steps=20`) on a built object graph: nemo-run's own parser, with clear errors.

nemo-run reads annotations as they stand: it cannot parse `"int"` (postponed annotations) or `int | None`.
`cli_parser._maybe_resolve_annotation` is wrapped (patched) to give it the types that they name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import re
import sys
import types
from collections.abc import Sequence
from typing import Any, Union

import fiddle as fdl
import nemo_run
from fiddle import daglish
from nemo_run.cli import cli_parser
from nemo_run.cli.cli_parser import CLIException, ParseError, parse_cli_args

from nemotron_h.errors import UserError
from nemotron_h.schema import RecipeConfig
from nemotron_h.strict import FINITE, check_number, nearest, ranges

_SETTING = re.compile(r"^([\w.\[\]]+?)\s*([-+*/|&]?=)")


def parts(setting: str) -> tuple[str, str]:
    """The dotted key of a setting and its operator; two empty texts where it is none."""
    found = _SETTING.match(setting)
    return (found.group(1), found.group(2)) if found else ("", "")


def read_annotations() -> None:
    """Wrap nemo-run's reading of annotations, once."""
    resolve = cli_parser._maybe_resolve_annotation
    if not getattr(resolve, "nemotron_h", False):

        def resolved(owner: Any, name: str, annotation: Any) -> Any:
            return resolve(owner, name, evaluated(owner, name, annotation))

        resolved.nemotron_h = True  # type: ignore[attr-defined]
        cli_parser._maybe_resolve_annotation = resolved
    logging.getLogger("nemo_run.cli.cli_parser").setLevel(logging.CRITICAL)  # says each parse error twice


def evaluated(owner: Any, name: str, annotation: Any) -> Any:
    """An annotation as the type that it names, unions in `typing`'s form."""
    if isinstance(annotation, str) and dataclasses.is_dataclass(owner):
        annotation = _field_type(owner, name, annotation)
    if isinstance(annotation, str):
        target = owner.__init__ if inspect.isclass(owner) else owner
        with contextlib.suppress(NameError, TypeError):
            parameter = inspect.signature(target, eval_str=True).parameters.get(name)
            annotation = parameter.annotation if parameter else annotation
    if isinstance(annotation, types.UnionType):
        annotation = Union[annotation.__args__]  # noqa: UP007 - nemo-run knows typing.Union alone
    return annotation


def _field_type(owner: type, name: str, annotation: str) -> Any:
    """The type of a dataclass's field, by the names of the module that defines it: a signature has fields of several
    modules, and one name that it cannot resolve spoils them all.
    """
    defined = next((c for c in inspect.getmro(owner) if name in inspect.get_annotations(c)), None)
    if defined is None:
        return annotation
    try:
        return eval(annotation, vars(sys.modules[defined.__module__]))
    except (NameError, TypeError):
        return annotation


def apply(task: nemo_run.Partial, settings: Sequence[str], where: str = "") -> None:
    """Set values of a built task, in order.

    Args:
        task: changed in place.
        settings: `key=value` with dotted keys, as `nemo` takes them (also `+=`, `-=`, `*=`).
        where: where the settings are written, to name in an error.
    Errors:
        UserError: not a setting, an unknown key (with the nearest known one), or a value of another type.
    """
    read_annotations()
    place = f"{where}: " if where else ""
    for setting in settings:
        key, operator = parts(setting)
        if not operator:
            raise UserError(f"{place}{setting!r} is not a setting", hint="write key=value: trainer.max_steps=20")
        problem = unknown_key(task, key)
        if problem:
            raise UserError(f"{place}{problem.message}", hint=problem.hint)
        try:
            parse_cli_args(task, [setting])
        except (CLIException, ValueError, AttributeError, TypeError) as error:
            hint = "`--dryrun` shows every key and value"
            raise UserError(f"{place}{setting}: {reason(error)}", hint=hint) from error
    check_numbers(task, place)


def check_numbers(task: nemo_run.Partial, where: str = "") -> None:
    """Refuse a built task with a number that is not finite, or out of the range of the recipe's key of that name.

    Args:
        task: with all settings applied.
        where: what stands before the key in an error.
    Errors:
        UserError: names the key, its value and what would fit.
    """
    known = ranges(RecipeConfig)
    for value, path in daglish.iterate(task):
        if isinstance(value, int | float) and not isinstance(value, bool):
            key = daglish.path_str(path).lstrip(".")
            check_number(key, value, known.get(key, FINITE), where)


def check_steps(task: nemo_run.Partial) -> None:
    """Refuse a run that is not longer than its warm-up and decay, before its model is built.

    Errors:
        UserError: names the lengths and what would fit.
    """
    steps = getattr(getattr(task, "trainer", None), "max_steps", None)
    warmup, decay = (getattr(getattr(task, "optim", None), f"{part}_steps", None) for part in ("warmup", "decay"))
    if isinstance(steps, int) and isinstance(warmup, int) and 0 < steps < warmup + (decay or 1):
        and_decay = f" and its decay {decay:,}" if decay else ""
        raise UserError(
            f"the run has {steps:,} steps (trainer.max_steps), its warm-up {warmup:,}{and_decay} (optim)",
            hint=f"raise trainer.max_steps, or set a shorter optim.warmup_steps{' or decay_steps' if decay else ''}",
        )


def reason(error: BaseException) -> str:
    """What went wrong, on one line, without nemo-run's wrappers: the value and the type that it is not."""
    while (cause := error.__cause__) is not None and isinstance(error, CLIException):
        if isinstance(error, ParseError) and not isinstance(cause, ParseError):
            break
        error = cause
    if isinstance(error, ParseError):
        expected = getattr(error.expected_type, "__name__", "") or str(error.expected_type)
        return f"{error.value!r} cannot be read as {expected}"
    if isinstance(error, RecursionError):  # nested unions
        return "nemo-run cannot read the type of this key, so it has no value on the command line"
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def merged(earlier: Sequence[str], later: Sequence[str]) -> list[str]:
    """Settings in the order of their making, without those that a later plain assignment of the same key replaces."""
    kept: list[str] = []
    for setting in (*earlier, *later):
        key, operator = parts(setting)
        if operator == "=":
            kept = [other for other in kept if parts(other)[0] != key]
        kept.append(setting)
    return kept


def unknown_key(task: nemo_run.Partial, dotted: str) -> UserError | None:
    """The first part of a dotted key that does not exist, with its nearest neighbour."""
    node: Any = task
    path = dotted.split(".")
    for index, part in enumerate(path):
        part = part.split("[")[0]
        if not isinstance(node, fdl.Buildable):
            return None
        known = _keys(node)
        if part not in known:
            place = ".".join(path[:index]) or fdl.get_callable(task).__name__
            return UserError(
                f"unknown key {dotted}: {place} has no {part!r}",
                hint=f"{nearest(part, known)}Known keys there: {', '.join(sorted(known)[:60])}.",
            )
        node = getattr(node, part, None)
    return None


def _keys(node: fdl.Buildable) -> set[str]:
    """Arguments that a configuration node takes, `**kwargs` resolved to dataclass fields where there are any."""
    target = fdl.get_callable(node)
    names = set(node.__signature_info__.parameters)
    if dataclasses.is_dataclass(target):
        names |= {f.name for f in dataclasses.fields(target)}
    return {name for name in names if name not in ("args", "kwargs", "self")} | set(node.__arguments__)
