"""Cross entropy over a vocabulary that may be split over ranks, in blocks of tokens and in the logits' own memory.

Axes: t tokens, v the words of this rank. Per token with logits x, over the words w of all ranks:

    m = max_w x_w      Z = sum_w exp(x_w - m)      loss = log Z + m - x_label
    dx_w = dloss (p_w - [w = label])      p_w = exp(x_w - m) / Z      p_label - 1 = exp(-loss) - 1

Nothing of the size of the logits is allocated: the forward leaves exp(logit - largest) where the logits were, the
backward turns that into the gradient. Float32 inside; with bfloat16 logits each value is rounded where it is stored.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed
from torch import Tensor
from torch.autograd.function import once_differentiable

# ours: logits of a block; its float32 copy stays in cache.
BLOCK_ELEMENTS = 1 << 20
#: ours: logits of rows that are no words; no infinity, of which kernels make NaN, and held by every dtype in use
PADDING = -1e30


def _blocks(rows: Tensor) -> Iterator[slice]:
    step = max(1, BLOCK_ELEMENTS // rows.shape[1])
    return (slice(i, i + step) for i in range(0, rows.shape[0], step))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _VocabularyCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, group):
        logits = logits.detach()  # written to outside autograd's sight; it still counts the writes
        rows, flat = logits.view(-1, logits.shape[-1]), labels.reshape(-1)  # [t, v], [t]
        size = 1 if group is None else group.size()
        width = rows.shape[1]
        flat = flat - (0 if group is None else group.rank() * width)
        here = (flat >= 0) & (flat < width)
        index = flat.clamp(0, width - 1).unsqueeze(1)  # [t, 1]
        label = rows.gather(1, index).squeeze(1).to(_wide(logits.dtype)).masked_fill_(~here, 0)
        largest = torch.cat([rows[block].amax(1) for block in _blocks(rows)]).to(label.dtype)  # m, [t]
        if size > 1:
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=group)
        total = torch.empty_like(largest)  # Z, [t]
        for block in _blocks(rows):
            values = rows[block].to(largest.dtype).sub_(largest[block].unsqueeze(1)).exp_()
            total[block] = values.sum(1)
            if values.data_ptr() != rows[block].data_ptr():
                rows[block].copy_(values)
        if size > 1:
            both = torch.stack([total, label])
            torch.distributed.all_reduce(both, group=group)
            total, label = both
        loss = total.log() + (largest - label)
        # The label's own probability to full precision: 1 - p would lose it once exp(...) is rounded to bfloat16.
        ctx.save_for_backward(logits, index, here, total, loss)
        return loss.view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        logits, index, here, total, loss = ctx.saved_tensors
        rows, scale = logits.view(-1, logits.shape[-1]), dloss.reshape(-1).to(total.dtype)
        by_row = (scale / total).unsqueeze(1)  # [t, 1]
        for block in _blocks(rows):
            if rows.dtype == by_row.dtype:
                rows[block].mul_(by_row[block])
            else:
                rows[block].copy_(rows[block].to(by_row.dtype).mul_(by_row[block]))
        at_label = (scale * torch.expm1(-loss)).to(rows.dtype)
        rows.scatter_(1, index, torch.where(here, at_label, rows.gather(1, index).squeeze(1)).unsqueeze(1))
        return logits, None, None


def mask_padding(logits: Tensor, words: int) -> Tensor:
    """Return the logits, IN PLACE without probability for the rows of the output matrix that only pad it.

    Losses then do not depend on the padding, which tensor parallelism decides, and are those of the vocabulary that
    generation and evaluation score. The padding's gradients are 0 exactly, as exp(`PADDING` - any logit) is.

    Args:
        logits: [..., vocabulary of this rank], that no backward pass reads.
        words: the first columns, which are none.
    """
    # not `detach`: autograd refuses a write that it sees to a view that a custom function returned
    logits.data[..., words:] = PADDING
    return logits


def vocabulary_cross_entropy(
    logits: Tensor, labels: Tensor, group: torch.distributed.ProcessGroup | None = None
) -> Tensor:
    """Return -log softmax(logits)[label] per token. OVERWRITES ``logits``; differentiable once.

    Args:
        logits: [..., vocabulary of this rank], contiguous; used up.
        labels: integer [...], numbers in the whole vocabulary.
        group: the ranks that hold the vocabulary in equal parts, in order; None for one rank.

    Returns:
        float32 [...] (float64 for float64 logits).

    Errors:
        ValueError: logits that are not contiguous, or shapes that do not fit together.
    """
    if not logits.is_contiguous() or logits.shape[:-1] != labels.shape:
        raise ValueError(
            "vocabulary_cross_entropy: logits [..., vocabulary] must be contiguous and labels [...], got "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    return _VocabularyCrossEntropy.apply(logits, labels, group)
