"""The teacher's logits that a cache keeps: computed as the loss computes them, so that both give the same bits.

Axes: t tokens, v words of this rank, k kept words; the vocabulary is v times the ranks of the group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed
from torch import Tensor

from nemotron_h.ops.distillation_loss import (
    HiddenTeacher,
    Objective,
    all_reduce,
    logits_of,
    top_logits,
)
from nemotron_h.ops.output_matmul import tokens_of_a_chunk


class KeptLogits(NamedTuple):
    """Attributes:
    values: [tokens, k] of the k likeliest tokens, in falling order; or [tokens, vocabulary], all of them.
    ids: int64 [tokens, k], which tokens; None where all are kept.
    logsumexp: float32 [tokens], of all logits: exp(value - logsumexp) is the teacher's probability.
    """

    values: Tensor
    ids: Tensor | None
    logsumexp: Tensor


@torch.no_grad()
def kept_logits(
    teacher: HiddenTeacher,
    k: int | None,
    group: torch.distributed.ProcessGroup | None = None,
    words: int | None = None,
) -> KeptLogits:
    """Return the teacher's logits, or the k largest of each token, chunk by chunk.

    Args:
        teacher: its states and this rank's part of its output layer.
        k: how many; None for all of the vocabulary.
        group: the ranks that hold the vocabulary in equal parts, in order; every rank gets the whole result.
        words: see `distillation_loss`.
    """
    words = len(teacher.weight) if words is None else words
    parts = []
    step = tokens_of_a_chunk(teacher.weight)
    for start in range(0, teacher.hidden.shape[0], step):
        logits = logits_of(teacher, slice(start, start + step), Objective(), group, words)
        total = _logsumexp(logits, group)
        kept = (_gathered(logits, group), None) if k is None else top_logits(logits, k, group)
        parts.append((*kept, total))
    values, ids, total = zip(*parts, strict=True)
    return KeptLogits(torch.cat(values), None if k is None else torch.cat(ids), torch.cat(total))


def _logsumexp(logits: Tensor, group: torch.distributed.ProcessGroup | None) -> Tensor:
    # log sum_w exp(x_w) = m + log sum_w exp(x_w - m), m = max_w x_w over the words of all ranks
    wide = logits.float()  # [t, v]
    largest = all_reduce(wide.amax(1), torch.distributed.ReduceOp.MAX, group)  # [t]
    sums = all_reduce((wide - largest.unsqueeze(1)).exp_().sum(1), torch.distributed.ReduceOp.SUM, group)
    return largest + sums.log()


def _gathered(logits: Tensor, group: torch.distributed.ProcessGroup | None) -> Tensor:
    """Gather the logits of all ranks, [tokens, vocabulary]."""
    if group is None or group.size() == 1:
        return logits
    whole = logits.new_zeros(logits.shape[0], group.size(), logits.shape[1])  # [t, ranks, v]
    whole[:, group.rank()] = logits
    return all_reduce(whole, torch.distributed.ReduceOp.SUM, group).flatten(1)  # a sum with zeros gathers
