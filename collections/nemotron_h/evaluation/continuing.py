"""Answers that a model writes to prompts, and the settings that they are kept with."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nemotron_h.checkpoint.folders import INTEGRITY
from nemotron_h.core.files import file_sha256
from nemotron_h.data.tokenizer import Tokenizer
from nemotron_h.evaluation.subject import Subject
from nemotron_h.inference.model import GenerationModel
from nemotron_h.inference.pool import END, Job, Pool, rows_that_fit
from nemotron_h.inference.sampling import Sampling

#: ours: a pass over fewer tokens takes no less time
_SHARED = 64


@dataclass(frozen=True)
class Answer:
    """Text that a model wrote.

    Attributes:
        key: of the item.
        answer: the text.
        tokens: of it, with the one that ended it.
        seconds: its share of the engine's time.
        ended_by: see `inference.pool`.
    """

    key: str
    answer: str
    tokens: int
    seconds: float
    ended_by: str


def settings_of(subject: Subject, dtype: str, device: str) -> dict[str, Any]:
    """Return what all answers of a model depend on, for `Records.check`."""
    return {
        "checkpoint": subject.checkpoint.name,
        "weights": file_sha256(subject.checkpoint / INTEGRITY),
        "tokenizer": subject.tokenizer.ids_sha256(),
        "dtype": dtype,
        "device": device,
    }


def continuations(
    engine: GenerationModel,
    tokenizer: Tokenizer,
    prompts: Sequence[tuple[str, Sequence[int]]],
    *,
    batch: int | None,
    max_tokens: int,
    stop_ids: Collection[int],
    complete: Callable[[list[int]], bool] = lambda tokens: False,
) -> Iterator[tuple[int, Answer]]:
    """Yield the greedy continuations of prompts as they end, with the numbers of the prompts; what all prompts begin
    with is read once.

    Args:
        prompts: key and token ids of each.
        batch: rows; None takes what half of the free memory holds.
        max_tokens, stop_ids, complete: see `Pool`.
    Errors:
        UserError: memory has no room.
    """
    ids = [tokens for _, tokens in prompts]
    pool = Pool(
        engine,
        ids,
        batch=min(len(ids), batch or rows_that_fit(engine, max(map(len, ids)) + max_tokens)),
        max_tokens=max_tokens,
        sampling=Sampling(temperature=0),
        stop_ids=stop_ids,
        complete=complete,
        shared=length if (length := shared_tokens(ids)) >= _SHARED else 0,
    )
    jobs = [Job(number, 0, 0) for number in range(len(ids))][::-1]
    for sample in pool.run(lambda free: [jobs.pop() for _ in range(min(free, len(jobs)))]):
        tokens = sample.tokens[:-1] if sample.ended_by == END else sample.tokens
        number = sample.job.prompt
        yield (
            number,
            Answer(
                prompts[number][0], tokenizer.ids_to_text(tokens), len(sample.tokens), sample.seconds, sample.ended_by
            ),
        )


def shared_tokens(prompts: Sequence[Sequence[int]]) -> int:
    """Return the number of first tokens that all prompts share, of which each has more."""
    first, last = min(prompts), max(prompts)  # in the order of a dictionary: the others lie between them
    pairs = enumerate(zip(first, last, strict=False))
    different = next((place for place, (ours, theirs) in pairs if ours != theirs), len(first))
    return min(different, min(map(len, prompts)) - 1)
