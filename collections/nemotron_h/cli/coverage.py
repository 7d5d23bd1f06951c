"""`nemotron-h coverage`: which model solves more problems in equal time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemotron_h.cli.generate import DeviceOption, DtypeOption, ThinkingOption, ThoughtBudgetOption, TopPOption
from nemotron_h.core.errors import UserError

if TYPE_CHECKING:
    from nemotron_h.evaluation.problems.problem import Problem


def coverage(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Checkpoints, or runs: their newest checkpoints.")
    ],
    seconds: Annotated[
        str, typer.Option(help="Budgets of each problem, joined by commas: 0.5,1,2,4. The engine's time, no other.")
    ],
    tasks: Annotated[
        str,
        typer.Option(
            help="Tasks (arithmetic, modular, lists, countdown) and files of problems (test.jsonl of nemotron-h data "
            "problems, or JSONL of GSM8K or MATH), joined by commas."
        ),
    ] = "arithmetic,modular,lists,countdown",
    count: Annotated[int, typer.Option(min=1, help="Problems of each task; of a file, its first.")] = 100,
    difficulty: Annotated[str, typer.Option(help="Of tasks: operations, such as 2 or 1-3.")] = "2-3",
    samples: Annotated[int, typer.Option(min=1, help="Most samples of a problem.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="Divides the scores.")] = 0.7,
    top_p: TopPOption = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="Of problems, samples and intervals.")] = 0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest solution.")] = 256,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask in the chat template that came with each checkpoint.")
    ] = False,
    token_seconds: Annotated[
        str | None,
        typer.Option(
            help="Seconds of a token of each model, joined by commas, in place of those measured here: those of larger "
            "models with as much attention, say. All --samples are drawn then."
        ),
    ] = None,
    thinking: ThinkingOption = None,
    thought_budget: ThoughtBudgetOption = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences at once.", show_default="what half of the free memory holds")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of samples, table, figure and page.")] = Path("runs/coverage"),
    dtype: DtypeOption = None,
    device: DeviceOption = None,
) -> None:
    """Sample solutions of problems with exact checks, and compare models at equal seconds of each problem.

    Every model runs in the same engine and precision, in the largest batch that its states leave room for. Samples are
    kept in --out: the same command continues, with other budgets too. Examples:

    nemotron-h coverage runs/hybrid runs/transformer --seconds 0.05,0.1,0.2,0.4

    nemotron-h coverage runs/hybrid_sft runs/transformer_sft --chat --tasks gsm8k_test.jsonl --seconds 1,2,4,8
    """
    from rich.console import Console

    from nemotron_h.core.locks import locked
    from nemotron_h.evaluation.coverage import report
    from nemotron_h.evaluation.coverage.contestant import contestants
    from nemotron_h.evaluation.coverage.draw import Settings, check_samples, draw
    from nemotron_h.evaluation.coverage.results import Tally, results_of
    from nemotron_h.evaluation.problems.files import keep_problems
    from nemotron_h.inference.sampling import Sampling

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    budgets = tuple(sorted({*_numbers("--seconds", seconds)}))
    costs = [None] * len(runs) if token_seconds is None else _numbers("--token-seconds", token_seconds)
    if len(costs) != len(runs):
        raise UserError(
            f"--token-seconds has {len(costs)} numbers for {len(runs)} models", hint="give one for each, in their order"
        )
    problems = _problems(tasks, count, difficulty, seed, console)
    check_samples(temperature, samples)
    sampling = Sampling(temperature, 0, top_p, seed)
    settings = Settings.of(
        dtype,
        device,
        budgets=budgets if token_seconds is None else (math.inf,),
        most=samples,
        max_tokens=max_tokens,
        sampling=sampling,
        chat=chat,
        batch=batch,
        thinking=thinking,
        thought_budget=thought_budget,
    )
    models = contestants(runs, problems, chat, thinking)
    for model in models:
        if model.longest > max_tokens:
            console.print(f"{model.name}: solutions have up to {model.longest:,} tokens, samples {max_tokens:,}")
    with locked(out, "written", "--out"):
        keep_problems(out, problems)
        tallies, settings_of = [], {}
        for model, cost in zip(models, costs, strict=True):
            drawn = draw(model, settings, out / "samples", console)
            tallies.append(Tally.of(model.name, drawn, problems, cost))
            settings_of[model.name] = {**drawn.settings, "token_seconds": cost}
        results = results_of(tallies, problems, budgets, seed)
        machine = {key: drawn.settings[key] for key in ("dtype", "processor", "threads", "torch")}
        words = (
            f"{tasks}; temperature {temperature:g}, top-p {top_p:g}, seed {seed}, at most {max_tokens} tokens and "
            f"{samples} samples; {machine['dtype']} on {machine['processor']}"
        )
        if machine["threads"]:
            words += f", threads: {machine['threads']}"
        if token_seconds is not None:
            words += f"; a token is taken to cost {token_seconds} seconds"
        files = report.write(results, {"tasks": tasks, "samples": samples, "models": settings_of}, words, out)
    screen = Console(highlight=False)
    screen.width = max(screen.width, 140)  # rows stay whole
    for table in report.tables(results):
        screen.print(table)
        screen.print()
    for sentence in report.sentences(results):
        screen.print(sentence, markup=False)
    if any(row["lower_bound"] for row in results.rows):
        console.print(f"≥: budgets that pay more than the {samples:,} samples of a problem that --samples allows")
    typer.echo(f"wrote {', '.join(map(str, files))}")


def _numbers(option: str, text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not 0 < min(numbers) <= max(numbers) < math.inf:
        raise UserError(f"{option} {text[:40]!r} is no list of seconds", hint="write for instance 0.5,1,2,4")
    return numbers


def _problems(tasks: str, count: int, difficulty: str, seed: int, console: object) -> list[Problem]:
    from nemotron_h.evaluation.problems.files import read_problems
    from nemotron_h.evaluation.problems.generate import TEST, difficulties, generate

    levels, problems = difficulties(difficulty), []
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if len({*names}) < len(names) or not names:
        raise UserError(f"--tasks {tasks[:80]!r} names none, or one twice")
    for name in names:
        if not name.endswith(".jsonl"):
            problems += generate(name, count, levels, seed, TEST)
            continue
        read, left_out = read_problems(Path(name))
        problems += _first(read, count)
        if left_out:
            console.print(f"{name}: {left_out:,} problems are left out, whose answers are no numbers", markup=False)
    return problems


def _first(problems: list[Problem], count: int) -> list[Problem]:
    """Return the first problems of each task."""
    by_task: dict[str, list[Problem]] = {}
    for problem in problems:
        by_task.setdefault(problem.task, []).append(problem)
    return [problem for members in by_task.values() for problem in members[:count]]
