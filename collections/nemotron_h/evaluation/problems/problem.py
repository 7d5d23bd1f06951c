"""A problem: its question, a solution in steps, and the exact check of an answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import from_json
from nemotron_h.evaluation.problems import answers

#: fields of a record that training reads
TOLD = ("text", "messages")
#: kinds of answers
NUMBER, LIST, EXPRESSION = KINDS = ("number", "list", "expression")


@dataclass(frozen=True)
class Problem:
    """Question with an answer that can be checked.

    Attributes:
        task: a generator's name, or a file's.
        kind: of the answer, one of `KINDS`.
        question: as it is asked.
        steps: lines that lead to the answer.
        answer: that is right. Of an expression others are right too: those of the same value in which each of `given`
            stands once at most.
        given: of an expression, the numbers that it may have.
        difficulty: from 1; 0 where it is not known.
    """

    task: str
    kind: str
    question: str
    steps: list[str]
    answer: str
    given: list[int]
    difficulty: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.voted(self.answer) is None or not self.right(self.answer):
            raise UserError(f"answer {self.answer[:60]!r} of kind {self.kind!r} is no answer")

    @property
    def prompt(self) -> str:
        """Return the text before a solution."""
        return f"Question: {self.question}\n"

    @property
    def solution(self) -> str:
        """Return the steps and the answer's line."""
        return "\n".join([*self.steps, f"{answers.ANSWER} {self.answer}"])

    def record(self) -> dict[str, Any]:
        """Return what training reads, `text` of a document and `messages` of a conversation, beside the problem."""
        return {**vars(self), **self.told(self.solution)}

    def told(self, solution: str, system: str = "", answer: str | None = None) -> dict[str, Any]:
        """Return a solution as training reads it.

        Args:
            system: of the conversation.
            answer: that the conversation has in place of the solution.
        """
        turns = (("system", system), ("user", self.question), ("assistant", solution if answer is None else answer))
        messages = [{"role": role, "content": content} for role, content in turns if content]
        return {"text": f"{self.prompt}{solution}\n", "messages": messages}

    def voted(self, answer: str) -> str | None:
        """Return what equal answers share; None of one that is no answer of this kind."""
        if self.kind == EXPRESSION:
            return None if answers.expression(answer) is None else "".join(answer.split()).removesuffix(".")
        value = answers.number(answer) if self.kind == NUMBER else answers.numbers(answer)
        return None if value is None else str(value)

    def right(self, answer: str) -> bool:
        """Return True if an answer is right."""
        if self.kind != EXPRESSION:
            return (key := self.voted(answer)) is not None and key == self.voted(self.answer)
        mine, theirs = answers.expression(self.answer), answers.expression(answer)
        return theirs is not None and theirs[0] == mine[0] and not Counter(theirs[1]) - Counter(self.given)


def problem_of(record: Any, origin: str) -> Problem:
    """Return a problem that `nemotron-h data problems` wrote, to train on or as a test.

    Errors:
        UserError: it is none; names origin and field.
    """
    try:
        return from_json(Problem, {key: value for key, value in record.items() if key not in TOLD})
    except UserError as error:
        raise UserError(f"{origin}: {error.message}") from error


def tasks_of(problems: Iterable[Problem]) -> list[str]:
    """Return the tasks of problems, in order."""
    return list(dict.fromkeys(problem.task for problem in problems))
