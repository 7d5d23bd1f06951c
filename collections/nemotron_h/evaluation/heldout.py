"""Loss on the held-out text of a prepared blend, category by category. Each token is predicted once, from what comes
before it in its window, as in training's validation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F

from nemotron_h.core.errors import UserError
from nemotron_h.data.blend import Blend
from nemotron_h.data.indexed import ArrayFile, TokenStream, read_lengths
from nemotron_h.data.manifest import Manifest
from nemotron_h.data.tokenizer import Tokenizer
from nemotron_h.inference.model import GenerationModel
from nemotron_h.inference.states import States

SPLIT = "validation"
#: ours: tokens that are read at once, and rows of logits that exist at once
_BATCH_TOKENS, _LOGIT_ROWS = 8192, 1024


@dataclass(frozen=True)
class Sequence:
    """Tokens that are read together, from empty states on.

    Attributes:
        tokens: int64 or int32 [n + 1].
        counted: bool [n], whether the prediction of the token after each of the first n counts.
    """

    tokens: np.ndarray
    counted: np.ndarray


@dataclass(frozen=True)
class Score:
    """Score of a text.

    Attributes:
        tokens: predicted tokens.
        text_bytes: UTF-8 bytes of their text.
        nats: sum of the tokens' losses.
        stderr: standard error of `loss`, over sequences.
    """

    tokens: int
    text_bytes: int
    nats: float
    stderr: float

    @property
    def loss(self) -> float:
        """Return nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Return exp(loss)."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Return the bits per byte, which compare between tokenizers, unlike loss and perplexity."""
        return self.nats / math.log(2) / self.text_bytes


@dataclass(frozen=True)
class HeldOut:
    """The held-out text of a blend.

    Attributes:
        shares: category -> share in training, the mean of all phases; categories without held-out text are left out.
        left_out: categories with a share and no held-out text of a window.
        sources: category -> its sources.
    """

    shares: dict[str, float]
    left_out: list[str]
    sources: dict[str, list[str]]

    @classmethod
    def of(cls, blend: Blend, manifest: Manifest, seq_length: int) -> HeldOut:
        """Return the held-out text of a prepared blend.

        Errors:
            UserError: nothing.
        """
        phases = [blend.source_shares(number) for number in range(len(blend.phases))]
        tokens = manifest.tokens(SPLIT)
        shares: dict[str, float] = {}
        sources: dict[str, list[str]] = {}
        for name, source in blend.sources.items():
            share = math.fsum(phase[name] for phase in phases) / len(phases)
            if share > 0:
                shares[source.category] = shares.get(source.category, 0.0) + share
                found = manifest.sources[name].splits.get(SPLIT)
                if tokens[name] > (1 if found and found.sha256_loss else seq_length):
                    sources.setdefault(source.category, []).append(name)
        if not sources:
            raise UserError(
                f"blend {blend.name!r} has no held-out text of {seq_length:,} tokens",
                "Hold out more (`validation` of the sources) and prepare the blend again.",
            )
        left_out = sorted(set(shares) - set(sources))
        return cls({category: shares[category] for category in sources}, left_out, sources)


def sequences(manifest: Manifest, source: str, seq_length: int, document_reset: bool, limit: int) -> Iterator[Sequence]:
    """Yield the held-out text of a source in the order of its file: windows of `seq_length`, or conversations.

    Args:
        manifest: of the prepared blend.
        source: its name.
        seq_length: tokens that are predicted from one another.
        document_reset: whether states start anew at document boundaries, as the run was trained.
        limit: predicted tokens to end at; 0 reads everything.
    """
    stream = manifest.stream(source, SPLIT)
    if manifest.sources[source].splits[SPLIT].sha256_loss:
        yield from _conversations(stream, seq_length, limit)
        return
    wanted = min(limit or stream.tokens, stream.tokens - 1)
    for start in range(0, max(seq_length, wanted - wanted % seq_length), seq_length):
        window = stream.read(start, seq_length + 1)
        cuts = [0, seq_length]
        if document_reset:
            begins = stream.document_starts(start, seq_length)
            cuts = [0, *(int(place) for place in begins if place > 0), seq_length]
        for first, last in pairwise(cuts):
            yield Sequence(window[first : last + 1], np.ones(last - first, dtype=bool))


def _conversations(stream: TokenStream, seq_length: int, limit: int) -> Iterator[Sequence]:
    learnt = ArrayFile(f"{stream.prefix}.loss", np.uint8)
    start = done = 0
    for length in map(int, read_lengths(f"{stream.prefix}.idx")):
        read = min(length, seq_length + 1)
        counted = learnt.read(start + 1, start + read).astype(bool)
        if counted.any():
            yield Sequence(stream.read(start, read), counted)
        start, done = start + length, done + int(counted.sum())
        if limit and done >= limit:
            return


def score(
    model: GenerationModel,
    tokenizer: Tokenizer,
    texts: Iterator[Sequence],
    advance: Callable[[int], None] = lambda _: None,
) -> Score:
    """Read sequences and add their losses up.

    Args:
        model: whose predictions are scored.
        tokenizer: gives the text's bytes; special tokens have none.
        texts: what to read.
        advance: told the number of tokens that were scored.
    Errors:
        UserError: the sequences hold no token that counts.
    """
    sums: list[float] = []
    counts: list[int] = []
    text_bytes = 0
    for batch in batches(texts):
        losses, targets = batch_losses(model, batch)
        numbers = [int(s.counted.sum()) for s in batch]
        sums += [part.sum().item() for part in losses.split(numbers)]
        counts += numbers
        # whole batches: a character may be spread over two windows
        text_bytes += len(tokenizer.ids_to_text(targets.tolist(), remove_special_tokens=True).encode())
        advance(sum(numbers))
    if not counts:
        raise UserError("the held-out text has no token that counts")
    nats, tokens = math.fsum(sums), sum(counts)
    return Score(tokens, text_bytes, nats, ratio_stderr(np.array(sums), np.array(counts)))


def batch_losses(
    model: GenerationModel, batch: list[Sequence], states: States | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses of the predictions that count, float64 on the host, one sequence after another, and the tokens
    that they are of.

    Args:
        states: after the tokens that stand before all sequences, with room for these; None: there are none.
    """
    longest = max(len(s.counted) for s in batch)
    ids = torch.zeros(len(batch), longest + 1, dtype=torch.int64)
    counted = torch.zeros(len(batch), longest, dtype=torch.bool)
    for row, s in enumerate(batch):  # what is filled in at the right is read by no token that counts
        ids[row, : len(s.tokens)] = torch.from_numpy(s.tokens)
        counted[row, : len(s.counted)] = torch.from_numpy(s.counted)
    hidden = model.extend(ids[:, :-1], states or model.new_states(len(batch), longest))
    rows, targets = hidden[counted.to(hidden.device)], ids[:, 1:][counted]
    losses = [
        F.cross_entropy(model.logits(part).float(), labels.to(part.device), reduction="none").double().cpu()
        for part, labels in zip(rows.split(_LOGIT_ROWS), targets.split(_LOGIT_ROWS), strict=True)
    ]
    return torch.cat(losses), targets


def batches(texts: Iterator[Sequence]) -> Iterator[list[Sequence]]:
    """Yield sequences that are read at once, of a bounded number of tokens."""
    batch: list[Sequence] = []
    for text in texts:
        longest = max(len(s.tokens) for s in [*batch, text])
        if batch and longest * (len(batch) + 1) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch


def ratio_stderr(sums: np.ndarray, counts: np.ndarray) -> float:
    """Return the standard error of a ratio of two sums over sequences; nan for one sequence."""
    number = len(sums)
    if number < 2:
        return math.nan
    left = sums - sums.sum() / counts.sum() * counts
    return float(np.sqrt((left**2).sum() * number / (number - 1)) / counts.sum())


def weighted(scores: dict[str, Score], shares: dict[str, float]) -> tuple[float, float]:
    """Return the loss of the whole blend, categories by their shares as in `val_loss`, and its standard error."""
    total = math.fsum(shares[name] for name in scores)
    parts = {name: shares[name] / total for name in scores}
    loss = math.fsum(part * scores[name].loss for name, part in parts.items())
    return loss, math.sqrt(math.fsum((part * scores[name].stderr) ** 2 for name, part in parts.items()))
