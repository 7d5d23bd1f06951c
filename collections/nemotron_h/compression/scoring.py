"""Score models on validation text without training them, and rank them: next-token accuracy, agreement with the parent,
loss.

Both accuracies are the paper's (3.3): how often the greedy prediction is the text's next token, and how often it is the
parent's greedy prediction. A model is a `GenerationModel`, so a candidate is a list of its parent's layers and slices
of their weights; no checkpoint is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from nemotron_h.inference.model import GenerationModel

#: ours: logits are made for so many elements at a time (float32: 128 MiB)
LOGITS_ELEMENTS = 1 << 25
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Score:
    """Results of a model on some text.

    Attributes:
        accuracy: share of positions whose most probable token is the text's next one.
        agreement: share of positions whose most probable token is the parent's.
        loss: mean cross-entropy of the next token, in nats.
        tokens: positions that were looked at.
    """

    accuracy: float
    agreement: float
    loss: float
    tokens: int


@dataclass(frozen=True)
class Predictions:
    """Most probable next tokens, int64 [samples, seq_length], and the mean loss of the text's own."""

    greedy: np.ndarray
    loss: float

    def score(self, text: np.ndarray, parent: np.ndarray) -> Score:
        """Compare them with the text [samples, seq_length + 1] and the parent's predictions [samples, seq_length]."""
        return Score(
            accuracy=float((self.greedy == text[:, 1:]).mean()),
            agreement=float((self.greedy == parent).mean()),
            loss=self.loss,
            tokens=self.greedy.size,
        )


def predict(model: GenerationModel, text: np.ndarray, batch: int, advance: Advance = lambda _: None) -> Predictions:
    """Run a model over windows of text.

    Args:
        text: token ids, int64 [samples, seq_length + 1]; each window starts from empty states.
        batch: windows of one forward pass.
        advance: told the tokens of each pass.
    """
    samples, length = text.shape[0], text.shape[1] - 1
    greedy = np.empty((samples, length), dtype=np.int64)
    rows = max(1, LOGITS_ELEMENTS // model.definition.vocab_size)
    total = 0.0
    for first in range(0, samples, batch):
        part = torch.from_numpy(text[first : first + batch])
        hidden = model.extend(part[:, :-1], model.new_states(len(part), length)).flatten(0, 1)
        labels = part[:, 1:].flatten().to(model.device)
        parts = []
        for chunk, wanted in zip(hidden.split(rows), labels.split(rows), strict=True):
            logits = model.logits(chunk).float()
            parts.append(logits.argmax(-1))
            total += float(F.cross_entropy(logits, wanted, reduction="sum"))
        greedy[first : first + batch] = torch.cat(parts).view(len(part), length).cpu().numpy()
        advance(labels.numel())
    return Predictions(greedy, total / greedy.size)


def places(values: Sequence[float]) -> np.ndarray:
    """Return the place of each value, the largest first, from 1; equal values share the mean of their places."""
    row = np.asarray(values, dtype=float)
    larger = (row[None, :] > row[:, None]).sum(1)
    equal = (row[None, :] == row[:, None]).sum(1)
    return larger + (equal + 1) / 2


def order(scores: Sequence[Score]) -> list[int]:
    """Return the numbers of the candidates, the best first: by the sum of the places by accuracy and by agreement.

    The paper says that both are used (3.3), not how. Ties: lower loss, then number.
    """
    accuracy = places([score.accuracy for score in scores])
    agreement = places([score.agreement for score in scores])
    combined = accuracy + agreement
    return sorted(range(len(scores)), key=lambda number: (combined[number], scores[number].loss, number))


def pareto(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """Return the entries that no other beats with a lower or equal cost and a higher value, cheapest first."""
    front: list[int] = []
    for number in sorted(range(len(costs)), key=lambda n: (costs[n], -values[n], n)):
        if not front or values[number] > values[front[-1]]:
            front.append(number)
    return front
