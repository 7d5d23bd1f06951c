"""Scores of models over tasks, lengths and depths."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemotron_h.evaluation.long_context.aggregation import SHORT
from nemotron_h.evaluation.long_context.item import Item
from nemotron_h.evaluation.long_context.scores import clean, hits, score
from nemotron_h.evaluation.long_context.tasks import PUBLISHED

#: in place of a task, the mean over all
MEAN = "mean"
#: ours: equal parts of the haystack
DEPTHS = 10
#: RULER: a length is effective up to which the mean is at least Llama-2-7B's at 4,096 tokens
EFFECTIVE = 85.6
#: RULER: items of a task
PUBLISHED_SAMPLES = 500


@dataclass(frozen=True)
class Results:
    """Scores, in percent.

    Attributes:
        models, tasks, lengths: in order.
        rows: of each model, task and length: items, score, its standard error, tokens of the prompts on average, and
            answers that are empty; and the means over tasks.
        depths: of each model, task, length and part of the haystack: references that stand there, and how many of them
            were in the answers.
        remarks: sentences on why scores cannot be compared with published ones; none where they can.
    """

    models: list[str]
    tasks: list[str]
    lengths: list[int]
    rows: list[dict[str, Any]]
    depths: list[dict[str, Any]]
    remarks: list[str]

    def score(self, model: str, task: str, length: int) -> float | None:
        """Return a score; None where there is none."""
        return next(
            (row["score"] for row in self.rows if (row["model"], row["task"], row["length"]) == (model, task, length)),
            None,
        )

    def effective(self, model: str) -> int | None:
        """Return the largest length up to which the mean over RULER's tasks is good enough; None where some lack."""
        if not {*PUBLISHED} <= {*self.tasks}:
            return None
        good = 0
        for length in self.lengths:
            scores = [self.score(model, task, length) for task in PUBLISHED]
            if None in scores or sum(scores) / len(scores) < EFFECTIVE:
                break
            good = length
        return good


@dataclass(frozen=True)
class Answered:
    """Items with the texts that a model answered them with, by their keys."""

    items: Sequence[Item]
    texts: Mapping[str, str]


def results_of(answered: Mapping[str, Answered]) -> Results:
    """Score answers.

    Args:
        answered: by model. Items of models with different tokenizers differ.
    """
    items = [item for each in answered.values() for item in each.items]
    tasks, lengths = list(dict.fromkeys(item.task for item in items)), sorted({item.length for item in items})
    rows, depths = [], []
    for model, each in answered.items():
        of_cell: dict[tuple[str, int], list[Item]] = {}
        for item in each.items:
            of_cell.setdefault((item.task, item.length), []).append(item)
        for length in lengths:
            cells = [(task, of_cell[task, length]) for task in tasks if (task, length) in of_cell]
            of_length = [_row(model, task, length, members, each.texts) for task, members in cells]
            rows += [*of_length, _mean(model, length, of_length)] if len(of_length) > 1 else of_length
            for task, members in cells:
                depths += _depths(model, task, length, members, each.texts)
    return Results([*answered], tasks, lengths, rows, depths, _remarks(items))


def _row(model: str, task: str, length: int, items: Sequence[Item], texts: Mapping[str, str]) -> dict[str, Any]:
    scores = np.array([score(item.rule, texts[item.key], item.references) for item in items])
    error = scores.std(ddof=1) / math.sqrt(len(scores)) if len(scores) > 1 else None
    return {
        "model": model,
        "task": task,
        "length": length,
        "items": len(items),
        "score": round(100 * float(scores.mean()), 2),
        "standard_error": None if error is None else round(100 * float(error), 2),
        "tokens": round(float(np.mean([item.tokens for item in items])), 1),
        "empty": sum(not clean(texts[item.key]) for item in items),
    }


def _mean(model: str, length: int, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean over tasks, which weigh the same; its error is that of independent tasks."""
    count, errors = len(rows), [row["standard_error"] for row in rows]
    return {
        "model": model,
        "task": MEAN,
        "length": length,
        "items": sum(row["items"] for row in rows),
        "score": round(sum(row["score"] for row in rows) / count, 2),
        "standard_error": None if None in errors else round(math.hypot(*errors) / count, 2),
        "tokens": round(sum(row["tokens"] for row in rows) / count, 1),
        "empty": sum(row["empty"] for row in rows),
    }


def _depths(
    model: str, task: str, length: int, items: Sequence[Item], texts: Mapping[str, str]
) -> list[dict[str, Any]]:
    there, right = np.zeros(DEPTHS, int), np.zeros(DEPTHS, int)
    for item in items:
        found = hits(item.rule, texts[item.key], item.references)
        for depth, hit in zip(item.depths, found if item.depths else (), strict=True):
            part = min(int(DEPTHS * depth), DEPTHS - 1)
            there[part] += 1
            right[part] += hit
    rows = []
    for part in np.flatnonzero(there):
        row = {"model": model, "task": task, "length": length, "from": part / DEPTHS, "references": int(there[part])}
        rows.append({**row, "score": round(100 * float(right[part] / there[part]), 2)})
    return rows


def _remarks(items: Sequence[Item]) -> list[str]:
    remarks, cells = [], Counter((item.task, item.length) for item in {item.key: item for item in items}.values())
    if ours := [task for task in dict.fromkeys(task for task, _ in cells) if task not in PUBLISHED]:
        remarks.append(f"{', '.join(ours)}: no task of RULER")
    if short := sorted({length for _, length in cells if length < SHORT}):
        remarks.append(f"{', '.join(f'{length:,}' for length in short)} tokens: RULER begins at {SHORT:,}")
    if own := sorted({file for item in items for file in item.own_texts}):
        remarks.append(f"texts of your own: {', '.join(own)}")
    if (fewest := min(cells.values())) < PUBLISHED_SAMPLES:
        remarks.append(f"{fewest:,} items of a task and length: RULER has {PUBLISHED_SAMPLES}")
    return remarks
