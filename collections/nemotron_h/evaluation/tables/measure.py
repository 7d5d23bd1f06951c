"""Measure a table's tasks on a checkpoint: print the rows beside the paper's and add them to the run's record."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from nemotron_h.core.errors import UserError
from nemotron_h.core.progress import StageProgress
from nemotron_h.evaluation import record
from nemotron_h.evaluation.continuing import Engine
from nemotron_h.evaluation.subject import Subject
from nemotron_h.evaluation.tables import ruler
from nemotron_h.evaluation.tables.answers import answered, check
from nemotron_h.evaluation.tables.questions import Examined, examined, lacking
from nemotron_h.evaluation.tables.results import Row, grader_of, rows_of, verdicts
from nemotron_h.evaluation.tables.task import PaperTable, load, load_table

#: beside `evaluations.json`
FOLDER = "evaluations"


def prepared(
    name: str, data: Path, limit: int | None, allow_code: bool, likelihoods: bool = True
) -> tuple[list[Examined], dict[str, list[str]]]:
    """Return a table's tasks with their questions, and what keeps the others from being measured.

    Args:
        name: of the table.
        data: folder of the user's files.
        limit: questions of each task; None takes all.
        allow_code: what the model writes may be run.
        likelihoods: the engine tells those of options.
    Errors:
        UserError: a record is not as its task needs it, or no task can be measured.
    """
    tasks, left_out = [], {}
    for each in load_table(name).tasks:
        task = load(each)
        reasons = lacking(each, task, data)
        if task.runs_code and not allow_code:
            reasons.append("it runs code that the model wrote, as your user: --allow-code-execution")
        if not (task.generates or likelihoods):
            reasons.append("it compares likelihoods of options, which an endpoint does not tell")
        if reasons:
            left_out[each] = reasons
        else:
            tasks.append(examined(each, task, data, limit))
    if not tasks:
        told = "\n".join(f"{each}: {reason}" for each, reasons in left_out.items() for reason in reasons)
        raise UserError(f"{data} has the data of no task of {name} that may run", hint=told)
    return tasks, left_out


def measure_table(
    subject: Subject,
    name: str,
    tasks: Sequence[Examined],
    left_out: dict[str, list[str]],
    engine: Engine,
    limit: int | None,
    compare: bool,
    console: Console,
) -> None:
    """Have the model answer the questions, print the rows and add them to the record.

    Args:
        subject: the checkpoint.
        name: of the table.
        tasks, left_out: see `prepared`.
        engine: where the model answers.
        limit: questions of each task, for the record.
        compare: print the paper's numbers too.
        console: for the progress.
    Errors:
        UserError: the tokenizer lacks characters, or memory has no room.
    """
    for each, reasons in (left_out | {row: [why] for row, why in load_table(name).unmeasured.items()}).items():
        for reason in reasons:
            console.print(f"[bold]not measured:[/bold] {each}: ", end="")
            console.print(reason, markup=False, soft_wrap=True)
    check(subject, tasks)
    began, folder = time.perf_counter(), record.path_of(subject.checkpoint).parent / FOLDER
    answers = answered(subject, tasks, engine=engine, folder=folder, console=console)
    scored: list[Scored] = []
    with StageProgress(console, "grading", sum(len(each.questions) for each in tasks)) as bar:
        for each in tasks:
            bar.advance(0, each.name)
            right = []
            for verdict in verdicts(each, answers):
                right.append(verdict)
                bar.advance(1)
            details = {"shots": each.task.shots, "remarks": [*each.task.ours, *each.remarks]}
            if each.task.verified:
                details["grader"] = grader_of(each.task)
            scored += [Scored(row, each.task.metric, details) for row in rows_of(each, right)]
    _write(subject, name, scored, {**engine.told, "limit": limit}, began)
    _print(load_table(name), [each.row for each in scored], compare)
    for each in tasks:
        if each.remarks:
            typer.echo(f"not comparable: {each.name}: {'; '.join(each.remarks)}")
        if each.task.ours:
            typer.echo(f"{each.name}: {'; '.join(each.task.ours)}")
        if each.task.verified:
            typer.echo(f"{each.name}: graded by {grader_of(each.task)}")


def measure_lengths(
    subject: Subject,
    name: str,
    texts: Path | None,
    engine: Engine,
    limit: int | None,
    compare: bool,
    console: Console,
) -> None:
    """Measure a table of RULER's means by length; see `measure_table` and `ruler.rows_of`.

    Errors:
        UserError: see `ruler.rows_of`.
    """
    began, folder = time.perf_counter(), record.path_of(subject.checkpoint).parent / FOLDER
    paper = load_table(name)
    rows, remarks = ruler.rows_of(subject, paper.lengths, texts, engine, limit, folder, console)
    scored = [Scored(row, "score", {"remarks": remarks}) for row in rows]
    _write(subject, name, scored, {**engine.told, "limit": limit}, began)
    _print(paper, rows, compare)
    if remarks:
        typer.echo(f"not comparable: {'; '.join(remarks)}")


class Scored(NamedTuple):
    """A row with the name of its score, and what the record has of it besides."""

    row: Row
    metric: str
    details: dict[str, Any]


def _write(subject: Subject, name: str, scored: Sequence[Scored], told: dict[str, Any], began: float) -> None:
    """Add rows to the record."""
    details = {**told, "seconds": round(time.perf_counter() - began, 1)}
    entries = []
    for row, metric, own in scored:
        fraction = [row.score / 100, None if row.error is None else row.error / 100]
        entry = {"task": f"{name}/{row.name}", "metrics": {metric: fraction}, "samples": row.questions}
        entries.append({**entry, **own, **details})
    path = record.add(subject.checkpoint, entries)
    typer.echo(f"added to {path}; answers are in {path.parent / FOLDER}")


def _print(paper: PaperTable, rows: Sequence[Row], compare: bool) -> None:
    """Print the rows of a table, those without a score too."""
    models = paper.models if compare else []
    table = Table("percent", "this", "questions", *models, box=box.SIMPLE_HEAD, title=paper.source if compare else "")
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    for column in table.columns[1:]:
        column.justify, column.overflow = "right", "fold"
    scores = {row.name: row for row in rows}
    for name, theirs in paper.rows.items():
        row = scores.get(name)
        ours = ["not measured", ""]
        if row:
            ours = [f"{row.score:.1f}" + ("" if row.error is None else f" ± {row.error:.1f}"), f"{row.questions:,}"]
        numbers = ["" if value is None else f"{value:g}" for value in theirs] if compare else []
        table.add_row(name, *ours, *numbers)
    Console().print(table)
