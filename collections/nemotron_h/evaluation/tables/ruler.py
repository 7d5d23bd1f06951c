"""Rows of a table that are RULER's means by length, asked in the chat template."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from nemotron_h.evaluation.continuing import Engine
from nemotron_h.evaluation.long_context.answers import Answerer, answered
from nemotron_h.evaluation.long_context.make import ItemSettings
from nemotron_h.evaluation.long_context.results import MEAN, PUBLISHED_SAMPLES, Answered, results_of
from nemotron_h.evaluation.long_context.tasks import PUBLISHED
from nemotron_h.evaluation.subject import Subject
from nemotron_h.evaluation.tables.results import Row

#: RULER's
SEED = 42


def rows_of(
    subject: Subject,
    lengths: Mapping[str, int],
    texts: Path | None,
    engine: Engine,
    limit: int | None,
    folder: Path,
    console: Console,
) -> tuple[list[Row], list[str]]:
    """Have the model answer the items of all thirteen tasks, and return the rows with what keeps them from being
    comparable.

    Args:
        lengths: row -> tokens of its items.
        texts: folder of a user's own; None reads those of packages.
        engine: where the model answers.
        limit: items of a task and length; None takes RULER's 500.
        folder: of what is answered.
        console: for the progress.
    Errors:
        UserError: texts are not there, the tokenizer lacks characters, or memory has no room.
    """
    model = Answerer(f"{subject.checkpoint.name}-{engine.name}", subject, chat=True)
    samples = limit or PUBLISHED_SAMPLES
    items = ItemSettings([*PUBLISHED], sorted(lengths.values()), samples, SEED, texts).items(model.count, console)
    model.check(items)
    records = answered(model, items, engine, folder / "ruler", console)
    results = results_of({model.name: Answered(items, {each.key: each.answer for each in records.records})})
    means = {row["length"]: row for row in results.rows if row["task"] == MEAN}
    rows = [
        Row(name, means[length]["score"], means[length]["standard_error"], means[length]["items"])
        for name, length in lengths.items()
    ]
    return rows, results.remarks
