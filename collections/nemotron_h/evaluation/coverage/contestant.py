"""A model that takes part: its checkpoint, and the problems in its tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemotron_h.checkpoint.folders import step_of
from nemotron_h.core.errors import UserError
from nemotron_h.data.chat import FAMILY_SOURCE, ChatTemplate
from nemotron_h.data.messages import SYSTEM, USER, ChatError, Turn
from nemotron_h.data.thoughts import BEGIN, in_thought, switched
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
    for name, subject in zip(_names(subjects), subjects, strict=True):
        longest = longest_solution(subject.tokenizer, problems)
        if chat:
            prompts, stops, opening = _turns(subject, problems, thinking)
            found.append(Contestant(name, subject, prompts, stops, longest, opening))
        else:
            prompts = subject.tokenizer.encode_batch([problem.prompt for problem in problems])
            found.append(Contestant(name, subject, prompts, frozenset({subject.tokenizer.eod_id}), longest))
    return found


def template_of(subject: Subject, thinking: str | None) -> tuple[str, str]:
    """Return the template that came with a checkpoint, else the family's, and the system message that asks for thoughts
    or for none; there may be no need for one.
    """
    return switched(thinking, recorded_template(subject.tokenizer, subject.record) or FAMILY_SOURCE)


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


def _turns(
    subject: Subject, problems: Sequence[Problem], thinking: str | None
) -> tuple[list[list[int]], frozenset[int], str]:
    source, system = template_of(subject, thinking)
    template, before = ChatTemplate(source, subject.tokenizer), (Turn(SYSTEM, system),) if system else ()
    try:
        turns = [(*before, Turn(USER, problem.question)) for problem in problems]
        prompts = [template.prompt(each) for each in turns]
        end = template.tokens(template.answer_end())
        begun = in_thought(template.answer_begin(turns[0]))
    except ChatError as error:
        raise UserError(f"the chat template of {subject.checkpoint} cannot be used: {error}") from error
    special = {*subject.tokenizer.special_tokens.values()}
    stops = frozenset({subject.tokenizer.eod_id, *[token for token in end if token in special][:1]})
    return prompts, stops, f"{BEGIN}\n" if begun else ""


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
