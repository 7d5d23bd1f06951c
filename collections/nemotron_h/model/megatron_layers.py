"""Megatron's layers as our stack uses them, over the plain operations of `nemotron_h.ops` where there is no GPU.

Axes: s position in a row, b row, h query head, g group of key-value heads, d channel of a head.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP, apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor, nn

from nemotron_h.architecture.multipliers import ONES
from nemotron_h.model.blocks.running import Parts
from nemotron_h.model.core_attention import Documents
from nemotron_h.ops import linear
from nemotron_h.ops.activation import swiglu
from nemotron_h.ops.embedding import lookup
from nemotron_h.ops.norm import rms_norm
from nemotron_h.precision.emulation import fp8_linear


@functools.cache
def has_kernels() -> bool:
    """Tell whether a GPU is visible and Transformer Engine imports."""
    return torch.cuda.is_available() and HAVE_TE


class RMSNorm(nn.Module):
    """RMSNorm over the last axis, float32 inside (`nemotron_h.ops.norm`).

    It marks its weight for the gradient reduction that sequence parallelism needs, which megatron-core's wrapper of
    torch's norm refuses.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        device = torch.device("cpu") if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` [..., hidden_size]; same shape and dtype."""
        return rms_norm(x, self.weight, eps=self.eps)


class CpuMatmul:
    """Mixin that multiplies with `nemotron_h.ops.linear` where that applies and Megatron asks for the matmul alone.

    `fp8_emulation` names the FP8 recipe to emulate instead; the stack sets it in the layers that are not BF16.
    """

    fp8_emulation: str | None = None

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: object, **kwargs: object) -> Tensor:
        if self.fp8_emulation is not None:
            return self._fp8_matmul(input, weight, **kwargs)
        extras = ("gradient_accumulation_fusion", "allreduce_dgrad", "sequence_parallel", "grad_output_buffer")
        plain = not args and all(kwargs[name] is None or kwargs[name] is False for name in extras)
        if plain and linear.takes(input, weight):
            return _biased(linear.linear(input, weight), kwargs["bias"])
        if not weight.requires_grad:
            # torch multiplies each row with a copy of the weight unless its strides say that they follow on each other,
            # which those of a transposed [1, sequence] do not
            input = input.flatten().view(input.shape)
        return super()._forward_impl(input, weight, *args, **kwargs)

    def _fp8_matmul(
        self,
        input: Tensor,
        weight: Tensor,
        *,
        bias: Tensor | None,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        **_: object,
    ) -> Tensor:
        """Quantise what the ranks gathered: its amax is their largest, which Transformer Engine reduces likewise."""
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, group=self.tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=self.tp_group)
        return _biased(fp8_linear(input, weight, self.fp8_emulation), bias)


def _biased(out: Tensor, bias: Tensor | None) -> Tensor:
    return out if bias is None else out + bias


class CpuColumnParallelLinear(CpuMatmul, ColumnParallelLinear):
    """megatron-core's column-parallel layer, faster on the CPU."""


class CpuRowParallelLinear(CpuMatmul, RowParallelLinear):
    """megatron-core's row-parallel layer, faster on the CPU."""


class _DuplicatedLinear(MegatronModule):
    """A linear layer without a bias that every tensor-parallel rank holds whole, over the tokens that it has.

    Attributes:
        sequence_parallel: whether its input is gathered, as of Megatron's parallel layers: it never is.
    """

    sequence_parallel = False

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **_: object) -> None:
        super().__init__(config)
        device = torch.device("cpu") if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # each rank has the gradient of its own tokens

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Return the output [..., output_size] of [..., input_size], and the bias (None)."""
        extras = dict.fromkeys(("bias", "grad_output_buffer"))
        extras |= dict.fromkeys(("gradient_accumulation_fusion", "allreduce_dgrad", "sequence_parallel"), False)
        return self._forward_impl(x, self.weight, **extras), None

    def _forward_impl(self, input: Tensor, weight: Tensor, **_: object) -> Tensor:
        return F.linear(input, weight)


class CpuDuplicatedLinear(CpuMatmul, _DuplicatedLinear):
    """Transformer Engine's linear layer of mode `duplicated`, on the CPU."""


class LinearLayer(MegatronModule):
    """A norm and a matrix, whose output is added to the residual stream.

    Args:
        submodules: `Parts` of our stack, of which `norm` and `duplicated` are taken.
    """

    def __init__(
        self, config: TransformerConfig, submodules: Parts, layer_number: int, pg_collection: ProcessGroupCollection
    ) -> None:
        super().__init__(config)
        self.layer_number, hidden = layer_number, config.hidden_size
        self.input_layernorm = submodules.norm(config=config, hidden_size=hidden, eps=config.layernorm_epsilon)
        bias = {"bias": False, "skip_bias_add": False, "skip_weight_param_allocation": False}
        self.linear = submodules.duplicated(
            hidden, hidden, config=config, init_method=config.init_method, parallel_mode="duplicated", **bias
        )
        # Transformer Engine says of every weight that it is split; Megatron counts gradients of one that is not once
        self.linear.weight.tensor_model_parallel = False

    def forward(self, hidden: Tensor) -> Tensor:
        """Return [sequence, batch, hidden]."""
        return hidden + self.linear(self.input_layernorm(hidden))[0]


class NemotronHMambaLayer(MambaLayer):
    """megatron-core's Mamba layer (norm, mixer, residual) that also hands `seq_idx` to the mixer."""

    def forward(self, hidden_states: Tensor, seq_idx: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Add the mixer's output to the residual stream, [sequence, batch, hidden]."""
        residual = hidden_states
        out = self.mixer(self.norm(hidden_states.to(self.config.params_dtype)), seq_idx=seq_idx)
        add = self.mamba_bda(training=self.training, fused=self.config.bias_dropout_fusion)
        return add(out, residual, self.hidden_dropout)


class RecomputingMLP(MLP):
    """megatron-core's MLP that computes its activation again in the backward pass instead of keeping it."""

    def forward(self, hidden_states: Tensor, per_token_scale: None = None) -> tuple[Tensor, Tensor | None]:
        """Return the output [sequence, batch, hidden], and the output projection's bias (None)."""
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(hidden_states, per_token_scale)
        return _recomputing(self, self.activation_func, hidden_states)


def _recomputing(mlp: MLP, activation: Callable[[Tensor], Tensor], hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """Run an MLP whose backward pass computes its activation again."""
    inner, _ = mlp.linear_fc1(hidden)
    again = CheckpointWithoutOutput(fp8=None)  # the activation has no FP8 state; `False` would be taken as true
    activated = again.checkpoint(activation, inner)
    out, bias = mlp.linear_fc2(activated)
    again.discard_output_and_register_recompute(out)
    return out, bias


class GatedMLP(MLP):
    """megatron-core's gated MLP over the plain SwiGLU, with multipliers; gate and up are one matrix.

    Attributes:
        scales: `ffn_gate` and `ffn_down` are applied; that of the output inside the activation, where it costs nothing.
        recomputes: the backward pass computes the activation again.
    """

    scales = ONES
    recomputes = False

    def activation(self, inner: Tensor) -> Tensor:
        """Return the input of the second matrix [sequence, batch, neurons], of gate and up side by side."""
        return swiglu(inner, self.scales.ffn_gate, self.scales.ffn_down)

    def forward(self, hidden_states: Tensor, per_token_scale: None = None) -> tuple[Tensor, Tensor | None]:
        """Return the output [sequence, batch, hidden], and the output projection's bias (None)."""
        if self.recomputes and self.training and torch.is_grad_enabled():
            return _recomputing(self, self.activation, hidden_states)
        inner, _ = self.linear_fc1(hidden_states)
        return self.linear_fc2(self.activation(inner))

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Return Megatron's distributed-checkpoint layout: gate and up, and what an adapter adds to them, split over
        ranks one by one.
        """
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for key in ("b", "magnitude"):
            name = f"{prefix}linear_fc1.adapter.{key}"
            if name in state:
                state[name] = apply_swiglu_sharded_factory(state[name], sharded_offsets)
        return state


class SwiGLULayer(MLPLayer):
    """megatron-core's MLP layer with a gate, whatever the model's other FFNs have."""

    def __init__(self, config: TransformerConfig, *args: object, **kwargs: object) -> None:
        config = copy.copy(config)
        config.gated_linear_unit, config.activation_func = True, F.silu
        super().__init__(config, *args, **kwargs)
        # megatron-core's layer builds no MLP but its own; the class adds no state
        self.mlp.__class__ = GatedMLP


class ScaledKeyAttention(SelfAttention):
    """megatron-core's attention, its keys times a number before they are rotated."""

    key_scale = 1.0

    def get_query_key_value_tensors(self, *args: object, **kwargs: object) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [s, b, h, d], keys and values [s, b, g, d]."""
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        return query, key if self.key_scale == 1 else key * self.key_scale, value


@dataclass
class ParallelSubmodules:
    """Parts of a `ParallelLayer`."""

    norm: type
    mixer: ModuleSpec
    self_attention: ModuleSpec


class ParallelLayer(MegatronModule):
    """Mixer and attention over one norm; both outputs are added to the residual stream.

    Attributes:
        scales: multipliers of the branches; those inside of them are their own.
        reduce: sums what the branches give over the tensor-parallel ranks; None where each sums its own.
    """

    scales = ONES
    reduce: Callable[[Tensor], Tensor] | None = None

    def __init__(
        self,
        config: TransformerConfig,
        submodules: ParallelSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config)
        self.layer_number = layer_number
        shared = {"config": config, "layer_number": layer_number, "pg_collection": pg_collection}
        self.norm = submodules.norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
        self.mixer = build_module(submodules.mixer, d_model=config.hidden_size, **shared)
        self.self_attention = build_module(submodules.self_attention, **shared)

    def reduce_once(self) -> None:
        """Have one collective of the tensor-parallel ranks sum both branches, in place of one each."""
        for projection in (self.mixer.out_proj, self.self_attention.linear_proj):
            if isinstance(projection, RowParallelLinear):
                projection.explicit_expert_comm = True  # as Megatron's experts: each rank's part of the sum
            else:  # Transformer Engine's, as Megatron builds those of experts
                projection.parallel_mode, projection.tp_size, projection.sequence_parallel = None, 1, False
        self.reduce = (
            reduce_scatter_to_sequence_parallel_region
            if self.config.sequence_parallel
            else reduce_from_tensor_model_parallel_region
        )

    def forward(
        self, hidden: Tensor, documents: Documents | None, seq_idx: Tensor | None, rotary: Tensor | None
    ) -> Tensor:
        """Return [sequence, batch, hidden]; the arguments are those of `Surroundings`."""
        normed = self.norm(hidden)
        mixed, _ = self.mixer(normed, seq_idx=seq_idx)
        if self.scales.attention_in != 1:
            normed = normed * self.scales.attention_in
        attended, _ = self.self_attention(normed, attention_mask=documents, rotary_pos_emb=rotary)
        if self.reduce is None:
            out = torch.add(hidden, mixed, alpha=self.scales.ssm_out)
            return torch.add(out, attended, alpha=self.scales.attention_out)
        branches = torch.add(mixed, attended, alpha=self.scales.attention_out / self.scales.ssm_out)
        return torch.add(hidden, self.reduce(branches), alpha=self.scales.ssm_out)


class AccumulatingEmbedding(VocabParallelEmbedding):
    """megatron-core's embedding, whose gradient goes right into Megatron's gradient buffer. It adds no state."""

    def forward(self, input_: Tensor) -> Tensor:
        """Look up ids, int [batch, sequence]: [batch, sequence, hidden], with sequence parallelism [sequence / ranks,
        batch, hidden].
        """
        ids = input_ - self.vocab_start_index
        outside = (ids < 0) | (ids >= self.num_embeddings_per_partition)  # with one rank none
        rows = lookup(ids.masked_fill(outside, 0), self.weight).masked_fill(outside.unsqueeze(-1), 0)
        if self.reduce_scatter_embeddings:
            rows = rows.transpose(0, 1).contiguous()
            return reduce_scatter_to_sequence_parallel_region(rows, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(rows, group=self.tp_group)
