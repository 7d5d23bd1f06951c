"""Attention at run time.

Axes: b batch, l tokens, h hidden, g groups (key-value heads), q heads of a group, d channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_h.architecture.blocks.attention import Attention
from nemotron_h.model import init
from nemotron_h.model.blocks.cpu_step import Residual
from nemotron_h.model.blocks.running import (
    InitialWeights,
    Masks,
    Parts,
    Rotary,
    Running,
    State,
    Step,
    Surroundings,
    Trial,
    Watch,
)
from nemotron_h.ops.attention import attention_chunk, attention_step, cache_append
from nemotron_h.ops.mixing_matrix import Mixing, attention_matrix
from nemotron_h.ops.select import Ops

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec


@dataclass
class AttentionWeights:
    """An attention layer; `qkv` holds, group by group, the group's queries, its key and its value."""

    norm: Tensor
    qkv: Tensor
    proj: Tensor


@dataclass
class BiasedWeights(AttentionWeights):
    """With `qkv_bias`: in the order of the rows of `qkv`."""

    bias: Tensor


@dataclass
class NormedWeights(AttentionWeights):
    """With `qk_norm`: weights [d] of every head's norm."""

    q_norm: Tensor
    k_norm: Tensor


@dataclass
class BiasedNormedWeights(NormedWeights, BiasedWeights):
    """With both; the biases are first."""


#: (qkv_bias, qk_norm) -> weights
WEIGHTS = {
    (False, False): AttentionWeights,
    (True, False): BiasedWeights,
    (False, True): NormedWeights,
    (True, True): BiasedNormedWeights,
}


@dataclass
class KeyValueCache(State):
    """Keys and values of one attention layer, [b, g, capacity, d]; zeros where not yet written."""

    keys: Tensor
    values: Tensor

    def reserve(self, capacity: int) -> None:
        """Make room for sequences of so many tokens. Doubles the room, so that growing is rare."""
        if self.keys.shape[2] >= capacity:
            return
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], max(capacity, 2 * old.shape[2]), old.shape[3])
            new[:, :, : old.shape[2]] = old
            setattr(self, name, new)


class RunningAttention(Running):
    """Grouped-query attention."""

    kind = Attention
    Weights = AttentionWeights
    block: Attention

    def layer_spec(self, parts: Parts) -> ModuleSpec:
        """Return Megatron's transformer layer without its MLP; its biases are those of the configuration."""
        from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
        from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
        from megatron.core.transformer.enums import AttnMaskType
        from megatron.core.transformer.spec_utils import ModuleSpec
        from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

        head_norm = parts.unfused().norm if self.block.qk_norm else None
        return ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                self_attention=ModuleSpec(
                    module=SelfAttention,
                    params={"attn_mask_type": AttnMaskType.causal},
                    submodules=SelfAttentionSubmodules(
                        linear_qkv=parts.column,
                        core_attention=parts.attention,
                        linear_proj=parts.row,
                        q_layernorm=head_norm,
                        k_layernorm=head_norm,
                    ),
                ),
                self_attn_bda=get_bias_dropout_add,
                **parts.own_norm("input_layernorm"),
            ),
        )

    def initialize(self, layer: Any, name: str, weights: InitialWeights) -> None:
        """Set queries with keys and values, and the output projection; Megatron has biases begin at 0, norms at 1."""
        attention = layer.self_attention
        init.fill(attention.linear_qkv.weight, f"{name}.linear_qkv", weights.weight, axis=0, **weights.shard)
        init.fill(attention.linear_proj.weight, f"{name}.linear_proj", weights.residual, axis=1, **weights.shard)

    def forward(self, layer: Any, hidden: Tensor, around: Surroundings) -> Tensor:
        """Return the layer's output [l, b, h]."""
        return layer(hidden_states=hidden, attention_mask=around.documents, rotary_pos_emb=around.rotary)[0]

    def state(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> KeyValueCache:
        """Return an empty cache."""
        shape = (batch, self.block.num_query_groups, capacity, self.block.head_dim)
        # zeros, not empty: a masked position is weighed with 0, and 0 * NaN is NaN
        return KeyValueCache(*(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)))

    def weights(self, tensors: list[Tensor]) -> AttentionWeights:
        """Return the layer's weights, of its tensors in the order of `Block.tensors`."""
        return WEIGHTS[self.block.qkv_bias, self.block.qk_norm](*tensors)

    def split_qkv(self, w: AttentionWeights, qkv: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [..., g, q, d], keys and values [..., g, d] of the projection of a layer's input."""
        block = self.block
        if block.qkv_bias:
            qkv = qkv + w.bias
        per_group = qkv.unflatten(-1, (block.num_query_groups, -1, block.head_dim))
        q_and_k, v = per_group[..., :-1, :], per_group[..., -1, :]
        if block.qk_norm:
            weight = torch.cat([w.q_norm.expand(q_and_k.shape[-2] - 1, -1), w.k_norm[None]])  # [q + 1, d]
            q_and_k = F.rms_norm(q_and_k, (block.head_dim,), eps=self.epsilon) * weight
        if rotary is not None:
            cos, sin = rotary
            half = block.rotary_dim // 2
            a, b, still = q_and_k.split([half, half, block.head_dim - 2 * half], dim=-1)
            q_and_k = torch.cat([a * cos - b * sin, b * cos + a * sin, still], dim=-1)
        return q_and_k[..., :-1, :], q_and_k[..., -1, :], v

    def extend(
        self,
        ops: Ops,
        w: AttentionWeights,
        h: Tensor,
        state: KeyValueCache,
        start: int,
        rotary: Rotary | None,
        last: int,
    ) -> Tensor:
        """Return the outputs of the last tokens."""
        q, k, v = self.split_qkv(w, F.linear(h, w.qkv), rotary)
        end = start + h.shape[1]
        state.keys[:, :, start:end] = k.transpose(1, 2)
        state.values[:, :, start:end] = v.transpose(1, 2)
        return F.linear(attention_chunk(q, state.keys, state.values, start), w.proj)[:, -last:]

    def step(self, ops: Ops, w: AttentionWeights, h: Tensor, state: KeyValueCache, at: Step) -> Tensor:
        """Return the output [b, h]."""
        q, k, v = self.split_qkv(w, F.linear(h, w.qkv), at.rotary)
        ops.cache_append(state.keys, state.values, k.unsqueeze(1), v.unsqueeze(1), at.positions)
        return F.linear(ops.attention_step(q, state.keys, state.values, at.lengths, at.longest, at.ragged), w.proj)

    def window(self, state: KeyValueCache, width: int) -> None:
        """Return none: what lies behind a sequence's position is taken back."""

    def try_tokens(
        self, ops: Ops, w: AttentionWeights, h: Tensor, state: KeyValueCache, window: None, at: Trial
    ) -> Tensor:
        """Return the output [b, l, h]."""
        q, k, v = self.split_qkv(w, F.linear(h, w.qkv), at.rotary)
        ops.cache_append(state.keys, state.values, k, v, at.positions)
        return F.linear(ops.attention_window(q, state.keys, state.values, at.lengths, at.longest), w.proj)

    def cpu_buffers(self, batch: int, dtype: torch.dtype) -> Tensor:
        """Return the buffer of queries, keys and values."""
        return torch.empty(batch, self.block.queries + 2 * self.block.keys, dtype=dtype)

    def cpu_step(
        self, buffers: Tensor, residual: Residual, w: AttentionWeights, h: Tensor, state: KeyValueCache, at: Step
    ) -> None:
        """Add the output to the residual stream."""
        q, k, v = self.split_qkv(w, residual.matmul(h, w.qkv, buffers), at.rotary)
        if at.ragged:
            cache_append(state.keys, state.values, k.unsqueeze(1), v.unsqueeze(1), at.positions)
        else:
            state.keys[:, :, at.longest - 1].copy_(k)
            state.values[:, :, at.longest - 1].copy_(v)
        out = attention_step(q, state.keys, state.values, at.lengths, at.longest, at.ragged)
        residual.values.addmm_(out, w.proj.t())

    def keys_and_values(self, w: AttentionWeights, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values."""
        _, keys, values = self.split_qkv(w, F.linear(h, w.qkv), None)
        return keys, values

    def mixing(self, ops: Ops, w: AttentionWeights, h: Tensor, rotary: Rotary | None) -> Mixing:
        """Return the matrices of the query heads."""
        q, k, _ = self.split_qkv(w, F.linear(h, w.qkv), rotary)
        k = k.unsqueeze(3).expand_as(q)  # [b, l, g, q, d]
        return Mixing(attention_matrix, tuple(each.flatten(2, 3).transpose(1, 2).flatten(0, 1) for each in (q, k)))

    def whole(
        self,
        ops: Ops,
        w: AttentionWeights,
        h: Tensor,
        rotary: Rotary | None,
        watch: Watch | None,
        masks: Masks,
    ) -> Tensor:
        """Return the output; positions count from the window's start."""
        q, k, v = self.split_qkv(w, F.linear(h, w.qkv), rotary)
        out = F.scaled_dot_product_attention(
            q.flatten(2, 3).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        )
        return F.linear(out.transpose(1, 2).flatten(2), w.proj)
