"""QK-clip: keep the logits of attention under a limit by shrinking queries and keys (Kimi K2, arXiv 2507.20534, 2.1).

Orthogonalized updates let logits grow where AdamW's do not. After a step of the optimizer, for each group of query
heads with the largest logit s of the step's tokens:

    W_q, W_k of the group *= sqrt(min(1, limit / s))

Nothing changes while all logits are under the limit. A group's query heads share their key, so the largest of them
decides for all. The logits are computed once more beside the attention kernels, which keep them to themselves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor, nn

from nemotron_h.architecture.blocks.block import Matrix
from nemotron_h.model.context_parallel import channels
from nemotron_h.model.core_attention import Documents
from nemotron_h.ops.attention_logits import largest_logits


class QkClip:
    """Logits of a rank's attention layers, and what their weights are multiplied with.

    Args:
        attentions: of this rank.
        limit: largest logit that a step leaves alone.
    Attributes:
        largest: of the current step, float32 [groups of this rank] for each of `attentions`; -inf before its first
            micro-batch. Of all data- and context-parallel ranks once `agree` was called.
        matrices: `linear_qkv.weight` -> its number among `attentions`.
    """

    def __init__(self, attentions: list[SelfAttention], limit: float) -> None:
        self.attentions, self.limit = attentions, limit
        self.largest: list[Tensor] = []
        self.matrices = {each.linear_qkv.weight: number for number, each in enumerate(attentions)}
        for number, attention in enumerate(attentions):
            attention.core_attention.watch = self._watch(number)
        self.forget()

    def forget(self) -> None:
        """Begin a forward and backward pass of a step."""
        self.largest = [
            torch.full((each.num_query_groups_per_partition,), -torch.inf, device=each.linear_qkv.weight.device)
            for each in self.attentions
        ]

    def _watch(self, number: int) -> Callable[[Tensor, Tensor, Documents | None], None]:
        attention = self.attentions[number]
        share = attention.core_attention.share
        own = slice(None) if share is None else channels(share.groups, 1)

        def watch(query: Tensor, key: Tensor, documents: Documents | None) -> None:
            # without gradients it is a validation, or a forward pass that the backward pass computes again
            if attention.training and torch.is_grad_enabled():
                of_pass = largest_logits(query, key, None if documents is None else documents.lengths)
                largest = self.largest[number][own]
                torch.maximum(largest, of_pass, out=largest)

        return watch

    def agree(self) -> None:
        """Take the largest of all data- and context-parallel ranks; they all call it."""
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        if dist.get_world_size(group) > 1:
            joined = torch.cat(self.largest)
            dist.all_reduce(joined, op=dist.ReduceOp.MAX, group=group)
            self.largest = list(joined.split([len(each) for each in self.largest]))

    def row_factors(self, weight: nn.Parameter, matrix: Matrix) -> Tensor | None:
        """Return what the rows of an attention's `linear_qkv` are multiplied with, float32; None where with 1.

        Args:
            weight: one of `matrices`.
            matrix: as its block declares it: of each group its queries, its key, its value.
        """
        largest = self.largest[self.matrices[weight]]
        if not bool((largest > self.limit).any()):
            return None
        shrink = (self.limit / largest.clamp(min=self.limit)).sqrt()  # [g]
        queries, key, value = matrix.parts
        rows = [shrink[:, None].expand(-1, queries + key), shrink.new_ones(len(shrink), value)]
        return torch.cat(rows, 1).flatten()


def of_attentions(models: list[nn.Module], limit: float) -> QkClip | None:
    """Watch the attention layers of this rank's parts of the model; None where it has none."""
    attentions = [module for model in models for module in model.modules() if isinstance(module, SelfAttention)]
    return QkClip(attentions, limit) if attentions else None


def largest_logit(clip: QkClip | None) -> float:
    """Return the largest attention logit of the last step, of all ranks, which all call it."""
    largest = torch.full((), -torch.inf, device=torch.cuda.current_device())
    for each in clip.largest if clip is not None else ():
        largest = largest.maximum(each.max())
    if dist.get_world_size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest)
