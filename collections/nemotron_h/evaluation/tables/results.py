"""Verdicts on answers, and the rows of a table that they come to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from nemotron_h.evaluation.grading.boxed import boxed
from nemotron_h.evaluation.grading.code import sanitised
from nemotron_h.evaluation.grading.equality import math_equal
from nemotron_h.evaluation.grading.execution import passed
from nemotron_h.evaluation.grading.letters import first_letter, stated_letter
from nemotron_h.evaluation.grading.options import likeliest
from nemotron_h.evaluation.tables.answers import Answers, until
from nemotron_h.evaluation.tables.questions import Examined, Question
from nemotron_h.evaluation.tables.task import (
    ACC_NORM,
    CODE,
    FIRST_LETTER,
    MATH,
    NUMBER,
    STATED_LETTER,
    Task,
    evaluate,
    render,
)


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: of the row.
        score: percent.
        error: its standard error, over questions; None for one question.
        questions: how many there are.
    """

    name: str
    score: float
    error: float | None
    questions: int


def verdicts(examined: Examined, answers: Answers) -> Iterator[bool]:
    """Yield whether each question is answered rightly."""
    task, questions = examined.task, examined.questions
    if not task.generates:
        for question in questions:
            texts = [text.removeprefix(" ") for _, text in question.options] if task.metric == ACC_NORM else None
            yield likeliest(answers.nats[question.key], texts) == question.right
        return
    texts = (until(answers.texts[question.key], task.stop) for question in questions)
    if task.grader == CODE:
        yield from passed([program(task, question, text) for question, text in zip(questions, texts, strict=True)])
    else:
        for question, text in zip(questions, texts, strict=True):
            yield _right(task.grader, text, question.reference)


def _right(grader: str, text: str, reference: str) -> bool:
    if grader in (NUMBER, MATH):
        return (answer := boxed(text)) is not None and math_equal(answer, reference, percent=grader == MATH)
    return {FIRST_LETTER: first_letter, STATED_LETTER: stated_letter}[grader](text) == reference


def program(task: Task, question: Question, answer: str) -> str:
    """Return the program whose end says that an answer is right."""
    record = question.record
    text = render(task.graded, {**record, "answer": answer})
    return render(task.program, {**record, "completion": sanitised(text, render(task.entry_point, record))})


def rows_of(examined: Examined, right: list[bool]) -> Iterator[Row]:
    """Yield the rows that a task's questions come to; a row without a question is left out."""
    for name, expression in examined.task.rows.items():
        pairs = zip(examined.questions, right, strict=True)
        counted = np.array([verdict for question, verdict in pairs if evaluate(expression, question.record)], float)
        if len(counted):
            error = 100 * counted.std(ddof=1) / math.sqrt(len(counted)) if len(counted) > 1 else None
            yield Row(name, 100 * counted.mean().item(), None if error is None else error.item(), len(counted))
