"""`nemotron-h eval`: held-out loss by category, tasks of lm-evaluation-harness, and the paper's tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import nearest
from nemotron_h.evaluation.harness import Invocation, Settings
from nemotron_h.evaluation.tables.task import load_table, tables
from nemotron_h.evaluation.tasks import PERPLEXITY, load_suite, load_task, local_tasks, suites

if TYPE_CHECKING:
    from nemotron_h.evaluation.continuing import Engine

#: ours: half a minute a category for the tiny model on two cores
TOKENS = 65_536
#: ours: of the harness, on any machine
BATCH_SIZE = 8
PAPER = "paper"


def evaluate(
    checkpoint: Annotated[
        Path, typer.Argument(help="A checkpoint (runs/NAME/checkpoints/step-000100), or a run: its newest checkpoint.")
    ],
    tasks: Annotated[
        str | None,
        typer.Option(
            help=f"{PERPLEXITY}, {', '.join(local_tasks())}, or names of lm-evaluation-harness; joined by commas.",
            show_default=PERPLEXITY,
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(tables())}: a table of the paper by its own settings, on the files of --data; "
            f"{', '.join(suites())}: the harness' tasks of those names, not comparable with the paper's."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A table's questions, FOLDER/TASK/SPLIT.jsonl with the hub's fields; of table 10, texts of your own.",
            metavar="FOLDER",
        ),
    ] = None,
    compare: Annotated[
        str | None, typer.Option(help=f"{PAPER}: print the paper's numbers of a table too.", metavar=PAPER)
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts of each task.", show_default="all")] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Examples in the prompt of --tasks.", show_default="each task's")
    ] = None,
    tokens: Annotated[int, typer.Option(min=0, help=f"{PERPLEXITY}: tokens of a category; 0: all.")] = TOKENS,
    blend: Annotated[str | None, typer.Option(help=f"{PERPLEXITY}: blend.", show_default="the run's")] = None,
    root: Annotated[Path | None, typer.Option(help=f"{PERPLEXITY}: data root.", show_default="the run's")] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Prompts that are read at once.", show_default="8; of a table, as many as fit"),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="As of generate; tasks of --tasks and suites run in no float8.")
    ] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="cuda where a GPU is visible")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of the tokenizer.", show_default="the one that the run was trained with")
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(
            help="Of a table: address of an OpenAI-compatible server of the model, http://HOST:PORT/v1, that answers.",
            metavar="URL",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Its name there.", metavar="NAME")] = None,
    at_once: Annotated[int, typer.Option(min=1, help="Requests to it at a time.")] = 8,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run code that the model wrote, on this machine.")
    ] = False,
    python: Annotated[
        Path | None,
        typer.Option(help="Interpreter with lm-evaluation-harness.", show_default="one that is set up on first use"),
    ] = None,
    show_commands: Annotated[
        bool, typer.Option("--show-commands", help="Print what would be run, and run nothing.")
    ] = False,
) -> None:
    """Evaluate a checkpoint. Results are printed and added to evaluations.json in the run's folder.

    A table of the paper is answered in this project's engine, by its settings, and goes on after a stop. Examples:

    nemotron-h eval runs/nemotron_h_tiny

    nemotron-h eval runs/nemotron_h_tiny --tasks perplexity,logiqa

    nemotron-h eval runs/nemotron_h_8b --suite paper_table_5 --data FOLDER --compare paper

    nemotron-h eval runs/nemotron_h_8b_sft --suite paper_table_10 --limit 50 --compare paper

    nemotron-h eval runs/nemotron_h_8b_sft --suite paper_table_10 --endpoint http://localhost:8000/v1 --model NAME
    """
    from nemotron_h.inference.opening import FLOAT8, dtype_and_device

    if tasks is not None and suite is not None:
        raise UserError("--tasks and --suite exclude each other")
    if suite in tables():
        others = {"--shots": shots, "--python": python, "--blend": blend, "--root": root}
        _check_table(suite, data, compare, {**others, "--show-commands": show_commands or None})
        engine = _engine((endpoint, model, at_once), batch_size, *dtype_and_device(dtype, device))
        _table(checkpoint, tokenizer, suite, data, engine, limit, allow_code_execution, compare is not None)
        return
    if endpoint is not None or model is not None:
        raise UserError(
            "--endpoint is of a table, whose questions the model answers in words",
            hint=f"add --suite {' or --suite '.join(tables())}",
        )
    if data is not None or compare is not None:
        raise UserError("--data and --compare are of a table", hint=f"add --suite {' or --suite '.join(tables())}")
    listed = "" if suite is not None else PERPLEXITY if tasks is None else tasks
    names = [name.strip() for name in listed.split(",") if name.strip()]
    if suite is None and not names:
        raise UserError("--tasks names none", hint=f"Known: {', '.join([PERPLEXITY, *local_tasks()])}.")
    if suite is not None and shots is not None:
        raise UserError("--shots is of --tasks: a suite has each task's", hint="leave it out, or name tasks")
    runs = _invocations(names, suite, shots)
    _check_code(runs, allow_code_execution or show_commands)
    if runs and dtype == FLOAT8:
        raise UserError(
            f"--dtype {FLOAT8}: lm-evaluation-harness gets the model as an export, which has no such weights",
            hint=f"measure {PERPLEXITY} or a table of the paper in it, or take bfloat16",
        )
    # commands that are shown are for another machine, maybe
    dtype, there = dtype_and_device(dtype, None if show_commands else device)
    settings = Settings(dtype, device or there, batch_size or BATCH_SIZE, limit)
    if show_commands:
        _show(checkpoint, runs, settings)
        return
    from nemotron_h.evaluation import harness
    from nemotron_h.evaluation.measure import measure_blend, measure_tasks
    from nemotron_h.evaluation.subject import Subject

    subject = Subject.of(checkpoint, tokenizer)
    console = Console(stderr=True, highlight=False)
    if not all(run.local for run in runs):
        harness.check_hub()
    if runs:
        interpreter = harness.check_interpreter(python) if python else harness.environment(console.print)
    if PERPLEXITY in names:
        measure_blend(subject, blend, root, tokens, settings, console)
    if runs:
        measure_tasks(subject, runs, settings, interpreter, console)


def _engine(served: tuple[str | None, str | None, int], batch: int | None, dtype: str, device: str) -> Engine:
    """Return where a table's questions are answered: an endpoint that has the model, where one is named.

    Args:
        served: address, name and requests at a time.
    """
    from nemotron_h.evaluation.continuing import LocalEngine
    from nemotron_h.evaluation.endpoint import Endpoint

    if (served[0] is None) != (served[1] is None):
        raise UserError("--endpoint and --model go together", hint="URL/models lists what the server has")
    if served[0] is None:
        return LocalEngine(batch, dtype, device)
    engine = Endpoint(*served)
    engine.check()
    return engine


def _check_table(suite: str, data: Path | None, compare: str | None, others: dict[str, object]) -> None:
    """Refuse options that a table does not take."""
    if given := [option for option, value in others.items() if value is not None]:
        raise UserError(f"{', '.join(given)}: --suite {suite} does not take that", hint="leave it out")
    of_lengths = load_table(suite).lengths
    if data is None and not of_lengths:
        raise UserError(f"--suite {suite} needs --data FOLDER", hint="FOLDER/TASK/SPLIT.jsonl, as the hub's data sets")
    if data is not None and not data.is_dir():
        has = "texts of nemotron-h ruler --texts" if of_lengths else "FOLDER/TASK/SPLIT.jsonl, as the hub's data sets"
        raise UserError(f"--data {data} is no folder", hint=has)
    if compare not in (None, PAPER):
        raise UserError(f"--compare {compare} is unknown", hint=f"use --compare {PAPER}")


def _table(
    checkpoint: Path,
    tokenizer: Path | None,
    suite: str,
    data: Path | None,
    engine: Engine,
    limit: int | None,
    allow_code: bool,
    compare: bool,
) -> None:
    from nemotron_h.evaluation.subject import Subject
    from nemotron_h.evaluation.tables.measure import measure_lengths, measure_table, prepared

    subject, console = Subject.of(checkpoint, tokenizer), Console(stderr=True, highlight=False)
    if load_table(suite).lengths:
        measure_lengths(subject, suite, data, engine, limit, compare, console)
        return
    tasks, left_out = prepared(suite, data, limit, allow_code, likelihoods="endpoint" not in engine.told)
    measure_table(subject, suite, tasks, left_out, engine, limit, compare, console)


def _invocations(names: list[str], suite: str | None, shots: int | None) -> list[Invocation]:
    """Return the runs of the harness: tasks that share their number of examples run together."""
    found: list[Invocation] = []
    if suite is not None:
        if suite not in suites():
            known = [*tables(), *suites()]
            raise UserError(f"there is no suite {suite}", hint=f"{nearest(suite, known)}Known: {', '.join(known)}.")
        for row in load_suite(suite):
            found.append(Invocation((row.task,), row.shots, row.code_execution, local=False))
        return found
    own = [name for name in names if name in local_tasks()]
    for code in (False, True):
        if chosen := tuple(name for name in own if load_task(name).code_execution == code):
            found.append(Invocation(chosen, shots, code, local=True))
    if theirs := tuple(name for name in names if name not in (*own, PERPLEXITY)):
        found.append(Invocation(theirs, shots, code_execution=False, local=False))
    return found


def _check_code(runs: list[Invocation], allowed: bool) -> None:
    if not allowed and (names := [name for run in runs if run.code_execution for name in run.tasks]):
        raise UserError(
            f"{', '.join(names)} run code that the model wrote, on this machine and as your user",
            hint="add --allow-code-execution where that may happen (a container without network), or leave them out",
        )


def _show(checkpoint: Path, runs: list[Invocation], settings: Settings) -> None:
    from nemotron_h.evaluation import harness

    typer.echo(harness.shown(["nemotron-h", "export", "hf", str(checkpoint), "MODEL"]))
    for run in runs:
        typer.echo(harness.shown(harness.command("python", "MODEL", run, settings, "TASKS", "RESULTS")))
