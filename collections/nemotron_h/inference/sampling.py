"""Choose the next token from scores: greedy, or sampled with temperature, top-k and top-p.

Axes: b batch, v vocabulary, k tokens that top-k keeps (v without it).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_h.checkpoint.finite import check_scores
from nemotron_h.core.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Settings of the choice of tokens. Filters apply in this order: temperature, top-k, top-p.

    Attributes:
        temperature: divides the scores; 0 always takes the most probable token.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the fewest most probable tokens whose probabilities sum to at least this; 1 keeps all.
        seed: row i of a batch draws from a generator of its own, seeded with seed + i, whatever else is in the batch.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UserError(f"temperature = {self.temperature}; it has to be 0 (greedy) or more")
        if self.top_k < 0:
            raise UserError(f"top-k = {self.top_k}; it has to be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p = {self.top_p}; it has to be above 0 and at most 1 (all tokens)")

    def generators(self, rows: int) -> list[torch.Generator]:
        """Return one generator per row, in host memory, so that a GPU draws what the CPU draws."""
        return [torch.Generator().manual_seed(self.seed + row) for row in range(rows)]


def choose(logits: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> Tensor:
    """Choose the next token of every row.

    Args:
        logits: [batch, vocabulary].
        generators: one per row; each is drawn from once, unless the choice is greedy.
    Returns:
        int64 [batch].
    Errors:
        UserError: a score is NaN or +infinity, so there is nothing to choose from.
    """
    check_scores(logits)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities, tokens = _filtered(logits, sampling)
    uniform = uniforms(generators, 1)[:, 0].to(logits.device)
    place = invert(probabilities, uniform)  # [b]
    return place if tokens is None else tokens.gather(-1, place[:, None]).squeeze(-1)


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the probabilities by which `choose` chooses, float64 [..., vocabulary]; greedy ones are 0 and 1."""
    if sampling.temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    probabilities, tokens = _filtered(logits, sampling)
    if tokens is not None:
        whole = probabilities.new_zeros(logits.shape)
        probabilities = whole.scatter_(-1, tokens, probabilities)
    return probabilities / probabilities.sum(-1, keepdim=True)


def uniforms(generators: list[torch.Generator], count: int) -> Tensor:
    """Return the next numbers of every row's generator, float64 [batch, count] in host memory, from 0 and below 1."""
    return torch.stack([torch.rand(count, dtype=torch.float64, generator=g) for g in generators])


def invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """Return the place in each row of `weights` [batch, k], at least one above 0, that a number from 0 to 1 falls on.

    That is the inverse of the distribution function: the first place whose cumulative weight exceeds u times the total.
    """
    cumulative = weights.cumsum(-1)
    # right: a number that equals an edge belongs to the next place, so one of weight 0 is never chosen
    place = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)  # [b, 1]
    return place.clamp_(max=weights.shape[-1] - 1).squeeze(-1)


def _filtered(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Return weights [..., k] of the tokens that the filters leave, and these; None is the vocabulary in its order."""
    probabilities = (logits.double() / sampling.temperature).softmax(-1)  # [..., v]
    tokens = None
    vocabulary = logits.shape[-1]
    if 0 < sampling.top_k < vocabulary or sampling.top_p < 1:
        probabilities, tokens = probabilities.topk(min(sampling.top_k or vocabulary, vocabulary), dim=-1)
    if sampling.top_p < 1:
        # token i stays while p_1 + ... + p_(i-1) < top_p, in falling order (Holtzman et al. 2020, arXiv 1904.09751)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0)
    return probabilities, tokens
