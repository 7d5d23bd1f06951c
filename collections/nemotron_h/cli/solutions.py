"""`nemotron-h data solutions`: what a model writes on problems, as data to train on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemotron_h.cli.generate import DeviceOption, DtypeOption, ThinkingOption, ThoughtBudgetOption, TopPOption
from nemotron_h.core.strict import check_one_of

if TYPE_CHECKING:
    from rich.console import Console

    from nemotron_h.evaluation.problems.solutions import Summary


def solutions(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A checkpoint, or a run: its newest checkpoint.")],
    problems: Annotated[
        Path,
        typer.Option(help="Folder of nemotron-h data problems, of which the training problems are taken, or JSONL."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of samples, solutions, pairs and their blends.")],
    samples: Annotated[int, typer.Option(min=1, help="Samples of each problem.")] = 4,
    keep: Annotated[
        str, typer.Option(help="Solutions to imitate: all, right, or shortest-right, one of each problem.")
    ] = "right",
    pairs: Annotated[int, typer.Option(min=0, help="Most pairs of each problem, of a right and a wrong solution.")] = 1,
    temperature: Annotated[float, typer.Option(min=0.0, help="Divides the scores.")] = 0.7,
    top_p: TopPOption = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="Of samples, and of the choice of pairs.")] = 0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest solution.")] = 256,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask in the chat template that came with the checkpoint.")
    ] = False,
    thinking: ThinkingOption = None,
    thought_budget: ThoughtBudgetOption = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences at once.", show_default="what half of the free memory holds")
    ] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
) -> None:
    """Sample a model's solutions of training problems, check them, and write those to imitate and pairs to prefer.

    Samples are kept in --out: the same command continues, and other --keep, --pairs or more --samples draw only what is
    missing. Examples:

    nemotron-h data solutions runs/sft --chat --problems runs/problems --samples 8 --out runs/solutions

    nemotron-h data solutions runs/base --problems runs/problems --keep shortest-right --pairs 0 --out runs/short
    """
    from rich.console import Console

    from nemotron_h.core.locks import locked
    from nemotron_h.evaluation.coverage.draw import check_samples
    from nemotron_h.evaluation.coverage.solutions import form_of, judged, sampled
    from nemotron_h.evaluation.problems.files import training_problems
    from nemotron_h.evaluation.problems.solutions import KEEP, write_solutions
    from nemotron_h.inference.sampling import Sampling

    check_one_of("--keep", keep, KEEP)
    check_samples(temperature, samples)
    asked = training_problems(problems)
    settings = {"dtype": dtype, "device": device, "batch": batch, "max_tokens": max_tokens, "chat": chat}
    settings |= {"sampling": Sampling(temperature, 0, top_p, seed), "thinking": thinking}
    settings["thought_budget"] = thought_budget
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with locked(out, "written", "--out"):
        model, drawn = sampled(run, asked, samples, settings, out, console)
        form = form_of(model, chat, thinking)
        told = write_solutions(out, judged(asked, drawn, samples), form, keep, pairs, seed)
    show(told, Console(highlight=False))
    typer.echo(f"wrote {', '.join(map(str, told.files))}" if told.files else "there is nothing to write")


def show(summary: Summary, screen: Console) -> None:
    """Print a table over tasks, and what gave no pair."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    headings = ("task", "problems", "samples", "right", "cut off", "solutions", "pairs")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for task, problems, samples, right, *rest in summary.rows:
        table.add_row(task, f"{problems:,}", f"{samples:,}", f"{right:.1%}", *(f"{count:,}" for count in rest))
    screen.print(table)
    screen.print(
        f"no pair: {summary.all_right:,} problems without a wrong solution, {summary.all_wrong:,} without a right one"
    )
