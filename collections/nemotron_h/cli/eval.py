"""`nemotron-h eval`: held-out loss by category, and tasks of lm-evaluation-harness."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nemotron_h.core.errors import UserError
from nemotron_h.evaluation.harness import Invocation, Settings
from nemotron_h.evaluation.tasks import PERPLEXITY, load_suite, load_task, local_tasks, suites

DTYPES = ("float32", "bfloat16")
#: ours: half a minute a category for the tiny model on two cores
TOKENS = 65_536


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
    suite: Annotated[str | None, typer.Option(help=f"{', '.join(suites())}: its tasks and shots.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts of each task.", show_default="all")] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Examples in the prompt of --tasks.", show_default="each task's")
    ] = None,
    tokens: Annotated[int, typer.Option(min=0, help=f"{PERPLEXITY}: tokens of a category; 0: all.")] = TOKENS,
    blend: Annotated[str | None, typer.Option(help=f"{PERPLEXITY}: blend.", show_default="the run's")] = None,
    root: Annotated[Path | None, typer.Option(help=f"{PERPLEXITY}: data root.", show_default="the run's")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that are read at once.")] = 8,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, of weights and activations.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="cuda where a GPU is visible")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of the tokenizer.", show_default="the one that the run was trained with")
    ] = None,
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
    """Evaluate a checkpoint. Results are printed and added to evaluations.json in the run's folder."""
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is unknown", hint=f"use one of {', '.join(DTYPES)}")
    if tasks is not None and suite is not None:
        raise UserError("--tasks and --suite exclude each other")
    listed = "" if suite is not None else PERPLEXITY if tasks is None else tasks
    names = [name.strip() for name in listed.split(",") if name.strip()]
    if suite is None and not names:
        raise UserError("--tasks names none", hint=f"Known: {', '.join([PERPLEXITY, *local_tasks()])}.")
    runs = _invocations(names, suite, shots)
    _check_code(runs, allow_code_execution or show_commands)
    settings = Settings(dtype, device or _device(), batch_size, limit)
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


def _invocations(names: list[str], suite: str | None, shots: int | None) -> list[Invocation]:
    """Return the runs of the harness: tasks that share their number of examples run together."""
    found: list[Invocation] = []
    if suite is not None:
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


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _show(checkpoint: Path, runs: list[Invocation], settings: Settings) -> None:
    from nemotron_h.evaluation import harness

    typer.echo(harness.shown(["nemotron-h", "export", "hf", str(checkpoint), "MODEL"]))
    for run in runs:
        typer.echo(harness.shown(harness.command("python", "MODEL", run, settings, "TASKS", "RESULTS")))
