"""Answers that a model writes to questions, and likelihoods of their options: kept by the questions' keys."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from nemotron_h.core.progress import StageProgress
from nemotron_h.data.tokenizer import Tokenizer
from nemotron_h.evaluation import heldout
from nemotron_h.evaluation.asking import check_gives_back
from nemotron_h.evaluation.continuing import Answer, continuations, settings_of
from nemotron_h.evaluation.records import Records
from nemotron_h.evaluation.subject import Subject
from nemotron_h.evaluation.tables.questions import Examined, Question
from nemotron_h.inference.model import GenerationModel, load_model

#: ours: tokens of special meaning that the end of a text may hold besides those of a stop text
_SPARE_TOKENS = 4


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
        UserError: names characters that it lacks.
    """
    for task in tasks:
        first = task.questions[0]
        text = first.prompt or "".join(first.options[first.right])
        check_gives_back(subject.tokenizer, subject.tokenizer.text_to_ids(text), text, f"a question of {task.name}")


def answered(
    subject: Subject,
    tasks: Sequence[Examined],
    *,
    batch: int | None,
    dtype: str,
    device: str,
    folder: Path,
    console: Console,
) -> Answers:
    """Have a model answer the questions that it has not answered yet, greedily.

    Args:
        batch: rows; None takes what half of the free memory holds.
        folder: of what is answered.
        console: for the progress.
    Errors:
        UserError: answers of other weights are there, or memory has no room.
    """
    name = f"{subject.checkpoint.name}-{dtype}-{device.replace(':', '')}"
    written, likely = Records(folder / "answers", name, Answer), Records(folder / "likelihoods", name, Likelihoods)
    settings = settings_of(subject, dtype, device)
    for records in (written, likely):
        records.check(settings)
    there = {record.key for records in (written, likely) for record in records.records}
    tokenizer, work = subject.tokenizer, []
    for each in tasks:
        questions = [*{question.key: question for question in each.questions if question.key not in there}.values()]
        if questions and each.task.generates:
            work.append((each, questions, [array("i", tokenizer.text_to_ids(q.prompt)) for q in questions]))
        elif questions:
            work.append((each, questions, [option_tokens(tokenizer, *o) for q in questions for o in q.options]))
    if work:
        engine = load_model(subject.checkpoint, dtype=getattr(torch, dtype), device=device, tokens=tokenizer.vocab_size)
        with StageProgress(console, subject.checkpoint.name, sum(map(_cost, work))) as bar, written, likely:
            for each, questions, tokens in work:
                bar.advance(0, each.name)
                if not each.task.generates:
                    for record in likelihoods(engine, questions, tokens, bar.advance):
                        likely.add(record)
                    continue
                prompts = [(question.key, ids) for question, ids in zip(questions, tokens, strict=True)]
                answers = continuations(
                    engine,
                    tokenizer,
                    prompts,
                    batch=batch,
                    max_tokens=each.task.max_tokens,
                    stop_ids={tokenizer.eod_id},
                    complete=stop_watch(tokenizer, each.task.stop),
                )
                for number, answer in answers:
                    written.add(answer)
                    bar.advance(len(tokens[number]) + each.task.max_tokens)
    return Answers(
        {record.key: record.answer for record in written.records},
        {record.key: record.nats for record in likely.records},
    )


def _cost(work: tuple[Examined, list[Question], list]) -> int:
    """Return the tokens that are read and may be written."""
    each, questions, tokens = work
    if each.task.generates:
        return sum(map(len, tokens)) + len(questions) * each.task.max_tokens
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
    nats: list[float] = []
    waiting = iter(questions)
    question = next(waiting)
    for batch in heldout.batches(iter(sequences)):
        losses, _ = heldout.batch_losses(engine, batch)
        nats += [part.sum().item() for part in losses.split([int(each.counted.sum()) for each in batch])]
        advance(sum(len(each.tokens) for each in batch))
        while question and len(nats) >= len(question.options):
            yield Likelihoods(question.key, nats[: len(question.options)])
            nats = nats[len(question.options) :]
            question = next(waiting, None)


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
