"""Ask models questions about images, and about none or others' as controls, and score the answers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torchmetrics.functional.text import edit_distance

from nemotron_h.core.progress import StageProgress
from nemotron_h.evaluation.continuing import Answer, LocalEngine
from nemotron_h.evaluation.pictures.questions import CONTROLS, Question, controlled, digest
from nemotron_h.evaluation.records import Records
from nemotron_h.evaluation.subject import Subject
from nemotron_h.inference.generate import generate
from nemotron_h.inference.looking import Looking
from nemotron_h.inference.opening import Opened
from nemotron_h.inference.sampling import Sampling

#: of answers that differ in more of their characters, ANLS is 0 (Biten et al., arXiv 1905.13648 5)
_ANLS_LEAST = 0.5


@dataclass(frozen=True)
class Judged:
    """An answer beside the right one.

    Attributes:
        run: the model's name.
        control: one of `CONTROLS`.
        question: as it was asked.
        answer: the model's.
    """

    run: str
    control: str
    question: Question
    answer: str

    @property
    def exact(self) -> float:
        """Return 1 if both are the same but for case and spaces around them."""
        ours, right = self._compared()
        return float(ours == right)

    @property
    def similarity(self) -> float:
        """Return 1 - edit distance over the longer one's characters, or 0 where that is below one half: its mean is
        ANLS (arXiv 1905.13648).
        """
        ours, right = self._compared()
        share = 1 - float(edit_distance([ours], [right], reduction="sum")) / max(len(ours), len(right), 1)
        return share if share >= _ANLS_LEAST else 0.0

    def _compared(self) -> tuple[str, str]:
        """Return both without case and needless spaces, and without any where the right one is spelled, `H A S U`:
        spaces would count as characters that are right.
        """
        right = self.question.answer.casefold().split()
        between = "" if len(right) > 1 and all(len(each) == 1 for each in right) else " "
        return between.join(self.answer.casefold().split()), between.join(right)


def ask(
    name: str, opened: Opened, tests: Sequence[Sequence[Question]], batch: int, max_tokens: int, folder: Path,
    console: Console,
) -> list[Judged]:  # fmt: skip
    """Have a model answer what it has not answered yet, greedily.

    Args:
        tests: questions of each file.
        batch: questions at a time.
        folder: of answers, which are kept by a hash of all that they depend on.
    Errors:
        UserError: the model reads text alone, or answers of another checkpoint or with other settings are there.
    """
    looking = Looking(opened)
    subject = Subject(opened.checkpoint, opened.model.definition, opened.tokenizer, opened.record)
    records = Records(folder, name, Answer)
    settings = LocalEngine(None, opened.dtype, str(opened.model.device)).settings(subject)
    tiling = looking.layout.tiling
    settings |= {"max_tokens": max_tokens, "max_tiles": tiling.max_tiles, "tiling": tiling.by}
    records.check(settings | {"template": looking.template.source})
    asked = [(control, q) for control in CONTROLS for test in tests for q in controlled(test, control)]
    keys = [digest(question) for _, question in asked]
    there = {record.key for record in records.records}
    todo = [(key, question) for key, (_, question) in zip(keys, asked, strict=True) if key not in there]
    with StageProgress(console, name, len(todo), "questions") as bar, records:
        for begin in range(0, len(todo), batch):
            part = todo[begin : begin + batch]
            for record in _answers(opened, looking, part, max_tokens):
                records.add(record)
            bar.advance(len(part))
    answers = {record.key: record.answer for record in records.records}
    return [Judged(name, control, q, answers[key]) for key, (control, q) in zip(keys, asked, strict=True)]


def _answers(
    opened: Opened, looking: Looking, questions: Sequence[tuple[str, Question]], max_tokens: int
) -> Iterable[Answer]:
    read = [looking.read(question.turns) for _, question in questions]
    written = generate(
        opened.model,
        [each.ids for each in read],
        max_tokens=max_tokens,
        sampling=Sampling(temperature=0),
        stop_ids=looking.stop_ids,
        images=[each.placed for each in read],
    )
    for (key, _), tokens in zip(questions, written, strict=True):
        ends = next((place for place, token in enumerate(tokens) if token in looking.stop_ids), len(tokens))
        text = opened.tokenizer.ids_to_text(tokens[:ends])
        yield Answer(key, text.strip(), len(tokens), 0.0, "end" if ends < len(tokens) else "--max-tokens")


def scores(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """Return a row for each run, test and control: exact match and ANLS in percent, with standard errors."""
    groups: dict[tuple[str, str, str], list[Judged]] = {}
    for each in judged:
        groups.setdefault((each.run, each.question.test, each.control), []).append(each)
    return [
        {
            "run": run,
            "test": test,
            "asked with": control,
            "questions": len(group),
            **_percent("exact", [each.exact for each in group]),
            **_percent("anls", [each.similarity for each in group]),
        }
        for (run, test, control), group in groups.items()
    ]


def _percent(name: str, values: Sequence[float]) -> dict[str, float]:
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)
    return {name: 100 * mean, f"{name}_error": 100 * math.sqrt(variance / len(values))}
