"""Make `nemo ...` report mistakes in one screen, and tell a run's record what its command line changed.

nemo-run prints an unknown key as the whole configuration, an unknown factory without the known ones, and the resolved
configuration as tables of several hundred lines before each run. `cli_execute`, `parse_fn` and `execute_lazy` of
`RunContext` are wrapped (patched) for the tasks of this project; what is typed for others behaves as before.

What is typed is its user's own, and may name code: `data=package.make()`. What a file says (`--yaml FILE`, `key=@FILE`)
is data, for every factory: it may be somebody else's.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import nemo_run
from catalogue import REGISTRY
from nemo_run.cli import cli_parser
from nemo_run.cli.api import RunContext
from nemo_run.cli.cli_parser import CLIException
from nemo_run.cli.lazy import LazyEntrypoint, _args_to_dictconfig, dictconfig_to_dot_list
from nemo_run.config import get_type_namespace

from nemotron_h.core.errors import UserError, report, user_error
from nemotron_h.core.strict import nearest
from nemotron_h.recipe.compose import factory_of, known_recipes
from nemotron_h.training import settings

#: `key=@FILE.yaml`, as nemo-run takes it
_FILE = re.compile(r"=@[\w./\\-]+\.(ya?ml|json|toml)(:\w+)?$", re.IGNORECASE)


def install(note: Callable[[nemo_run.Partial, list[str]], None]) -> None:
    """Wrap the methods of `RunContext`, once.

    Args:
        note: told each task that a command line made, and the settings that it changed in it.
    """
    settings.wrap_parser()
    if getattr(RunContext.cli_execute, "nemotron_h", False):
        return
    execute, parse, lazily = RunContext.cli_execute, RunContext.parse_fn, RunContext.execute_lazy

    @functools.wraps(execute)
    def cli_execute(self: RunContext, fn: Any, args: list[str], entrypoint_type: str = "task") -> None:
        shown = nemo_run.dryrun_fn
        if not self.dryrun and str(self.factory or "").split("(")[0] in own_factories():
            nemo_run.dryrun_fn = lambda *a, **k: None  # the tables; --dryrun shows them
        try:
            execute(self, fn, args, entrypoint_type)
        except (UserError, OSError) as error:
            mistake = user_error(error)
            if mistake is None:
                raise
            fail(mistake)
        except (CLIException, ValueError, AttributeError, TypeError) as error:
            explained = explain(error, fn, args, self.factory)
            if explained is None:
                raise
            fail(explained)
        finally:
            nemo_run.dryrun_fn = shown

    @functools.wraps(parse)
    def parse_fn(self: RunContext, fn: Any, args: list[str], **defaults: Any) -> nemo_run.Partial:
        typed = [argument for argument in args if not _FILE.search(argument)]
        factory, written = of_files(self, fn, [argument for argument in args if argument not in typed])
        if factory == self.factory and not written:
            task = parse(self, fn, typed, **defaults)
        else:
            built = cli_parser.parse_factory(fn, "", fn, factory)
            settings.apply(built, written, str(self.yaml or "a file"))
            before = self.factory, self.yaml
            self.factory, self.yaml = (lambda: built), None
            try:
                task = parse(self, fn, typed, **defaults)
            finally:
                self.factory, self.yaml = before
        settings.check_numbers(task)
        settings.check_steps(task)
        note(task, [*written, *given(fn, typed)])
        return task

    @functools.wraps(lazily)
    def execute_lazy(self: RunContext, entrypoint: Any, args: list[str], name: str) -> None:
        if self.yaml or any(_FILE.search(text) for text in (*args, f"={self.factory}")):
            fail(UserError("--lazy: the task would build what its files name", hint="leave out --lazy, or the files"))
        lazily(self, entrypoint, args, name)

    cli_execute.nemotron_h = True  # type: ignore[attr-defined]
    RunContext.cli_execute, RunContext.parse_fn, RunContext.execute_lazy = cli_execute, parse_fn, execute_lazy


def of_files(context: RunContext, fn: Any, references: list[str]) -> tuple[str | None, list[str]]:
    """Return the factory of a command line and the settings of its files: of `--yaml`, and of `key=@FILE`.

    Args:
        references: the `key=@FILE`.
    Errors:
        UserError: a file names a factory of others, or there is none.
    """
    entry = LazyEntrypoint(fn, factory=context.factory, yaml=context.yaml, overwrites=references)
    written = [f"{key}{operator}{value}" for key, operator, value in entry._args_ if key not in ("_factory_", "run")]
    factory, file = entry._factory_, context.yaml or (references or [context.factory])[0]
    if factory != context.factory and str(factory).split("(")[0] not in own_factories():
        raise UserError(
            f"{file}: _factory_: {factory} is code, and the values of a file are data", hint="--factory NAME"
        )
    if written and factory is None:
        raise UserError(f"{file}: no --factory makes the task that it changes", hint="add --factory NAME")
    return factory, written


def given(fn: Any, args: list[str]) -> list[str]:
    """Return the settings of a command line, in the form and order in which nemo-run applies them.

    nemo-run regroups settings by key before it applies them (`LazyEntrypoint.resolve`); only its own helpers, one of
    them private, give that order.
    """
    entry = LazyEntrypoint(fn, overwrites=args)
    dotted = dictconfig_to_dot_list(_args_to_dictconfig(entry._args_), has_factory=True)
    return [f"{key}{operator}{value}" for key, operator, value in dotted]


def fail(error: UserError) -> None:
    """Report the error and leave with its exit code."""
    report(error)
    raise SystemExit(error.EXIT_CODE)


@functools.cache
def own_factories() -> set[str]:
    """Names of this project's factories: of its recipes, and the one for recipe files."""
    return {factory_of(name) for name in known_recipes()} | {"nemotron_h_recipe"}


def known_factories(fn: Any) -> list[str]:
    """Names registered for an entry point such as `llm.pretrain`."""
    namespace = get_type_namespace(fn)
    return sorted({key[-1] for key in REGISTRY if namespace in (key[0], ".".join(key[:-1]))})


def explain(error: Exception, fn: Any, args: list[str], factory: str | None) -> UserError | None:
    """What the user got wrong, or None where it is not a mistake that this can name."""
    if "No matching factory found" in str(error):
        known = known_factories(fn)
        ours = [name for name in known if name in own_factories()]
        name = str(factory).split("(")[0]
        return UserError(
            f"there is no factory {name!r} for {fn.__name__}",
            hint=f"{nearest(name, known)}This project's: {', '.join(ours)}; NeMo has {len(known) - len(ours)} more.",
        )
    if not factory:
        return None
    task = cli_parser.parse_factory(fn, "factory", nemo_run.Partial[fn], factory)
    try:
        settings.apply(task, [argument for argument in args if settings.parts(argument)[0]], trusted=True)
    except UserError as problem:
        return problem
    if isinstance(error, CLIException):
        return UserError(settings.reason(error), hint="`--dryrun` shows every key and value")
    return None
