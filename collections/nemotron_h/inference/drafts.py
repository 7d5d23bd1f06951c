"""Draft the tokens that may follow: by a smaller model, or by copying from the text so far.

Axes: b batch, k drafted tokens, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.checkpoint.finite import check_scores
from nemotron_h.core.errors import UserError
from nemotron_h.inference.graph import Recorded
from nemotron_h.inference.model import GenerationModel
from nemotron_h.inference.prefill import prefill
from nemotron_h.inference.sampling import Sampling, distribution, invert
from nemotron_h.inference.states import States
from nemotron_h.model.blocks.registry import running_layers
from nemotron_h.model.blocks.running import State

#: ours: the middle of what pays in 2408.15237 (3 and 4), and the most whose last token is still accepted in a third of
#: the passes where three of four drafted tokens are right
DRAFT_TOKENS = 4
#: ours: a copy begins behind the longest of these runs of tokens that stood in the text before. One token alone finds
#: something nearly always, and mostly something wrong
NGRAMS = (3, 2)


@dataclass
class Acceptance:
    """Counts over passes of a model over drafted tokens, each sequence of a batch on its own.

    Attributes:
        passes: each wrote one token more than it accepted.
        drafted, accepted: tokens.
    """

    passes: int = 0
    drafted: int = 0
    accepted: int = 0

    def add(self, other: Acceptance) -> None:
        """Add another's counts."""
        self.passes += other.passes
        self.drafted += other.drafted
        self.accepted += other.accepted

    def __str__(self) -> str:
        if not self.drafted:
            return "nothing drafted"
        return (
            f"{self.accepted / self.passes:.2f} drafted tokens accepted per pass, "
            f"{self.accepted / self.drafted:.0%} of those drafted"
        )


@dataclass(frozen=True)
class Proposal:
    """Tokens that may follow.

    Attributes:
        tokens: int64 [b, k].
        counts: int64 [b], the tokens of each row that are drafted; those behind are anything. In host memory as they
            are proposed: to read them there is not to wait for the draft.
        probabilities: by which they were chosen, float64 [b, k, v]; None where there was no choice.
    """

    tokens: Tensor
    counts: Tensor
    probabilities: Tensor | None


@dataclass(frozen=True)
class Draft:
    """Names the source of drafted tokens.

    Attributes:
        model: a smaller one of the same vocabulary; None copies from the text so far.
        tokens: drafted per pass.
        name: to tell.
    """

    model: GenerationModel | None
    tokens: int = DRAFT_TOKENS
    name: str = "the draft"

    def check_vocabulary(self, model: GenerationModel) -> None:
        """Check that drafted tokens are the model's.

        Errors:
            UserError: the vocabularies differ in size.
        """
        if self.model is not None and len(self.model.output) != len(model.output):
            raise UserError(
                f"{self.name} scores {len(self.model.output):,} tokens, the model that it drafts for "
                f"{len(model.output):,}",
                hint="draft with a model of the same tokenizer",
            )

    def start(self, rows: int) -> Drafter:
        """Return what drafts for so many sequences."""
        return Lookup(self.tokens) if self.model is None else ModelDrafter(self.model, self.tokens, rows)


def check_takes_back(definition: ModelDefinition, checkpoint: Path) -> None:
    """Check that every kind of layer of a model can take back tokens that it has read.

    Errors:
        UserError: names the kind and the checkpoint.
    """
    for running in running_layers(definition):
        try:
            running.window(running.state(1, 1, torch.float32, torch.device("meta")), 1)
        except UserError as error:
            raise UserError(f"{checkpoint}: {error.message}", hint=error.hint) from error


class Drafter:
    """Drafts tokens for a batch of sequences.

    Attributes:
        tokens: most per sequence and pass.
    """

    tokens: int

    def read(self, texts: Sequence[Sequence[int]], capacity: int, sampling: Sampling, graph: bool | None) -> None:
        """Read what was not read yet of the texts that are to be continued, before the first `propose`.

        Args:
            texts: token ids from their beginning, the longest first.
            capacity: tokens that the longest may reach, those on trial included.
            sampling: how the model that is drafted for chooses.
            graph: see `Recorded`.
        """
        raise NotImplementedError

    def propose(self, texts: Sequence[Sequence[int]], uniform: Tensor) -> Proposal:
        """Draft what may follow the texts, all at least two tokens long.

        Args:
            uniform: numbers from 0 to 1 that choices are made by, float64 [b, k].
        """
        raise NotImplementedError

    def accept(self, counts: np.ndarray) -> None:
        """Go on by so many tokens of each text since the last `propose`, int64 [b]."""


class ModelDrafter(Drafter):
    """Drafts by a model, whose states stay one token behind those of the model that is drafted for.

    So the first pass over a window reads two tokens whatever was accepted of the last one: where all was, the last
    drafted token, which the draft has not read, is the first of the two.

    Attributes:
        drafted, accepted: the passes over the window, and the advance of the states; from `read` on.
    """

    def __init__(self, model: GenerationModel, tokens: int, rows: int) -> None:
        self.model, self.tokens = model, tokens
        self.states = model.new_states(rows, 0)

    def read(self, texts: Sequence[Sequence[int]], capacity: int, sampling: Sampling, graph: bool | None) -> None:
        """Read all but the last token of each text."""
        self.states.reserve(capacity)
        unread = [text[done:-1] for text, done in zip(texts, self.states.lengths.tolist(), strict=True)]
        unread = [part for part in unread if part]  # the others are the last rows
        if unread:
            prefill(self.model, unread, self.states.rows(0, len(unread)))
        model, states = self.model, self.states
        window = model.window(states, self.tokens + 1)
        self.drafted = Recorded(partial(_draft, model, states, window, sampling, self.tokens), model, graph)
        self.accepted = Recorded(partial(model.accept, states, window), model, graph)

    def propose(self, texts: Sequence[Sequence[int]], uniform: Tensor) -> Proposal:
        """Draft by the sampling of the model that is drafted for."""
        last = torch.tensor([text[-2:] for text in texts])  # [b, 2]
        device = self.model.device
        tokens, self._scores, probabilities = self.drafted(last.to(device), uniform.to(device))
        counts = torch.full((len(texts),), self.tokens)
        return Proposal(tokens, counts, probabilities)

    def accept(self, counts: np.ndarray) -> None:
        """Advance the states."""
        check_scores(self._scores)  # not in `propose`: the host would wait for the device once more
        self.accepted(torch.from_numpy(counts).to(self.model.device))
        self.states.advance(counts, on_device=False)


def _draft(
    model: GenerationModel,
    states: States,
    window: list[State | None],
    sampling: Sampling,
    count: int,
    last: Tensor,
    uniform: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return `count` tokens [b, k] behind the last two, scores [b, k, v], and probabilities likewise, None of greedy
    choices.
    """
    tokens, scores, probabilities = [], [], []
    reading, slot = last, 0
    for number in range(count):
        hidden = model.try_tokens(reading, states, window, slot)
        slot += reading.shape[1]
        scores.append(model.logits(hidden[:, -1]))
        if sampling.temperature == 0:
            tokens.append(scores[-1].argmax(-1))
        else:
            probabilities.append(distribution(scores[-1], sampling))
            tokens.append(invert(probabilities[-1], uniform[:, number]))
        reading = tokens[-1][:, None]
    return torch.stack(tokens, 1), torch.stack(scores, 1), torch.stack(probabilities, 1) if probabilities else None


class Lookup(Drafter):
    """Drafts by copying what followed the last tokens of a text where they stood in it before ("prompt lookup")."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def read(self, texts: Sequence[Sequence[int]], capacity: int, sampling: Sampling, graph: bool | None) -> None:
        """Begin an index of the texts anew: of one that goes on, tokens may have been taken back."""
        self._places: list[dict[tuple[int, ...], int]] = [{} for _ in texts]
        self._indexed = [0] * len(texts)

    def propose(self, texts: Sequence[Sequence[int]], uniform: Tensor) -> Proposal:
        """Copy for each text; one whose end is new to it gets nothing."""
        copies = [self._copy(row, text) for row, text in enumerate(texts)]
        counts = torch.tensor([len(copied) for copied in copies])
        tokens = torch.tensor([copied + [0] * (self.tokens - len(copied)) for copied in copies])
        return Proposal(tokens, counts, None)

    def _copy(self, row: int, text: Sequence[int]) -> list[int]:
        places = self._places[row]
        # of every run but the text's last ones: what follows it, where it stood last
        for end in range(self._indexed[row], len(text)):
            places.update({tuple(text[end - size : end]): end for size in NGRAMS if size <= end})
        self._indexed[row] = len(text)
        place = next((places[run] for size in NGRAMS if (run := tuple(text[-size:])) in places), None)
        if place is None:
            return []
        copied: list[int] = []
        for at in range(place, place + self.tokens):  # beyond the text's end it copies its own copy
            copied.append(text[at] if at < len(text) else copied[at - len(text)])
        return copied
