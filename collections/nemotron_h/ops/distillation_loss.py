"""The loss of knowledge distillation from hidden states, without the logits of either model for more than a few tokens.

The output layers' matmuls, both softmaxes, the divergence and its gradients are taken chunk by chunk of tokens in the
forward pass, as fused cross entropies do; a chunk's logits are gone before the next one's are made. Full logits would
be [tokens, vocabulary] of both models and several float32 copies: at 8,192 tokens and 131,072 words 4 GiB a copy.

Axes: t tokens (of a chunk), v words of this rank, h width of the student, k largest logits of the teacher.

Per token, with the student's logits x, the teacher's y, the temperature T, q = softmax(x / T), p = softmax(y / T) and
r = softmax(x) (Hinton et al. 2015, arXiv 1503.02531; Nemotron-H, arXiv 2504.03624, takes KL(p || q) alone, with T = 1):

    loss = kl_weight T^2 KL + lm_weight lm      KL(p || q) = sum_w p_w (log p_w - log q_w)      lm = -log r_label
    dx_w = kl_weight T (q_w - p_w) + lm_weight (r_w - [w = label])
    reverse: KL(q || p), and q_w (log q_w - log p_w - KL) in place of q_w - p_w
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron_h.ops.cross_entropy import mask_padding
from nemotron_h.ops.main_grad import passed_on
from nemotron_h.ops.output_matmul import add_matmul, matmul, tokens_of_a_chunk, zeros_of

#: ours: logits whose float32 values are held at once. Smaller ones stay in a CPU's cache and are no faster where other
#: processes keep a thread waiting at the end of each operation
BLOCK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}


@dataclass(frozen=True)
class Objective:
    """Loss of each token: `kl_weight * temperature^2 * KL + lm_weight * cross entropy`.

    The square keeps the size of the gradients as the temperature changes.

    Attributes:
        temperature: both models' logits are divided by it.
        reverse: KL(student || teacher) instead of KL(teacher || student).
        kl_weight: of the divergence.
        lm_weight: of the cross entropy with the labels, at temperature 1.
        top_k: None, or: the teacher's distribution is truncated to its k likeliest tokens and divided by their sum, the
            student's stays whole. Forward only: the reverse divergence would be infinite.
    Errors:
        ValueError: a value out of its range.
    """

    temperature: float = 1.0
    reverse: bool = False
    kl_weight: float = 1.0
    lm_weight: float = 0.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature = {self.temperature} is not positive")
        if self.kl_weight < 0 or self.lm_weight < 0 or not self.kl_weight + self.lm_weight > 0:
            raise ValueError(f"kl_weight = {self.kl_weight}, lm_weight = {self.lm_weight}: none positive, or negative")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k = {self.top_k} is below 1")
        if self.top_k is not None and self.reverse:
            raise ValueError("top_k with the reverse divergence, which is infinite where the teacher has no mass")


class HiddenTeacher(NamedTuple):
    """A teacher that is at hand: `hidden` [tokens, width], `weight` [vocabulary of this rank, width]."""

    hidden: Tensor
    weight: Tensor


class TeacherLogits(NamedTuple):
    """A teacher's logits [tokens, vocabulary of this rank], as a cache of them holds."""

    logits: Tensor


class TopLogits(NamedTuple):
    """A teacher's k largest logits: `logits` [tokens, k], `ids` int64 [tokens, k] in the whole vocabulary."""

    logits: Tensor
    ids: Tensor


class DistillationLoss(NamedTuple):
    """Attributes:
    total: scalar, the sum over tokens of their weight times their `Objective`; differentiable once.
    kl: float32 [tokens], the divergence of each token.
    lm: float32 [tokens], the cross entropy of each token at temperature 1.
    """

    total: Tensor
    kl: Tensor
    lm: Tensor


def distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher: HiddenTeacher | TeacherLogits | TopLogits,
    labels: Tensor,
    token_weights: Tensor,
    objective: Objective,
    group: torch.distributed.ProcessGroup | None = None,
    chunk_tokens: int | None = None,
    words: int | None = None,
) -> DistillationLoss:
    """Return the loss, with its gradients wrt `hidden` and `weight`; the teacher gets none.

    Matmuls are in the tensors' dtype, all else in float32 (float64 for float64 tensors), and the gradient of `weight`
    is summed in float32. A `weight` with Megatron's `main_grad` gets its gradient added there, without another copy.
    With a `group` the gradient of `hidden` is this rank's part of a sum over ranks, as of a column-parallel layer.

    Args:
        hidden: [tokens, width], the student's states before its output layer.
        weight: [vocabulary of this rank, width], the student's output layer.
        teacher: the teacher's side, of the same tokens and vocabulary.
        labels: integer [tokens], numbers in the whole vocabulary.
        token_weights: [tokens]; 0 leaves a token out of the total.
        objective: the terms of the loss.
        group: the ranks that hold the vocabulary in equal parts, in order; None for one rank.
        chunk_tokens: tokens whose logits exist at once; None chooses by `CHUNK_ELEMENTS`.
        words: this rank's rows that are words, the first ones; those behind them are padding, without probability in
            either model. None is all.
    Errors:
        ValueError: shapes that do not fit together.
    """
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    own = tuple(part.shape[0] for part in (labels, token_weights, teacher[0]))
    width = vocabulary
    if isinstance(teacher, HiddenTeacher):
        width = teacher.weight.shape[0]
    elif isinstance(teacher, TeacherLogits):
        width = teacher.logits.shape[1]
    if hidden.dim() != 2 or own != (tokens,) * 3 or width != vocabulary:
        raise ValueError(
            f"distillation_loss: {tokens} tokens and {vocabulary} words of the student; {own} labels, weights and "
            f"tokens of the teacher, and {width} words"
        )
    if objective.reverse and isinstance(teacher, TopLogits):
        raise ValueError("distillation_loss: the reverse divergence needs all of the teacher's logits")
    if chunk_tokens is None:
        chunk_tokens = tokens_of_a_chunk(weight)
    words = vocabulary if words is None else words
    total, kl, lm = _DistillationLoss.apply(
        hidden,
        weight,
        teacher,
        labels,
        token_weights,
        objective,
        group,
        words,
        chunk_tokens,
        torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad),
    )
    return DistillationLoss(total, kl, lm)


class _DistillationLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, teacher, labels, token_weights, objective, group, words, chunk_tokens, differentiate
    ):
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        token_weights = token_weights.to(wide)
        dhidden = torch.empty_like(hidden) if differentiate and hidden.requires_grad else None
        dweight = zeros_of(hidden, weight, wide) if differentiate and weight.requires_grad else None
        kl, lm = (torch.empty(hidden.shape[0], dtype=wide, device=hidden.device) for _ in range(2))
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits = mask_padding(matmul(hidden[rows], weight), words)  # [t, v]
            theirs = logits_of(teacher, rows, objective, group, words)
            chunk = _Chunk(logits, theirs, labels[rows], objective, group)
            kl[rows], lm[rows] = chunk.measure()  # [t]
            dlogits = chunk.gradient(token_weights[rows]) if differentiate else None
            if dhidden is not None:
                dhidden[rows] = matmul(dlogits, weight.t())  # [t, h]
            if dweight is not None:
                add_matmul(dweight, dlogits, hidden[rows])  # [v, h]
            del logits, theirs, chunk, dlogits  # before the next chunk's are made
        ctx.dhidden, ctx.dweight = dhidden, dweight
        ctx.weight = weight if dweight is not None else None
        ctx.mark_non_differentiable(kl, lm)
        scale = objective.temperature**2 * objective.kl_weight
        return (token_weights * (scale * kl + objective.lm_weight * lm)).sum(), kl, lm

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal, *_):
        dhidden, dweight, weight = ctx.dhidden, ctx.dweight, ctx.weight
        ctx.dhidden = ctx.dweight = ctx.weight = None  # scaled in place
        if dhidden is not None:
            dhidden.mul_(dtotal)
        if dweight is not None:
            dweight.mul_(dtotal)
            dweight = passed_on(weight, dweight)
        return dhidden, dweight, *(None,) * 8


class _Chunk:
    """The logits of a few tokens: what they lose, and then the gradient in the student's logits' place.

    Args:
        logits: [tokens, vocabulary of this rank] of the student; used up.
        teacher: the same of the teacher, used up; or its largest as `TopLogits`.
    """

    def __init__(
        self,
        logits: Tensor,
        teacher: Tensor | TopLogits,
        labels: Tensor,
        objective: Objective,
        group: torch.distributed.ProcessGroup | None,
    ) -> None:
        self.student, self.objective, self.group = logits, objective, group
        self.wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        self.dense = None if isinstance(teacher, TopLogits) else teacher
        self.label, self.label_here = self._local(labels.unsqueeze(1))  # [t, 1]
        if isinstance(teacher, TopLogits):
            self.ids, self.ids_here = self._local(teacher.ids)  # [t, k]
            self.log_top = torch.log_softmax(teacher.logits.to(self.wide) / objective.temperature, dim=1)  # [t, k]
        # exp(logit - largest) may stand in the logits' memory, where that loses no digits and nobody needs the logits
        one_softmax = objective.temperature == 1 or objective.lm_weight == 0
        self.in_place = logits.dtype == self.wide and one_softmax and not objective.reverse

    def measure(self) -> tuple[Tensor, Tensor]:
        """Return divergence and cross entropy of each token, [tokens]."""
        inverse = 1 / self.objective.temperature
        models = [self.student] if self.dense is None else [self.student, self.dense]  # [t, v]
        largest = torch.stack([torch.cat([model[rows].amax(1) for rows in self._blocks()]) for model in models])
        self.largest = largest = self._reduced(largest.to(self.wide), torch.distributed.ReduceOp.MAX)
        label = self.student.gather(1, self.label).to(self.wide).masked_fill_(~self.label_here, 0).squeeze(1)
        if self.dense is None:
            at_top = self.student.gather(1, self.ids).to(self.wide).sub_(largest[0].unsqueeze(1)).mul_(inverse)
            top = self.log_top.exp().masked_fill_(~self.ids_here, 0)
            crossed = (top * at_top).sum(1)  # [t]
        else:
            crossed = torch.empty_like(label)
        # sums of exp(logit - largest): Z_q of the student at the temperature, Z_r of it at 1, Z_p of the teacher
        sums = largest.new_zeros(3, label.shape[0])  # [3, t]
        for rows in self._blocks():
            student = self._shifted(self.student, rows, largest[0])
            if inverse != 1:
                sums[1, rows] = student.exp().sum(1)
                student.mul_(inverse)
            if self.dense is None:
                sums[0, rows] = student.exp_().sum(1)
            else:
                teacher = self._shifted(self.dense, rows, largest[1]).mul_(inverse)
                gap = student - teacher if self.objective.reverse else teacher - student
                student.exp_()
                teacher.exp_()
                sums[0, rows], sums[2, rows] = student.sum(1), teacher.sum(1)
                crossed[rows] = gap.mul_(student if self.objective.reverse else teacher).sum(1)
                if self.in_place:
                    self.dense[rows] = teacher
            if self.in_place:
                self.student[rows] = student
        if inverse == 1:
            sums[1] = sums[0]
        *self.sums, crossed, label = self._reduced(torch.stack([*sums, crossed, label]), torch.distributed.ReduceOp.SUM)
        ours, at_one, theirs = self.sums
        # Of logits x, y less their largest, over T: KL(p || q) = sum_w exp(y_w) (y_w - x_w) / Z_p + log Z_q - log Z_p
        if self.dense is None:
            kl = (self.log_top.exp() * self.log_top).sum(1) - crossed + ours.log()
        elif self.objective.reverse:
            kl = crossed / ours + theirs.log() - ours.log()
        else:
            kl = crossed / theirs + ours.log() - theirs.log()
        self.kl, self.lm = kl, at_one.log() + largest[0] - label
        return kl, self.lm

    def gradient(self, token_weights: Tensor) -> Tensor:
        """Return the gradient of the weighted sum wrt the student's logits, in their memory; after `measure`."""
        objective = self.objective
        inverse = 1 / objective.temperature
        kl_scale = token_weights * objective.kl_weight * objective.temperature
        lm_scale = token_weights * objective.lm_weight
        ours, at_one, theirs = self.sums
        for rows in self._blocks():
            student = self.student[rows] if self.in_place else self._shifted(self.student, rows, self.largest[0])
            at_one_part = None
            if inverse != 1 and objective.lm_weight:
                at_one_part = student.exp().mul_((lm_scale / at_one)[rows].unsqueeze(1))
            if objective.reverse:
                teacher = self._shifted(self.dense, rows, self.largest[1])
                # log q - log p - KL
                gap = (student - teacher).mul_(inverse)
                gap.add_((theirs.log() - ours.log() - self.kl)[rows].unsqueeze(1))
                student.mul_(inverse).exp_()
                factor = gap.mul_((kl_scale / ours)[rows].unsqueeze(1))  # [t, v]
                if inverse == 1 and objective.lm_weight:
                    factor.add_((lm_scale / ours)[rows].unsqueeze(1))
                student.mul_(factor)
            else:
                if not self.in_place:
                    student.mul_(inverse).exp_()
                own_scale = kl_scale + lm_scale if inverse == 1 else kl_scale
                student.mul_((own_scale / ours)[rows].unsqueeze(1))
                if self.dense is not None:
                    teacher = self.dense[rows]
                    if not self.in_place:
                        teacher = self._shifted(self.dense, rows, self.largest[1]).mul_(inverse).exp_()
                    student.addcmul_(teacher, (kl_scale / theirs)[rows].unsqueeze(1), value=-1)
            if at_one_part is not None:
                student.add_(at_one_part)
            self._subtract_targets(student, rows, kl_scale, lm_scale)
            if not self.in_place:
                self.student[rows] = student
        return self.student

    def _subtract_targets(self, gradient: Tensor, rows: slice, kl_scale: Tensor, lm_scale: Tensor) -> None:
        """Subtract the targets that are single words: the label, and the teacher's largest."""
        if self.objective.lm_weight:
            gradient.scatter_add_(
                1, self.label[rows], -(lm_scale[rows].unsqueeze(1) * self.label_here[rows]).to(gradient.dtype)
            )
        if self.dense is None:
            wanted = self.log_top[rows].exp() * kl_scale[rows].unsqueeze(1) * self.ids_here[rows]
            gradient.scatter_add_(1, self.ids[rows], -wanted)

    def _blocks(self) -> Iterator[slice]:
        step = max(1, BLOCK_ELEMENTS["cuda" if self.student.is_cuda else "cpu"] // self.student.shape[1])
        return (slice(i, i + step) for i in range(0, self.student.shape[0], step))

    def _shifted(self, logits: Tensor, rows: slice, largest: Tensor) -> Tensor:
        """Return logit - largest of some rows, in a wide copy."""
        return logits[rows].to(self.wide) - largest[rows].unsqueeze(1)

    def _local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the indices of words in this rank's part of the vocabulary, and whether they are there."""
        width = self.student.shape[1]
        local = ids - (0 if self.group is None else self.group.rank() * width)
        return local.clamp(0, width - 1), (local >= 0) & (local < width)

    def _reduced(self, values: Tensor, op: torch.distributed.ReduceOp) -> Tensor:
        return all_reduce(values, op, self.group)


def all_reduce(values: Tensor, op: torch.distributed.ReduceOp, group: torch.distributed.ProcessGroup | None) -> Tensor:
    """Reduce over the ranks that hold the vocabulary, in place."""
    if group is not None and group.size() > 1:
        torch.distributed.all_reduce(values, op, group=group)
    return values


def logits_of(
    teacher: HiddenTeacher | TeacherLogits | TopLogits,
    rows: slice,
    objective: Objective,
    group: torch.distributed.ProcessGroup | None,
    words: int,
) -> Tensor | TopLogits:
    """Return the teacher's side of some tokens, truncated to its largest where the objective says so.

    Args:
        words: see `distillation_loss`.
    """
    if isinstance(teacher, TopLogits):
        kept = teacher.logits.shape[1] if objective.top_k is None else objective.top_k
        return TopLogits(teacher.logits[rows, :kept], teacher.ids[rows, :kept])
    if isinstance(teacher, TeacherLogits):
        logits = teacher.logits[rows].clone()
    else:
        logits = matmul(teacher.hidden[rows], teacher.weight)
    mask_padding(logits, words)
    return logits if objective.top_k is None else top_logits(logits, objective.top_k, group)


def top_logits(logits: Tensor, k: int, group: torch.distributed.ProcessGroup | None = None) -> TopLogits:
    """Return the k largest of each row, in falling order, over a vocabulary that may be split over ranks.

    Args:
        logits: [tokens, vocabulary of this rank].
        k: how many; the whole vocabulary where that is smaller.
        group: as in `distillation_loss`.
    """
    size = 1 if group is None else group.size()
    width = logits.shape[1]
    values, ids = logits.topk(min(k, width), dim=1)
    if size == 1:
        return TopLogits(values, ids)
    all_values = values.new_zeros(size, *values.shape, dtype=torch.float32)  # [ranks, t, k]
    all_ids = ids.new_zeros(size, *ids.shape)
    all_values[group.rank()], all_ids[group.rank()] = values.float(), ids + group.rank() * width
    for part in (all_values, all_ids):  # a sum with zeros gathers
        all_reduce(part, torch.distributed.ReduceOp.SUM, group)
    values, ids = (part.transpose(0, 1).flatten(1) for part in (all_values, all_ids))  # [t, ranks * k]
    values, order = values.topk(min(k, values.shape[1]), dim=1)
    return TopLogits(values.to(logits.dtype), ids.gather(1, order))
