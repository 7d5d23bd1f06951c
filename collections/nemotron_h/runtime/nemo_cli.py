"""Make `nemo ...` report mistakes in one screen.

nemo-run prints an unknown key as the whole configuration, an unknown factory without the known ones, and the resolved
configuration as tables of several hundred lines before each run. `RunContext.cli_execute` is wrapped (patched) for
the tasks of this project; other factories behave as before. `cli_parser._maybe_resolve_annotation` is wrapped
because nemo-run reads annotations as they stand: it cannot parse `"int"` (postponed annotations) or `int | None`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import logging
import re
import types
from typing import Any, Union

import fiddle as fdl
import nemo_run
from catalogue import REGISTRY
from nemo_run.cli import cli_parser
from nemo_run.cli.api import RunContext
from nemo_run.cli.cli_parser import CLIException
from nemo_run.config import get_type_namespace
from rich.console import Console

from nemotron_h.errors import UserError
from nemotron_h.strict import nearest


def install() -> None:
    """Wrap `RunContext.cli_execute` once."""
    if getattr(RunContext.cli_execute, "nemotron_h", False):
        return
    original = RunContext.cli_execute
    resolve = cli_parser._maybe_resolve_annotation
    cli_parser._maybe_resolve_annotation = lambda owner, name, annotation: resolve(
        owner, name, evaluated(owner, name, annotation)
    )

    @functools.wraps(original)
    def cli_execute(self: RunContext, fn: Any, args: list[str], entrypoint_type: str = "task") -> None:
        shown = nemo_run.dryrun_fn
        logging.getLogger("nemo_run.cli.cli_parser").setLevel(logging.CRITICAL)  # says each parse error twice
        if not self.dryrun and str(self.factory or "").startswith("nemotron_h_"):
            nemo_run.dryrun_fn = lambda *a, **k: None  # the tables; --dryrun shows them
        try:
            original(self, fn, args, entrypoint_type)
        except UserError as error:
            fail(error)
        except (CLIException, ValueError, AttributeError, TypeError) as error:
            explained = explain(error, fn, args, self.factory)
            if explained is None:
                raise
            fail(explained)
        finally:
            nemo_run.dryrun_fn = shown

    cli_execute.nemotron_h = True  # type: ignore[attr-defined]
    RunContext.cli_execute = cli_execute


def evaluated(owner: Any, name: str, annotation: Any) -> Any:
    """An annotation as the type that it names, unions in `typing`'s form."""
    if isinstance(annotation, str):
        target = owner.__init__ if inspect.isclass(owner) else owner
        with contextlib.suppress(NameError, TypeError):
            parameter = inspect.signature(target, eval_str=True).parameters.get(name)
            annotation = parameter.annotation if parameter else annotation
    if isinstance(annotation, types.UnionType):
        annotation = Union[annotation.__args__]  # noqa: UP007 - nemo-run knows typing.Union alone
    return annotation


def fail(error: UserError) -> None:
    """Print the error and its hint on standard error, and leave with its exit code."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(f"[bold red]error:[/bold red] {error.message}", markup=True)
    if error.hint:
        console.print(f"[bold]fix:[/bold] {error.hint}", markup=True)
    raise SystemExit(error.EXIT_CODE)


def known_factories(fn: Any) -> list[str]:
    """Names registered for an entry point such as `llm.pretrain`."""
    namespace = get_type_namespace(fn)
    return sorted({key[-1] for key in REGISTRY if namespace in (key[0], ".".join(key[:-1]))})


def explain(error: Exception, fn: Any, args: list[str], factory: str | None) -> UserError | None:
    """What the user got wrong, or None where it is not a mistake that this can name."""
    if "No matching factory found" in str(error):
        known = known_factories(fn)
        ours = [name for name in known if name.startswith("nemotron_h_")]
        name = str(factory).split("(")[0]
        return UserError(
            f"there is no factory {name!r} for {fn.__name__}",
            hint=f"{nearest(name, known)}This project's: {', '.join(ours)}; NeMo has {len(known) - len(ours)} more.",
        )
    if not factory:
        return None
    for argument in args:
        found = re.match(r"^([\w.\[\]]+?)\s*[-+*/|&]?=", argument)
        if found:
            problem = _unknown_key(fn, factory, found.group(1))
            if problem:
                return problem
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        UserError(f"{first[:300]}", hint="`--dryrun` shows every key and value")
        if isinstance(error, CLIException)
        else None
    )


def _unknown_key(fn: Any, factory: str, dotted: str) -> UserError | None:
    """The first part of a dotted key that does not exist, with its nearest neighbour."""
    from nemo_run.cli.cli_parser import parse_factory

    node = parse_factory(fn, "factory", nemo_run.Partial[fn], factory)
    parts = dotted.split(".")
    for index, part in enumerate(parts):
        part = part.split("[")[0]
        if not isinstance(node, fdl.Buildable):
            return None
        known = _keys(node)
        if part not in known:
            path = ".".join(parts[:index])
            return UserError(
                f"unknown key {dotted}: {path or fn.__name__} has no {part!r}",
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
