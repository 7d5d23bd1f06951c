"""Dotted settings (`trainer.max_steps=20`) on a built object graph: nemo-run's own parser, with clear errors.

Four of nemo-run's functions are wrapped (patched). `_maybe_resolve_annotation` reads annotations as they stand, and is
given the types that `"int"` (postponed annotations) and `int | None` name. `parse_factory` and `parse_buildable` import
and call what a value names; they do not where `data_only` holds: for the settings of a file, and, in `parse_cli_args`,
for the arguments of a factory that is marked `arguments_are_data`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import inspect
import logging
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Union

import fiddle as fdl
import nemo_run
import torch
from fiddle import daglish
from nemo_run.cli import cli_parser
from nemo_run.cli.cli_parser import CLIException, ParseError, parse_cli_args

from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import FINITE, check_number, nearest, ranges
from nemotron_h.recipe.overrides import HINT, check_data, is_object, names_under, parts
from nemotron_h.schema.recipe import RecipeConfig

_DATA_ONLY = ContextVar("data_only", default=False)


def wrap_parser() -> None:
    """Wrap nemo-run's functions, once."""
    resolve, factory = cli_parser._maybe_resolve_annotation, cli_parser.parse_factory
    buildable, parse = cli_parser.TypeParser.parse_buildable, cli_parser.parse_cli_args
    if getattr(resolve, "nemotron_h", False):
        return

    def resolved(owner: Any, name: str, annotation: Any) -> Any:
        return resolve(owner, name, evaluated(owner, name, annotation))

    def parse_factory(parent: Any, name: str, annotation: Any, value: str) -> Any:
        if _DATA_ONLY.get():
            raise ValueError(f"{value!r} is data")  # nemo-run goes on to read it as that
        return factory(parent, name, annotation, value)

    def parse_buildable(self: Any, value: str, annotation: Any) -> Any:
        if not _DATA_ONLY.get():
            return buildable(self, value, annotation)
        if is_object(value):
            raise ParseError(value, annotation, "it names code")
        return self.get_parser(annotation)(value, annotation)

    def parse_arguments(fn: Any, *args: Any, **kwargs: Any) -> Any:
        if not getattr(fn, "arguments_are_data", False):
            return parse(fn, *args, **kwargs)
        try:
            with data_only():
                return parse(fn, *args, **kwargs)
        except CLIException as error:
            raise UserError(f"--factory {fn.__name__}(...): {reason(error)}", hint=f"it takes: {_names(fn)}") from error

    resolved.nemotron_h = True  # type: ignore[attr-defined]
    cli_parser._maybe_resolve_annotation, cli_parser.parse_factory = resolved, parse_factory
    cli_parser.TypeParser.parse_buildable, cli_parser.parse_cli_args = parse_buildable, parse_arguments
    logging.getLogger("nemo_run.cli.cli_parser").setLevel(logging.CRITICAL)  # says each parse error twice


def _names(fn: Callable) -> str:
    return ", ".join(inspect.signature(fn).parameters) or "nothing"


@contextlib.contextmanager
def data_only() -> Iterator[None]:
    """Have nemo-run read values as numbers, texts and lists of the types that are asked for, and import nothing."""
    wrap_parser()
    token = _DATA_ONLY.set(True)
    cli_parser.parse_value.cache_clear()  # of what was read otherwise
    try:
        yield
    finally:
        _DATA_ONLY.reset(token)


def evaluated(owner: Any, name: str, annotation: Any) -> Any:
    """Resolve an annotation to the type that it names, unions in `typing`'s form."""
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
    """Resolve the type of a dataclass's field by the names of the module that defines it: a signature has fields of
    several modules, and one name that it cannot resolve spoils them all.
    """
    defined = next((c for c in inspect.getmro(owner) if name in inspect.get_annotations(c)), None)
    if defined is None:
        return annotation
    try:
        return eval(annotation, vars(sys.modules[defined.__module__]))
    except (NameError, TypeError):
        return annotation


def apply(task: nemo_run.Partial, settings: Sequence[str], where: str = "", *, trusted: bool = False) -> None:
    """Set values of a built task, in order.

    Args:
        task: changed in place.
        settings: `key=value` with dotted keys, as `nemo` takes them (also `+=`, `-=`, `*=`).
        where: where the settings are written, to name in an error.
        trusted: they were typed by whoever runs the command: a value may be the name of a factory or of a function,
            which is called, as nemo-run does. Values of files are data.
    Errors:
        UserError: not a setting, an unknown key (with the nearest known one), a value of another type, or, unless
            trusted, a value that names code or takes the place of a part of the task.
    """
    wrap_parser()
    place = f"{where}: " if where else ""
    for setting in settings:
        key, _, value = parts(setting)
        if not key:
            raise UserError(f"{place}{setting!r} is not a setting", hint="write key=value: trainer.max_steps=20")
        problem = unknown_key(task, key)
        if problem:
            raise UserError(f"{place}{problem.message}", hint=problem.hint)
        if not trusted:
            check_data(setting, where or "settings")
            if value.lower() not in ("none", "null") and _is_part(_value_of(task, key)):
                raise UserError(f"{place}{setting}: {key} is a part of the task, with keys of its own", hint=HINT)
        try:
            with contextlib.nullcontext() if trusted else data_only():
                parse_cli_args(task, [setting])
        except (CLIException, ValueError, AttributeError, TypeError) as error:
            hint = "`--dryrun` shows every key and value"
            raise UserError(f"{place}{setting}: {reason(error)}", hint=hint) from error
        if not trusted and not _is_data(_value_of(task, key)):
            raise UserError(f"{place}{setting}: it is no number, text or list", hint=HINT)
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
    for value, path in daglish.iterate(task, memoize_internables=False):  # a 0 at each of its keys
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
            hint=f"raise tokens, or lower optim.warmup_tokens{' or optim.decay_tokens' if decay else ''}",
        )


def _value_of(task: nemo_run.Partial, key: str) -> Any:
    """Return what stands at a dotted key, None where nothing does."""
    node: Any = task
    try:
        for name in key.split("."):
            node = cli_parser.parse_attribute(name, node)
    except (CLIException, AttributeError):
        return None
    return node


def _is_part(value: Any) -> bool:
    """Tell whether a value is built of others, or is a list of such."""
    if isinstance(value, list | tuple):
        return any(_is_part(item) for item in value)
    return isinstance(value, fdl.Buildable)


def _is_data(value: Any) -> bool:
    """Tell whether a value, with all that it holds, is nothing that could be called."""
    if isinstance(value, dict):
        return all(_is_data(part) for pair in value.items() for part in pair)
    if isinstance(value, list | tuple | set):
        return all(map(_is_data, value))
    return value is None or isinstance(value, bool | int | float | str | Path | enum.Enum | torch.dtype)


def reason(error: BaseException) -> str:
    """Return what went wrong, on one line, without nemo-run's wrappers: the value and the type that it is not."""
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
    """Merge settings in their order, without those that a later plain assignment of the same key replaces."""
    kept: list[str] = []
    for setting in (*earlier, *later):
        key, operator, _ = parts(setting)
        if operator == "=":
            kept = [other for other in kept if parts(other)[0] != key]
        kept.append(setting)
    return kept


def unknown_key(task: nemo_run.Partial, dotted: str) -> UserError | None:
    """Return an error that names the first part of a dotted key that does not exist, with its nearest neighbour."""
    node: Any = task
    path = dotted.split(".")
    for index, part in enumerate(path):
        part, place = part.split("[")[0], ".".join(path[:index])
        known = _keys(node) if isinstance(node, fdl.Buildable) else set()
        if is_of_a_recipe(task):
            known |= names_under(place)
        if not known:
            return None
        if part not in known:
            return UserError(
                f"unknown key {dotted}: {place or fdl.get_callable(task).__name__} has no {part!r}",
                hint=f"{nearest(part, known)}Known keys there: {', '.join(sorted(known)[:60])}.",
            )
        node = getattr(node, part, None)
    return None


def is_of_a_recipe(task: nemo_run.Partial) -> bool:
    """Tell whether a task was built from a recipe of this project."""
    trainer = getattr(task, "trainer", None)
    return isinstance(trainer, fdl.Buildable) and fdl.get_callable(trainer).__module__.startswith("nemotron_h.")


def _keys(node: fdl.Buildable) -> set[str]:
    """Return the arguments of a configuration node, `**kwargs` resolved to dataclass fields where there are any."""
    target = fdl.get_callable(node)
    names = set(node.__signature_info__.parameters)
    if dataclasses.is_dataclass(target):
        names |= {f.name for f in dataclasses.fields(target)}
    return {name for name in names if name not in ("args", "kwargs", "self")} | set(node.__arguments__)
