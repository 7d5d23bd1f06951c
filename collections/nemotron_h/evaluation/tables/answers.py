"""Answers that a model writes to questions, and likelihoods of their options: kept by the questions' keys."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from nemotron_h.core.progress import StageProgress
from nemotron_h.data.tokenizer import Tokenizer
from nemotron_h.evaluation import heldout
from nemotron_h.evaluation.asking import Conversation, check_gives_back, without_thoughts
from nemotron_h.evaluation.continuing import Answer, Engine
from nemotron_h.evaluation.records import Records
from nemotron_h.evaluation.subject import Subject
from nemotron_h.evaluation.tables.questions import Examined, Question, key_of
from nemotron_h.inference.model import GenerationModel
from nemotron_h.inference.prefill import extend_in_passes

#: ours: tokens of special meaning that the end of a text may hold besides those of a stop text
_SPARE_TOKENS = 4
#: ours: tokens that a question's options need not read again, on average, from which on what they share is read once;
#: fewer are read faster in large batches
_SPARED = 512


@dataclass(frozen=True)
class Likelihoods:
    """Likelihoods of a question's options.

    Attributes:
        key: of the question.
        nats: the negative log-likelihood of each.
    """

    key: str
    nats: list[float]


@dataclass(frozen=True)
class Answers:
    """Answers of a model by the questions' keys: texts, and nats of options."""

    texts: dict[str, str]
    nats: dict[str, list[float]]


def check(subject: Subject, tasks: Sequence[Examined]) -> None:
    """Refuse tasks whose text the tokenizer does not give back.

    Errors:
        UserError: names characters that it lacks, or the chat template cannot be used.
    """
    for task in tasks:
        text = task.questions[0].text
        check_gives_back(subject.tokenizer, subject.tokenizer.text_to_ids(text), text, f"a question of {task.name}")


def answered(subject: Subject, tasks: Sequence[Examined], *, engine: Engine, folder: Path, console: Console) -> Answers:
    """Have a model answer the questions that it has not answered yet, greedily.

    Args:
        engine: where it answers; likelihoods are told by the one here alone.
        folder: of what is answered.
        console: for the progress.
    Errors:
        UserError: answers of other weights are there, memory has no room, or an endpoint fails.
    """
    name = f"{subject.checkpoint.name}-{engine.name}"
    written, likely = Records(folder / "answers", name, Answer), Records(folder / "likelihoods", name, Likelihoods)
    settings = engine.settings(subject)
    for records in (written, likely):
        records.check(settings)
    there = {record.key for records in (written, likely) for record in records.records}
    tokenizer, work = subject.tokenizer, []
    conversation = without_thoughts(subject) if any(each.task.chat for each in tasks) else None
    for each in tasks:
        left = {key: q for q in each.questions if (key := record_key(q, conversation)) not in there}
        there |= left.keys()
        if left and not each.task.generates:
            work.append((each, left, [option_tokens(tokenizer, *o) for q in left.values() for o in q.options]))
            continue
        groups: dict[str, dict[str, Question]] = {}  # of prompts that begin alike, which is read once
        for key, question in left.items():
            groups.setdefault(question.begin, {})[key] = question
        for group in groups.values():
            work.append((each, group, [array("i", _prompt(tokenizer, conversation, q)) for q in group.values()]))
    if work:
        ask = engine.open(subject)
        with StageProgress(console, subject.checkpoint.name, sum(map(_cost, work))) as bar, written, likely:
            for each, left, tokens in work:
                bar.advance(0, each.name)
                if not each.task.generates:
                    for record in likelihoods(ask.model, [*left.values()], tokens, bar.advance):
                        likely.add(record)
                    continue
                begun = conversation.opening if each.task.chat else ""
                answers = ask(
                    [*zip(left, tokens, strict=True)],
                    max_tokens=each.task.max_tokens,
                    stop_ids=conversation.stop_ids if each.task.chat else {tokenizer.eod_id},
                    watch=stop_watch(tokenizer, each.task.stop),
                    stop=each.task.stop,
                )
                for number, answer in answers:
                    written.add(replace(answer, answer=begun + answer.answer))
                    bar.advance(len(tokens[number]) + each.task.max_tokens)
    texts = {record.key: record.answer for record in written.records}
    asked = {q.key: record_key(q, conversation) for each in tasks if each.task.generates for q in each.questions}
    return Answers(
        {question: texts[key] for question, key in asked.items()},
        {record.key: record.nats for record in likely.records},
    )


def record_key(question: Question, conversation: Conversation | None) -> str:
    """Return the key of the record of an answer: of a conversation's, it depends on the chat template too."""
    if not question.turns:
        return question.key
    return key_of([question.key, conversation.source, conversation.system])


def _prompt(tokenizer: Tokenizer, conversation: Conversation | None, question: Question) -> list[int]:
    """Return the tokens before an answer."""
    if not question.turns:
        return tokenizer.text_to_ids(question.prompt)
    opening = tokenizer.text_to_ids(question.opening) if question.opening else []
    return conversation.tokens(question.turns) + opening


def _cost(work: tuple[Examined, dict[str, Question], list]) -> int:
    """Return the tokens that are read and may be written."""
    each, left, tokens = work
    if each.task.generates:
        return sum(map(len, tokens)) + len(left) * each.task.max_tokens
    return sum(len(sequence.tokens) for sequence in tokens)


def option_tokens(tokenizer: Tokenizer, context: str, text: str) -> heldout.Sequence:
    """Return context and option as tokens, of which the option's count: those after as many as the context has alone,
    as lm-evaluation-harness splits them.
    """
    before, whole = len(tokenizer.text_to_ids(context)), tokenizer.text_to_ids(context + text)
    counted = np.arange(1, len(whole)) >= before
    return heldout.Sequence(np.array(whole, dtype=np.int32), counted)


def likelihoods(
    engine: GenerationModel,
    questions: Sequence[Question],
    sequences: Sequence[heldout.Sequence],
    advance: Callable[[int], None] = lambda _: None,
) -> Iterator[Likelihoods]:
    """Yield the likelihoods of the options of each question.

    Args:
        sequences: of all options, in order.
        advance: told the number of tokens that were read.
    """
    waiting = iter(sequences)
    options = [[next(waiting) for _ in question.options] for question in questions]
    shared = [shared_tokens(each) for each in options]
    if sum(length * (len(each) - 1) for length, each in zip(shared, options, strict=True)) >= _SPARED * len(shared):
        for question, each, length in zip(questions, options, shared, strict=True):
            yield Likelihoods(question.key, _after_shared(engine, each, length))
            advance(sum(len(sequence.tokens) for sequence in each))
        return
    nats: list[float] = []
    left = iter(questions)
    question = next(left)
    for batch in heldout.batches(iter(sequences)):
        losses, _ = heldout.batch_losses(engine, batch)
        nats += _sums(losses, batch)
        advance(sum(len(each.tokens) for each in batch))
        while question and len(nats) >= len(question.options):
            yield Likelihoods(question.key, nats[: len(question.options)])
            nats = nats[len(question.options) :]
            question = next(left, None)


def shared_tokens(options: Sequence[heldout.Sequence]) -> int:
    """Return the number of first tokens that all options of a question share, none of which predicts one that
    counts.
    """
    before = min(int(np.argmax(each.counted)) for each in options)
    tokens = np.stack([each.tokens[:before] for each in options])
    different = (tokens != tokens[0]).any(0)
    return int(np.argmax(different)) if different.any() else before


def _after_shared(engine: GenerationModel, options: Sequence[heldout.Sequence], length: int) -> list[float]:
    """Return the likelihoods of options whose first tokens are read once for all of them."""
    states = engine.new_states(1, max(len(each.tokens) for each in options))
    if length:
        extend_in_passes(engine, torch.from_numpy(options[0].tokens[None, :length]), states)
    ends = [heldout.Sequence(each.tokens[length:], each.counted[length:]) for each in options]
    losses, _ = heldout.batch_losses(engine, ends, states.taken([0] * len(ends)))
    return _sums(losses, ends)


def _sums(losses: torch.Tensor, batch: Sequence[heldout.Sequence]) -> list[float]:
    return [part.sum().item() for part in losses.split([int(each.counted.sum()) for each in batch])]


def stop_watch(tokenizer: Tokenizer, stop: Sequence[str]) -> Callable[[list[int]], bool]:
    """Return what tells whether tokens end with a stop text, or have just had one."""
    if not stop:
        return lambda tokens: False
    tail = max(len(text.encode()) for text in stop) + _SPARE_TOKENS

    def complete(tokens: list[int]) -> bool:
        text = tokenizer.ids_to_text(tokens[-tail:])
        return any(each in text for each in stop)

    return complete


def until(text: str, stop: Sequence[str]) -> str:
    """Return a text up to the first stop text in it."""
    return text[: min((place for each in stop if (place := text.find(each)) >= 0), default=len(text))]
