"""Megatron's layers as our stack uses them, over the plain operations of `nemotron_h.ops` where there is no GPU."""

from __future__ import annotations

import torch
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP
from torch import Tensor, nn

from nemotron_h.ops import linear
from nemotron_h.ops.norm import rms_norm
from nemotron_h.precision.emulation import fp8_linear


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
            return self._fp8_product(input, weight, **kwargs)
        extras = ("bias", "gradient_accumulation_fusion", "allreduce_dgrad", "sequence_parallel", "grad_output_buffer")
        plain = not args and all(kwargs[name] is None or kwargs[name] is False for name in extras)
        if plain and linear.takes(input, weight):
            return linear.linear(input, weight)
        if not weight.requires_grad:
            # torch multiplies each row with a copy of the weight unless its strides say that they follow on each other,
            # which those of a transposed [1, sequence] do not
            input = input.flatten().view(input.shape)
        return super()._forward_impl(input, weight, *args, **kwargs)

    def _fp8_product(
        self, input: Tensor, weight: Tensor, *, allreduce_dgrad: bool, sequence_parallel: bool, **_: object
    ) -> Tensor:
        """Quantise what the ranks gathered: its amax is their largest, which Transformer Engine reduces likewise."""
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, group=self.tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=self.tp_group)
        return fp8_linear(input, weight, self.fp8_emulation)


class CpuColumnParallelLinear(CpuMatmul, ColumnParallelLinear):
    """megatron-core's column-parallel layer, faster on the CPU."""


class CpuRowParallelLinear(CpuMatmul, RowParallelLinear):
    """megatron-core's row-parallel layer, faster on the CPU."""


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
        inner, _ = self.linear_fc1(hidden_states)
        again = CheckpointWithoutOutput(fp8=None)  # the activation has no FP8 state; `False` would be taken as true
        activated = again.checkpoint(self.activation_func, inner)
        out, bias = self.linear_fc2(activated)
        again.discard_output_and_register_recompute(out)
        return out, bias
