"""Largest logits of causal attention, without the scores of a whole sequence at once. Not differentiable.

Axes: s position in a row, b row, t position in the rows one behind the other, n position in a document, h query head,
g group of key-value heads, r query heads of a group, d channel of a head.

    largest_g = max over rows, the heads of g, and j <= i of one document:  q_i.k_j / sqrt(d)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: scores at a time; ours: 128 MiB in bfloat16
SCORES = 2**26


@torch.no_grad()
def largest_logits(q: Tensor, k: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
    """Return the largest logit of each group, float32 [g].

    Args:
        q: [s, b, h, d].
        k: [s, b, g, d].
        lengths: tokens of the documents of all rows, one behind the other; None where each row is one.
    """
    q = q.unflatten(2, (k.shape[2], -1))  # [s, b, g, r, d]
    if lengths is None:
        documents = [(q.permute(1, 2, 0, 3, 4), k.permute(1, 2, 3, 0))]
    else:
        of_all = (x.transpose(0, 1).flatten(0, 1).split(list(lengths)) for x in (q, k))
        documents = [(q.transpose(0, 1)[None], k.permute(1, 2, 0)[None]) for q, k in zip(*of_all, strict=True)]
    return torch.stack([_of_document(q, k) for q, k in documents]).amax(0) * q.shape[-1] ** -0.5


def _of_document(q: Tensor, k: Tensor) -> Tensor:
    """Return the largest products, float32 [g], of q [b, g, n, r, d] and k [b, g, d, n]."""
    batch, groups, length, heads, _ = q.shape
    at_once = max(1, SCORES // (batch * groups * heads * length))
    largest = q.new_full((groups,), -torch.inf, dtype=torch.float32)
    for start in range(0, length, at_once):
        stop = min(start + at_once, length)
        scores = (q[:, :, start:stop].flatten(2, 3) @ k[..., :stop]).unflatten(2, (-1, heads))  # [b, g, n, r, n]
        later = torch.ones(stop - start, stop - start, dtype=torch.bool, device=q.device).triu(1)
        scores[..., start:].masked_fill_(later[:, None], -torch.inf)
        largest = largest.maximum(scores.amax((0, 2, 3, 4)).float())
    return largest
