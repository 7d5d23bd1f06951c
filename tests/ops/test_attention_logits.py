"""The largest logits of causal attention against every product in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nemotron_h.ops import attention_logits


def oracle(q: Tensor, k: Tensor, lengths: list[int] | None) -> Tensor:
    """One product after the other; q [s, b, h, d], k [s, b, g, d]."""
    s, b, h, d = q.shape
    groups = k.shape[2]
    largest = torch.full((groups,), -torch.inf, dtype=torch.float64)
    flat_q, flat_k = (x.double().transpose(0, 1).flatten(0, 1) for x in (q, k))
    start = 0
    for length in lengths or [s] * b:
        for i in range(start, start + length):
            for j in range(start, i + 1):
                for head in range(h):
                    group = head * groups // h
                    largest[group] = max(largest[group], flat_q[i, head] @ flat_k[j, group] / d**0.5)
        start += length
    return largest


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("lengths", [None, [7, 1, 5, 13]], ids=["rows", "documents"])
@pytest.mark.parametrize("at_once", [1, 200, 2**26], ids=["a query", "some", "all"])
def test_largest_of_each_group(groups: int, lengths: list[int] | None, at_once: int, monkeypatch) -> None:
    monkeypatch.setattr(attention_logits, "SCORES", at_once)
    q, k = torch.randn(13, 2, 4, 8), torch.randn(13, 2, groups, 8)
    k[-1] *= 30  # what the last position sees alone
    assert attention_logits.largest_logits(q, k, lengths) == pytest.approx(oracle(q, k, lengths), rel=1e-5)
