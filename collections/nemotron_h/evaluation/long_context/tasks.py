"""Long-context tasks by name: RULER's 13, and two at chosen depths.

Values are those of RULER (NVIDIA/RULER, scripts/synthetic.yaml and scripts/data/synthetic) but where it is said.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import check_one_of
from nemotron_h.evaluation.long_context import aggregation, documents
from nemotron_h.evaluation.long_context.aggregation import SHORT
from nemotron_h.evaluation.long_context.item import Draft, Request
from nemotron_h.evaluation.long_context.retrieval import (
    UUIDS,
    Needles,
    essays,
    needle_at_depth,
    needles,
    noise,
    phonebook,
    phonebook_practice,
)
from nemotron_h.evaluation.long_context.scores import ALL, LINE, PART
from nemotron_h.evaluation.long_context.texts import Texts


@dataclass(frozen=True)
class Task:
    """A generator with its limits.

    Attributes:
        make: returns the texts of an item.
        max_tokens: of an answer.
        rule: of its score.
        step: units by which a haystack grows; ours: `short_step` below `SHORT` tokens.
        least: units of the smallest haystack, or a step where that is more.
        most: units beyond which there is nothing to add.
        published: RULER has it.
        practice: makes documents to train on, where they are of another form.
    """

    make: Callable[[Request], Draft]
    max_tokens: int
    rule: str
    step: int
    short_step: int
    least: int = 0
    most: Callable[[Texts], int | None] = lambda texts: None
    published: bool = True
    practice: Callable[[Request], Draft] | None = None

    def step_at(self, length: int) -> int:
        """Return the units by which a haystack of a length grows."""
        return self.step if length >= SHORT else self.short_step


def _niah(needle: Needles) -> Task:
    if needle.haystack is essays:
        return Task(needle, 128, ALL, 500, 20)
    return Task(needle, 128, ALL, 25, 5)


TASKS = {
    "niah_single_1": _niah(Needles(noise, "\n")),
    "niah_single_2": _niah(Needles(essays, " ")),
    "niah_single_3": _niah(Needles(essays, " ", values=UUIDS)),
    "niah_multikey_1": _niah(Needles(essays, " ", num_keys=4)),
    "niah_multikey_2": _niah(Needles(needles, "\n")),
    "niah_multikey_3": _niah(Needles(needles, "\n", keys=UUIDS, values=UUIDS)),
    "niah_multivalue": _niah(Needles(essays, " ", num_values=4)),
    "niah_multiquery": _niah(Needles(essays, " ", num_keys=4, num_queries=4)),
    "vt": Task(aggregation.variable_tracking, 30, ALL, 10, 1, least=aggregation.LEAST_NOISE),
    "cwe": Task(aggregation.common_words, 120, ALL, 10, 2, least=20, most=lambda texts: len(texts.words)),
    "fwe": Task(aggregation.frequent_words, 50, ALL, 32, 8, least=aggregation.LEAST_CODED),
    "qa_1": Task(documents.squad, 32, PART, 10, 1, most=lambda texts: len(texts.squad.documents)),
    "qa_2": Task(documents.hotpotqa, 32, PART, 10, 1, most=lambda texts: len(texts.hotpotqa.documents)),
    # ours: room for a number and the end of its line
    "needle": Task(needle_at_depth, 24, ALL, 1, 1, least=1, published=False),
    "phonebook": Task(phonebook, 24, LINE, 1, 1, least=4, published=False, practice=phonebook_practice),
}
#: stands for all of its tasks
RULER = "ruler"
PUBLISHED = tuple(name for name, task in TASKS.items() if task.published)


def tasks_named(text: str) -> list[str]:
    """Return the tasks that names joined by commas mean, in order.

    Errors:
        UserError: one is unknown or named twice, or there is none.
    """
    names: list[str] = []
    for name in filter(None, map(str.strip, text.split(","))):
        check_one_of("--tasks", name, [RULER, *TASKS])
        names += PUBLISHED if name == RULER else [name]
    if not names or len({*names}) < len(names):
        raise UserError(f"--tasks {text[:80]!r} names none, or one twice", hint=f"known: {RULER}, {', '.join(TASKS)}")
    return names
