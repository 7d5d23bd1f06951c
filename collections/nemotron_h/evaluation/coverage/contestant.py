"""A model that takes part: its checkpoint, and the problems in its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemotron_h.core.errors import UserError
from nemotron_h.data.tokenizer import Tokenizer
from nemotron_h.evaluation.asking import Conversation, check_gives_back
from nemotron_h.evaluation.problems.answers import ends_with_answer
from nemotron_h.evaluation.problems.problem import Problem
from nemotron_h.evaluation.subject import Subject, names_of


@dataclass(frozen=True)
class Contestant:
    """A model with its prompts.

    Attributes:
        name: in tables and of its file of samples.
        subject: its checkpoint.
        prompts: token ids of each problem.
        stop_ids: tokens that end a solution.
        longest: tokens of the longest solution that comes with a problem.
        opening: that solutions begin with, where the template has begun a thought.
    """

    name: str
    subject: Subject
    prompts: list[list[int]]
    stop_ids: frozenset[int]
    longest: int
    opening: str = ""


def contestants(
    runs: Sequence[Path], problems: Sequence[Problem], chat: bool, thinking: str | None = None
) -> list[Contestant]:
    """Return the models of runs or checkpoints; no weights are read.

    Args:
        chat: questions are turns of a conversation, in the template that came with each checkpoint.
        thinking: `on` or `off` asks for a thought before each answer, or for none; a conversation alone can.
    Errors:
        UserError: a checkpoint is not there, named twice, or its tokenizer cannot write the problems.
    """
    if thinking is not None and not chat:
        raise UserError(f"--thinking {thinking} is for conversations", hint="add --chat, or leave it out")
    subjects = [Subject.of(run, None) for run in runs]
    found = []
    for name, subject in zip(names_of(subjects), subjects, strict=True):
        longest = longest_solution(subject.tokenizer, problems)
        if chat:
            asked = Conversation(subject, thinking)
            prompts = [asked.prompt(problem.question) for problem in problems]
            found.append(Contestant(name, subject, prompts, asked.stop_ids, longest, asked.opening))
        else:
            prompts = subject.tokenizer.encode_batch([problem.prompt for problem in problems])
            found.append(Contestant(name, subject, prompts, frozenset({subject.tokenizer.eod_id}), longest))
    return found


def longest_solution(tokenizer: Tokenizer, problems: Sequence[Problem]) -> int:
    """Return the tokens of the longest solution that comes with a problem.

    Errors:
        UserError: the tokenizer does not give back a problem's text; names characters that it lacks.
    """
    longest = 0
    for problem in problems:
        text = problem.prompt + problem.solution
        ids = tokenizer.text_to_ids(text)
        longest = max(longest, len(ids) - len(tokenizer.text_to_ids(problem.prompt)))
        check_gives_back(tokenizer, ids, text, f"a problem of {problem.task}")
    return longest


def answer_watch(tokenizer: Tokenizer, opening: str = "") -> Callable[[list[int]], bool]:
    """Return what tells whether tokens end with a line that states an answer outside of a thought; it looks where lines
    end.

    Args:
        opening: text before the tokens.
    """
    texts = ((number, tokenizer.ids_to_text([number])) for number in range(tokenizer.vocab_size))
    line_ends = frozenset(number for number, text in texts if "\n" in text)

    def complete(tokens: list[int]) -> bool:
        if tokens[-1] not in line_ends:
            return False
        begin = next((place for place in range(len(tokens) - 1, 0, -1) if tokens[place - 1] in line_ends), 0)
        stated = ends_with_answer(tokenizer.ids_to_text(tokens[begin:]))
        return stated and ends_with_answer(opening + tokenizer.ids_to_text(tokens))

    return complete
