"""Make `nemo llm <stage> --factory NAME` of nemo-run take recipe keys and cluster files, and report mistakes briefly.

`key=value` sets a value by its key in the recipe, and is checked as the recipe's own; what a recipe does not name is
set in the built task by NeMo's name, and noted in the run's record. `executor=NAME executor.key=value` names a cluster
file: nemo-run takes executors as Python factories (`run.executor=`), which know nothing of the task's nodes and cannot
be given a file, its `--dryrun` shows no script, and its submission loses how a run ended (`launch.submit`).

nemo-run prints an unknown key as the whole configuration, an unknown factory without the known ones, and the resolved
configuration as tables of several hundred lines before each run. `cli_execute`, `parse_fn` and `execute_lazy` of
`RunContext` are wrapped (patched) for the tasks of this project; what is typed for others behaves as before.

What is typed is its user's own, and may name code: `data=package.make()`. What a file says (`--yaml FILE`, `key=@FILE`)
is data, for every factory: it may be somebody else's.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run
from catalogue import REGISTRY
from nemo_run.cli import cli_parser
from nemo_run.cli.api import RunContext
from nemo_run.cli.cli_parser import CLIException
from nemo_run.cli.lazy import LazyEntrypoint, _args_to_dictconfig, dictconfig_to_dot_list
from nemo_run.config import get_type_namespace

from nemotron_h.core.errors import UserError, report, user_error
from nemotron_h.core.strict import nearest
from nemotron_h.launch.command import FILE, of_recipe
from nemotron_h.launch.executors import executor
from nemotron_h.launch.load import load
from nemotron_h.launch.place import take
from nemotron_h.launch.show import dry_run
from nemotron_h.launch.submit import submit
from nemotron_h.recipe.compose import factory_of, known_recipes
from nemotron_h.training import settings
from nemotron_h.training.callbacks.run_record import note
from nemotron_h.training.preflight import check_split

_VALUES: ContextVar[tuple[str, ...]] = ContextVar("recipe_values", default=())
HELP = """

With a recipe of this project (--factory NAME), key=value sets any value by its key in the recipe: tokens=163_840
parallel.tensor=2 optim.peak_lr=1e-3 log.dir=runs. `nemotron-h recipe show NAME` lists the keys. What a recipe does not
name is set by NeMo's: trainer.max_steps=20. executor=slurm, executor=kubernetes or executor=FILE.yaml says where it
runs."""


def recipe_values() -> tuple[str, ...]:
    """Return the settings of the recipe's keys on the command line whose factory is being called."""
    return _VALUES.get()


def install() -> None:
    """Wrap the methods of `RunContext`, once."""
    settings.wrap_parser()
    if getattr(RunContext.cli_execute, "nemotron_h", False):
        return
    execute, parse, lazily = RunContext.cli_execute, RunContext.parse_fn, RunContext.execute_lazy

    @functools.wraps(execute)
    def cli_execute(self: RunContext, fn: Any, args: list[str], entrypoint_type: str = "task") -> None:
        shown, started = nemo_run.dryrun_fn, nemo_run.run
        try:
            name, keys, args = take(args)
            self.cluster = None if name is None else load(name, keys)
            if self.cluster is not None:
                nemo_run.dryrun_fn = lambda task, executor: print(dry_run(task, executor, self.name))
                nemo_run.run = lambda fn_or_script, executor, name, detach, **_: submit(
                    fn_or_script, executor, name, detach
                )
            if not self.dryrun and is_own(self.factory):
                nemo_run.dryrun_fn = lambda *a, **k: None  # the tables; --dryrun shows them
            execute(self, fn, args, entrypoint_type)
        except Exception as error:
            mistake = user_error(error)
            if mistake is None and isinstance(error, CLIException | ValueError | AttributeError | TypeError):
                mistake = explain(error, fn, args, self.factory)
            if mistake is None:
                raise
            fail(mistake)
        finally:
            nemo_run.dryrun_fn, nemo_run.run = shown, started

    @functools.wraps(parse)
    def parse_fn(self: RunContext, fn: Any, args: list[str], **defaults: Any) -> nemo_run.Partial:
        typed = [argument for argument in args if not FILE.search(argument)]
        factory, written = of_files(self, fn, [argument for argument in args if argument not in typed])
        if factory == self.factory and not written and not is_own(factory):
            task = parse(self, fn, typed, **defaults)
        else:
            values: list[str] = []
            if is_own(factory):
                values, _ = of_recipe([*written, *typed])
                (_, written), (_, typed) = of_recipe(written), of_recipe(typed)
            with _building(values):
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
        if getattr(self, "cluster", None) is not None:
            self.executor = _executor(self.cluster, task)
        return task

    @functools.wraps(lazily)
    def execute_lazy(self: RunContext, entrypoint: Any, args: list[str], name: str) -> None:
        if self.yaml or any(FILE.search(text) for text in (*args, f"={self.factory}")):
            fail(UserError("--lazy: the task would build what its files name", hint="leave out --lazy, or the files"))
        lazily(self, entrypoint, args, name)

    cli_execute.nemotron_h = True  # type: ignore[attr-defined]
    RunContext.cli_execute, RunContext.parse_fn, RunContext.execute_lazy = cli_execute, parse_fn, execute_lazy


@contextlib.contextmanager
def _building(values: Sequence[str]) -> Iterator[None]:
    """Have the factory that is called inside take these values of its recipe."""
    token = _VALUES.set(tuple(values))
    try:
        yield
    finally:
        _VALUES.reset(token)


def _executor(cluster: Any, task: nemo_run.Partial) -> nemo_run.Executor:
    """Return the executor of a cluster file for a task, whose layout is checked here: a job would wait to fail."""
    if not settings.is_of_a_recipe(task):
        raise UserError(f"executor={cluster.kind} takes this project's recipes; for others use run.executor=NAME")
    trainer = task.trainer
    config, ranks = fdl.build(task.model.config), trainer.devices * trainer.num_nodes
    check_split(config.definition(), trainer.strategy, ranks, seq_length=config.seq_length)
    return fdl.build(executor(cluster, task, Path(task.log.explicit_log_dir).name))


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
    if factory != context.factory and not is_own(factory):
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
    """Return the names of this project's factories: of its recipes, and the one for recipe files."""
    return {factory_of(name) for name in known_recipes()} | {"nemotron_h_recipe"}


def is_own(factory: str | None) -> bool:
    """Tell whether a `--factory` is one of this project."""
    return str(factory or "").split("(")[0] in own_factories()


def known_factories(fn: Any) -> list[str]:
    """Return the names registered for an entry point such as `llm.pretrain`."""
    namespace = get_type_namespace(fn)
    return sorted({key[-1] for key in REGISTRY if namespace in (key[0], ".".join(key[:-1]))})


def explain(error: Exception, fn: Any, args: list[str], factory: str | None) -> UserError | None:
    """Explain what the user got wrong; None where it is not a mistake that this can name."""
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
    if is_own(factory):
        _, args = of_recipe(args)
    task = cli_parser.parse_factory(fn, "factory", nemo_run.Partial[fn], factory)
    try:
        settings.apply(task, [argument for argument in args if settings.parts(argument)[0]], trusted=True)
    except UserError as problem:
        return problem
    if isinstance(error, CLIException):
        return UserError(settings.reason(error), hint="`--dryrun` shows every key and value")
    return None
