"""Verdicts on answers, and the rows of a table that they come to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nemotron_h.data.thoughts import after_thought
from nemotron_h.evaluation.grading import calls, instructions, packages, symbols
from nemotron_h.evaluation.grading.boxed import boxed, marked_number
from nemotron_h.evaluation.grading.code import sanitised
from nemotron_h.evaluation.grading.equality import math_equal
from nemotron_h.evaluation.grading.execution import passed
from nemotron_h.evaluation.grading.instructions import Followed
from nemotron_h.evaluation.grading.letters import first_letter, stated_letter
from nemotron_h.evaluation.grading.options import likeliest
from nemotron_h.evaluation.heldout import ratio_stderr
from nemotron_h.evaluation.tables.answers import Answers, until
from nemotron_h.evaluation.tables.calls import row as row_of_calls
from nemotron_h.evaluation.tables.questions import Examined, Question
from nemotron_h.evaluation.tables.task import (
    ACC_NORM,
    CALLS,
    CODE,
    FIRST_LETTER,
    INSTRUCTIONS,
    MARKED,
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


def verdicts(examined: Examined, answers: Answers) -> Iterator[bool | Followed]:
    """Yield whether each question is answered rightly; of instructions, which of them are followed."""
    task, questions = examined.task, examined.questions
    if not task.generates:
        for question in questions:
            texts = [text.removeprefix(" ") for _, text in question.options] if task.metric == ACC_NORM else None
            yield likeliest(answers.nats[question.key], texts) == question.right
        return
    texts = (
        after_thought(answers.texts[question.key]) if task.chat else answers.texts[question.key]
        for question in questions
    )
    texts = [until(text, task.stop) for text in texts]
    if task.grader == CODE:
        yield from passed([program(task, question, text) for question, text in zip(questions, texts, strict=True)])
    else:
        for question, text in zip(questions, texts, strict=True):
            yield _right(task, question, text)


def _right(task: Task, question: Question, text: str) -> bool | Followed:
    grader, reference = task.grader, question.reference
    if grader in (NUMBER, MATH):
        verifies = task.verified and packages.version(packages.MATH_VERIFY)
        if verifies and symbols.verified(text, render(task.verified, question.record)):
            return True
        if verifies and grader == NUMBER:
            return False
        return (answer := boxed(text)) is not None and math_equal(answer, reference, percent=grader == MATH)
    if grader == INSTRUCTIONS:
        return instructions.followed(text, question.record)
    if grader == CALLS:
        return calls.right(text, question.record)
    return {FIRST_LETTER: first_letter, STATED_LETTER: stated_letter, MARKED: marked_number}[grader](text) == reference


def grader_of(task: Task) -> str:
    """Return what grades a task that Math-Verify may grade, in words."""
    version = packages.version(packages.MATH_VERIFY)
    rules = "the rules of NeMo-Skills' grader" + (" without percent" if task.grader == NUMBER else "")
    if not version:
        return rules
    return f"Math-Verify {version}" + (f" or {rules}" if task.grader == MATH else "")


def program(task: Task, question: Question, answer: str) -> str:
    """Return the program whose end says that an answer is right."""
    record = question.record
    text = render(task.graded, {**record, "answer": answer})
    return render(task.program, {**record, "completion": sanitised(text, render(task.entry_point, record))})


def rows_of(examined: Examined, right: Sequence[bool | Followed]) -> Iterator[Row]:
    """Yield the rows that a task's questions come to; a row without a question is left out."""
    task = examined.task
    pairs = [*zip(examined.questions, right, strict=True)]
    for name, expression in task.rows.items():
        if task.grader == CALLS:
            mean, error = row_of_calls(
                expression, task.parts, [(q.record["category"], verdict) for q, verdict in pairs]
            )
            yield Row(name, 100 * mean, 100 * error, len(pairs))
            continue
        if task.grader == INSTRUCTIONS:
            counted = [evaluate(expression, verdict._asdict()) for verdict in right]
        else:
            counted = [[verdict] for question, verdict in pairs if evaluate(expression, question.record)]
        if counted:
            sums, counts = np.array([sum(each) for each in counted], float), np.array([*map(len, counted)])
            error = 100 * ratio_stderr(sums, counts)
            yield Row(name, 100 * float(sums.sum() / counts.sum()), None if math.isnan(error) else error, len(counted))
