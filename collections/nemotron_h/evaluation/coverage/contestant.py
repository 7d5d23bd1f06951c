"""A model that takes part: its checkpoint, and the problems in its tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemotron_h.checkpoint.folders import step_of
from nemotron_h.core.errors import UserError
from nemotron_h.data.chat import FAMILY_SOURCE, ChatTemplate
from nemotron_h.data.messages import USER, ChatError, Turn
from nemotron_h.data.tokenizer import Tokenizer
from nemotron_h.evaluation.problems.answers import ends_with_answer
from nemotron_h.evaluation.problems.problem import Problem
from nemotron_h.evaluation.subject import Subject
from nemotron_h.inference.opening import recorded_template


@dataclass(frozen=True)
class Contestant:
    """A model with its prompts.

    Attributes:
        name: in tables and of its file of samples.
        subject: its checkpoint.
        prompts: token ids of each problem.
        stop_ids: tokens that end a solution.
        longest: tokens of the longest solution that comes with a problem.
    """

    name: str
    subject: Subject
    prompts: list[list[int]]
    stop_ids: frozenset[int]
    longest: int


def contestants(runs: Sequence[Path], problems: Sequence[Problem], chat: bool) -> list[Contestant]:
    """Return the models of runs or checkpoints; no weights are read.

    Args:
        chat: questions are turns of a conversation, in the template that came with each checkpoint.
    Errors:
        UserError: a checkpoint is not there, named twice, or its tokenizer cannot write the problems.
    """
    subjects = [Subject.of(run, None) for run in runs]
    return [
        Contestant(name, subject, *_prompts(subject, problems, chat), longest_solution(subject.tokenizer, problems))
        for name, subject in zip(_names(subjects), subjects, strict=True)
    ]


def _names(subjects: Sequence[Subject]) -> list[str]:
    """Return the runs' names; where a run takes part with several checkpoints, with their steps."""
    checkpoints = [subject.checkpoint.resolve() for subject in subjects]
    twice = next((path for number, path in enumerate(checkpoints) if path in checkpoints[:number]), None)
    if twice is not None:
        raise UserError(f"{twice} is named twice", hint="name each run or checkpoint once")
    runs = [path.parent.parent if path.parent.name == "checkpoints" else path for path in checkpoints]
    names = [run.name for run in runs]
    several = [names.count(name) > 1 for name in names]
    names = [
        f"{name}-{step_of(path)}" if more else name
        for name, path, more in zip(names, checkpoints, several, strict=True)
    ]
    if len({*names}) < len(names):
        raise UserError(f"two runs have the name {max(names, key=names.count)}", hint="rename the folder of one")
    return names


def _prompts(subject: Subject, problems: Sequence[Problem], chat: bool) -> tuple[list[list[int]], frozenset[int]]:
    tokenizer = subject.tokenizer
    stops = {tokenizer.eod_id}
    if not chat:
        return tokenizer.encode_batch([problem.prompt for problem in problems]), frozenset(stops)
    template = ChatTemplate(recorded_template(tokenizer, subject.record) or FAMILY_SOURCE, tokenizer)
    try:
        prompts = [template.prompt((Turn(USER, problem.question),)) for problem in problems]
        end = template.tokens(template.answer_end())
    except ChatError as error:
        raise UserError(f"the chat template of {subject.checkpoint} cannot be used: {error}") from error
    special = {*tokenizer.special_tokens.values()}
    return prompts, frozenset({*stops, *[token for token in end if token in special][:1]})


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
        if (back := tokenizer.ids_to_text(ids)) != text:
            lacking = "".join(sorted({letter for letter in text if letter not in back})) or "spaces or line ends"
            raise UserError(
                f"the tokenizer in {tokenizer.path} does not give back a problem of {problem.task}: it lacks "
                f"{json.dumps(lacking, ensure_ascii=False)}",
                hint="leave that task or file out, or take a model whose tokenizer has all characters",
            )
    return longest


def answer_watch(tokenizer: Tokenizer) -> Callable[[list[int]], bool]:
    """Return what tells whether tokens end with a line that states an answer; it looks where a line ends."""
    texts = ((number, tokenizer.ids_to_text([number])) for number in range(tokenizer.vocab_size))
    line_ends = frozenset(number for number, text in texts if "\n" in text)

    def complete(tokens: list[int]) -> bool:
        if tokens[-1] not in line_ends:
            return False
        begin = next((place for place in range(len(tokens) - 1, 0, -1) if tokens[place - 1] in line_ends), 0)
        return ends_with_answer(tokenizer.ids_to_text(tokens[begin:]))

    return complete
