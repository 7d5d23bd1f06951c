"""Cross entropy over a vocabulary that may be split over ranks, in blocks of tokens and in the logits' own memory; or
with the output layer's matmul, and the logits of a chunk of tokens at a time.

Axes: t tokens, v the words of this rank, h width. Per token with logits x, over the words w of all ranks:

    m = max_w x_w      Z = sum_w exp(x_w - m)      loss = log Z + m - x_label
    dx_w = dloss (p_w - [w = label])      p_w = exp(x_w - m) / Z      p_label - 1 = exp(-loss) - 1

Nothing of the size of the logits is allocated: the forward leaves exp(logit - largest) where the logits were, the
backward turns that into the gradient. Float32 inside; with bfloat16 logits each value is rounded where it is stored.

In chunks, forward and backward each multiply a chunk's logits x = hidden weight^T and are done with them before the
next chunk's: one output matmul more than with whole logits, and [t, v] less memory. Values of a token are bit for bit
those of whole logits wherever the matmul gives a row the same bits alone; the gradient of the weight is summed over
chunks in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron_h.ops.main_grad import passed_on
from nemotron_h.ops.output_matmul import add_matmul, matmul, tokens_of_a_chunk, zeros_of

# ours: logits of a block; its float32 copy stays in cache.
BLOCK_ELEMENTS = 1 << 20
#: ours: logits of rows that are no words; no infinity, of which kernels make NaN, and held by every dtype in use
PADDING = -1e30


def _blocks(rows: Tensor) -> Iterator[slice]:
    step = max(1, BLOCK_ELEMENTS // rows.shape[1])
    return (slice(i, i + step) for i in range(0, rows.shape[0], step))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Place(NamedTuple):
    """Labels in this rank's part of the vocabulary: `index` int64 [t, 1], and `here` [t], whether they are in it."""

    index: Tensor
    here: Tensor

    @classmethod
    def of(cls, labels: Tensor, width: int, group: torch.distributed.ProcessGroup | None) -> _Place:
        own = labels - (0 if group is None else group.rank() * width)
        return cls(own.clamp(0, width - 1).unsqueeze(1), (own >= 0) & (own < width))


def _exponentiate(rows: Tensor, largest: Tensor) -> Tensor:
    """Put exp(logit - largest) in the logits' place [t, v]; return its sums over this rank's words [t]."""
    total = torch.empty_like(largest)
    for block in _blocks(rows):
        values = rows[block].to(largest.dtype).sub_(largest[block].unsqueeze(1)).exp_()
        total[block] = values.sum(1)
        if values.data_ptr() != rows[block].data_ptr():
            rows[block].copy_(values)
    return total


def _measure(
    rows: Tensor, place: _Place, group: torch.distributed.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, Z and m, each [t], of logits [t, v], which become exp(logit - m)."""
    size = 1 if group is None else group.size()
    label = rows.gather(1, place.index).squeeze(1).to(_wide(rows.dtype)).masked_fill_(~place.here, 0)
    largest = torch.cat([rows[block].amax(1) for block in _blocks(rows)]).to(label.dtype)
    if size > 1:
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=group)
    total = _exponentiate(rows, largest)
    if size > 1:
        both = torch.stack([total, label])
        torch.distributed.all_reduce(both, group=group)
        total, label = both
    return total.log() + (largest - label), total, largest


def _differentiate(rows: Tensor, place: _Place, dloss: Tensor, total: Tensor, loss: Tensor) -> None:
    """Turn exp(logit - m) [t, v] into the logits' gradient, in its place."""
    scale = dloss.to(total.dtype)
    by_row = (scale / total).unsqueeze(1)  # [t, 1]
    for block in _blocks(rows):
        if rows.dtype == by_row.dtype:
            rows[block].mul_(by_row[block])
        else:
            rows[block].copy_(rows[block].to(by_row.dtype).mul_(by_row[block]))
    # The label's own probability to full precision: 1 - p would lose it once exp(...) is rounded to bfloat16.
    at_label = (scale * torch.expm1(-loss)).to(rows.dtype)
    kept = rows.gather(1, place.index).squeeze(1)
    rows.scatter_(1, place.index, torch.where(place.here, at_label, kept).unsqueeze(1))


class _VocabularyCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, group):
        logits = logits.detach()  # written to outside autograd's sight; it still counts the writes
        rows = logits.view(-1, logits.shape[-1])  # [t, v]
        place = _Place.of(labels.reshape(-1), rows.shape[1], group)
        loss, total, _ = _measure(rows, place, group)
        ctx.save_for_backward(logits, *place, total, loss)
        return loss.view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        logits, index, here, total, loss = ctx.saved_tensors
        _differentiate(logits.view(-1, logits.shape[-1]), _Place(index, here), dloss.reshape(-1), total, loss)
        return logits, None, None


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, group, words, chunk):
        values = hidden.new_empty(3, len(hidden), dtype=_wide(hidden.dtype))  # loss, Z, m
        for rows in _chunks(len(hidden), chunk):
            logits = mask_padding(matmul(hidden[rows], weight), words)  # [t, v]
            place = _Place.of(labels[rows], len(weight), group)
            values[:, rows] = torch.stack(_measure(logits, place, group))
            del logits  # before the next chunk's are made
        ctx.save_for_backward(hidden, weight, labels, values)
        ctx.group, ctx.words, ctx.chunk = group, words, chunk
        return values[0].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        hidden, weight, labels, values = ctx.saved_tensors
        loss, total, largest = values  # [t] each
        dhidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        dweight = zeros_of(hidden, weight, loss.dtype) if ctx.needs_input_grad[1] else None
        for rows in _chunks(len(hidden), ctx.chunk):
            logits = mask_padding(matmul(hidden[rows], weight), ctx.words)  # [t, v]
            _exponentiate(logits, largest[rows])
            place = _Place.of(labels[rows], len(weight), ctx.group)
            _differentiate(logits, place, dloss[rows], total[rows], loss[rows])
            if dhidden is not None:
                dhidden[rows] = matmul(logits, weight.t())  # [t, h]
            if dweight is not None:
                add_matmul(dweight, logits, hidden[rows])  # [v, h]
            del logits
        return dhidden, None if dweight is None else passed_on(weight, dweight), None, None, None, None


def _chunks(tokens: int, chunk: int) -> Iterator[slice]:
    return (slice(start, start + chunk) for start in range(0, tokens, chunk))


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


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    group: torch.distributed.ProcessGroup | None = None,
    words: int | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Return -log softmax(hidden weight^T)[label] per token, without logits of more than a chunk; differentiable once.

    With a `group` the gradient of `hidden` is this rank's part of a sum over ranks, as of a column-parallel layer. A
    `weight` with Megatron's `main_grad` gets its gradient added there.

    Args:
        hidden: [tokens, width], the states before the output layer.
        weight: [vocabulary of this rank, width], the output layer.
        labels: integer [tokens], numbers in the whole vocabulary.
        group: the ranks that hold the vocabulary in equal parts, in order; None for one rank.
        words: this rank's rows that are words, the first ones; the others pad it, without probability. None is all.
        chunk_tokens: tokens whose logits exist at once; None chooses by `output_matmul.CHUNK_ELEMENTS`.

    Returns:
        float32 [tokens] (float64 for float64 states).

    Errors:
        ValueError: shapes that do not fit together.
    """
    if hidden.dim() != 2 or labels.shape != hidden.shape[:1] or weight.shape[1:] != hidden.shape[1:]:
        raise ValueError(
            "chunked_cross_entropy: hidden [tokens, width], weight [vocabulary, width] and labels [tokens], got "
            f"{tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(labels.shape)}"
        )
    chunk = tokens_of_a_chunk(weight) if chunk_tokens is None else chunk_tokens
    return _ChunkedCrossEntropy.apply(hidden, weight, labels, group, len(weight) if words is None else words, chunk)
