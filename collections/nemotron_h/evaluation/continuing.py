"""Answers that a model writes to prompts, and the settings that they are kept with."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from nemotron_h.checkpoint.folders import INTEGRITY
from nemotron_h.core.files import file_sha256
from nemotron_h.data.tokenizer import Tokenizer
from nemotron_h.evaluation.subject import Subject
from nemotron_h.inference.model import GenerationModel, load_model
from nemotron_h.inference.opening import torch_dtype
from nemotron_h.inference.pool import Job, Pool, rows_that_fit
from nemotron_h.inference.sampling import Sampling

#: ours: a pass over fewer tokens takes no less time
_SHARED = 64
#: tells of the tokens of an answer whether all that is looked at is there
Watch: TypeAlias = Callable[[list[int]], bool]


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


class Ask(Protocol):
    """Function that yields the greedy continuations of prompts as they end, with the numbers of the prompts."""

    def __call__(
        self,
        prompts: Sequence[tuple[str, Sequence[int]]],
        *,
        max_tokens: int,
        stop_ids: Collection[int],
        watch: Watch | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[tuple[int, Answer]]:
        """Continue prompts.

        Args:
            prompts: key and token ids of each.
            max_tokens: of an answer.
            stop_ids: tokens that end one.
            watch: an answer may end where it is true; what is looked at is there.
            stop: texts of which the first ends one; what follows is not looked at.
        """


class Engine(Protocol):
    """Place where a subject's model answers.

    Attributes:
        name: of its answers' files.
        told: what a record of scores says of it.
    """

    name: str
    told: dict[str, Any]

    def settings(self, subject: Subject) -> dict[str, Any]:
        """Return what all answers depend on, for `Records.check`."""

    def open(self, subject: Subject) -> Ask:
        """Return what asks the model."""


@dataclass(frozen=True)
class LocalEngine:
    """The engine of this project, with a checkpoint's model.

    Attributes:
        batch: rows; None takes what half of the free memory holds.
        dtype, device: see `dtype_and_device`.
    """

    batch: int | None
    dtype: str
    device: str

    @property
    def name(self) -> str:
        """Return dtype and device, which answers depend on."""
        return f"{self.dtype}-{self.device.replace(':', '')}"

    @property
    def told(self) -> dict[str, Any]:
        """Return dtype and device."""
        return {"dtype": self.dtype, "device": self.device}

    def settings(self, subject: Subject) -> dict[str, Any]:
        """Return what all answers of a model depend on."""
        return {
            "checkpoint": subject.checkpoint.name,
            "weights": file_sha256(subject.checkpoint / INTEGRITY),
            "tokenizer": subject.tokenizer.ids_sha256(),
            **self.told,
        }

    def open(self, subject: Subject) -> LocalModel:
        """Return the model, read from its checkpoint.

        Errors:
            UserError: see `load_model`.
        """
        dtype, words = torch_dtype(self.dtype), subject.tokenizer.vocab_size
        model = load_model(subject.checkpoint, dtype=dtype, device=self.device, tokens=words)
        return LocalModel(model, subject.tokenizer, self.batch)


@dataclass(frozen=True)
class LocalModel:
    """Model that is asked in this process, as `Ask` says."""

    model: GenerationModel
    tokenizer: Tokenizer
    batch: int | None

    def __call__(
        self,
        prompts: Sequence[tuple[str, Sequence[int]]],
        *,
        max_tokens: int,
        stop_ids: Collection[int],
        watch: Watch | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[tuple[int, Answer]]:
        """Yield the continuations; what all prompts begin with is read once, and where an answer may end `watch` alone
        tells.

        Errors:
            UserError: memory has no room.
        """
        ids = [tokens for _, tokens in prompts]
        pool = Pool(
            self.model,
            ids,
            batch=min(len(ids), self.batch or rows_that_fit(self.model, max(map(len, ids)) + max_tokens)),
            max_tokens=max_tokens,
            sampling=Sampling(temperature=0),
            stop_ids=stop_ids,
            complete=lambda sample: watch is not None and watch(sample.tokens),
            shared=length if (length := shared_tokens(ids)) >= _SHARED else 0,
        )
        for sample in pool.run_each([Job(number, 0, 0) for number in range(len(ids))]):
            number, text = sample.job.prompt, self.tokenizer.ids_to_text(sample.written)
            yield number, Answer(prompts[number][0], text, len(sample.tokens), sample.seconds, sample.ended_by)


def shared_tokens(prompts: Sequence[Sequence[int]]) -> int:
    """Return the number of first tokens that all prompts share, of which each has more."""
    first, last = min(prompts), max(prompts)  # in the order of a dictionary: the others lie between them
    pairs = enumerate(zip(first, last, strict=False))
    different = next((place for place, (ours, theirs) in pairs if ours != theirs), len(first))
    return min(different, min(map(len, prompts)) - 1)
