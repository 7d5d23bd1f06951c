"""Attention beside Mamba-2 at run time: the two kinds' own code over one norm, one set of weights and one state.

Axes: b batch, l tokens, h hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nemotron_h.architecture.blocks.block import Block
from nemotron_h.architecture.blocks.parallel import Parallel
from nemotron_h.model import init
from nemotron_h.model.blocks.attention import KeyValueCache, RunningAttention
from nemotron_h.model.blocks.cpu_step import Residual
from nemotron_h.model.blocks.mamba import MambaState, MambaWeights, MambaWindow, RunningMamba
from nemotron_h.model.blocks.running import (
    InitialWeights,
    Masks,
    Parts,
    Rotary,
    Running,
    Step,
    Surroundings,
    Trial,
    Watch,
)
from nemotron_h.ops.select import Ops

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec


@dataclass
class ParallelWeights(MambaWeights):
    """Weights of the norm, the mixer, and the attention (as `AttentionWeights`)."""

    qkv: Tensor
    proj: Tensor


@dataclass
class ParallelState(MambaState, KeyValueCache):
    """The mixer's state and the attention's cache: tensors of both, by their names."""


class _MixerOfParallel(RunningMamba):
    Weights = ParallelWeights


class RunningParallel(Running):
    """Attention beside Mamba-2."""

    kind = Parallel
    Weights = ParallelWeights
    exact = RunningMamba.exact
    block: Parallel

    def __init__(self, block: Block, epsilon: float) -> None:
        super().__init__(block, epsilon)
        self.mamba = _MixerOfParallel(self.block.mamba, epsilon)
        self.attention = RunningAttention(self.block.attention, epsilon)

    def layer_spec(self, parts: Parts) -> ModuleSpec:
        """Return our layer of Megatron's attention and our mixer, whose projections take what one norm gives."""
        from megatron.core.transformer.spec_utils import ModuleSpec

        from nemotron_h.model.megatron_layers import ParallelLayer, ParallelSubmodules, ScaledKeyAttention

        parts = parts.unfused()
        mixer = self.mamba.layer_spec(parts).submodules.mixer
        attention = self.attention.layer_spec(parts).submodules.self_attention
        attention.module = ScaledKeyAttention
        return ModuleSpec(module=ParallelLayer, submodules=ParallelSubmodules(parts.norm, mixer, attention))

    def prepare_layer(self, layer: Any, config: Any) -> None:
        """Set the multipliers, and how tensor-parallel ranks sum."""
        scales = self.block.scales
        layer.scales, layer.self_attention.key_scale = scales, scales.key
        if set(scales.in_proj) != {1.0}:
            layer.mixer.in_proj_scales = scales.in_proj
        # an adapter adds to a sum over the ranks, not to one rank's part
        adapted = config.adapter is not None and {"out_proj", "linear_proj"} & set(config.adapter.targets)
        if config.tensor_model_parallel_size > 1 and not adapted:
            layer.reduce_once()

    def initialize(self, layer: Any, name: str, weights: InitialWeights) -> None:
        """Set both branches, their matrices of one deviation, as Hugging Face's `falcon_h1`: the multipliers do the
        rest. Step sizes and decays are Mamba-2's.
        """
        attention = layer.self_attention
        layer.mixer.initialize(f"{name}.mixer", weights.shard["seed"], layer.mixer.config.init_method_std)
        init.fill(attention.linear_qkv.weight, f"{name}.linear_qkv", weights.weight, axis=0, **weights.shard)
        init.fill(attention.linear_proj.weight, f"{name}.linear_proj", weights.weight, axis=1, **weights.shard)

    def forward(self, layer: Any, hidden: Tensor, around: Surroundings) -> Tensor:
        """Return the layer's output [l, b, h]."""
        return layer(hidden, around.documents, around.seq_idx, around.rotary)

    def weights(self, tensors: list[Tensor]) -> ParallelWeights:
        """Return the layer's weights, of its tensors in the order of `Block.tensors`."""
        return self.mamba.weights(tensors)

    def loaded(self, weights: ParallelWeights) -> ParallelWeights:
        """Return the mixer's as `RunningMamba`, and all multipliers in the weights."""
        block, scales = self.block, self.block.scales
        self.mamba.loaded(weights)
        # not by `split`, whose views autograd lets nothing change in place: compression trains a layer on its own
        sections = block.mamba.in_proj_sections
        for start, rows, scale in zip(accumulate(sections, initial=0), sections, scales.in_proj, strict=False):
            weights.in_proj.narrow(0, start, rows).mul_(scale)
        weights.out_proj *= scales.ssm_out
        weights.qkv *= scales.attention_in
        # of a group: its queries, its key, its value
        weights.qkv.unflatten(0, (block.num_query_groups, -1, block.head_dim))[:, -2] *= scales.key
        weights.proj *= scales.attention_out
        return weights

    def state(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> ParallelState:
        """Return zeros for both branches."""
        states = (branch.state(batch, capacity, dtype, device) for branch in (self.mamba, self.attention))
        return ParallelState(**{name: tensor for state in states for name, tensor in vars(state).items()})

    def extend(
        self,
        ops: Ops,
        w: ParallelWeights,
        h: Tensor,
        state: ParallelState,
        start: int,
        rotary: Rotary | None,
        last: int,
    ) -> Tensor:
        """Return the outputs of the last tokens."""
        mixed = self.mamba.extend(ops, w, h, state, start, rotary, last)
        return mixed + self.attention.extend(ops, w, h, state, start, rotary, last)

    def step(self, ops: Ops, w: ParallelWeights, h: Tensor, state: ParallelState, at: Step) -> Tensor:
        """Return the output [b, h]."""
        return self.mamba.step(ops, w, h, state, at) + self.attention.step(ops, w, h, state, at)

    def window(self, state: ParallelState, width: int) -> MambaWindow:
        """Return the mixer's: the attention needs none."""
        return self.mamba.window(state, width)

    def try_tokens(
        self, ops: Ops, w: ParallelWeights, h: Tensor, state: ParallelState, window: MambaWindow, at: Trial
    ) -> Tensor:
        """Return the output [b, l, h]."""
        mixed = self.mamba.try_tokens(ops, w, h, state, window, at)
        return mixed + self.attention.try_tokens(ops, w, h, state, None, at)

    def accept(self, ops: Ops, w: ParallelWeights, state: ParallelState, window: MambaWindow, counts: Tensor) -> None:
        """Advance the mixer's state."""
        self.mamba.accept(ops, w, state, window, counts)

    def cpu_buffers(self, batch: int, dtype: torch.dtype) -> tuple[Any, Any]:
        """Return those of both branches."""
        return self.mamba.cpu_buffers(batch, dtype), self.attention.cpu_buffers(batch, dtype)

    def cpu_step(
        self,
        buffers: tuple[Any, Any],
        residual: Residual,
        w: ParallelWeights,
        h: Tensor,
        state: ParallelState,
        at: Step,
    ) -> None:
        """Add both outputs to the residual stream."""
        self.mamba.cpu_step(buffers[0], residual, w, h, state, at)
        self.attention.cpu_step(buffers[1], residual, w, h, state, at)

    def keys_and_values(self, w: ParallelWeights, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return the attention's."""
        return self.attention.keys_and_values(w, h)

    def whole(
        self,
        ops: Ops,
        w: ParallelWeights,
        h: Tensor,
        rotary: Rotary | None,
        watch: Watch | None,
        masks: Masks,
    ) -> Tensor:
        """Return the output; watched and masked is the mixer, of which alone channels are removed."""
        mixed = self.mamba.whole(ops, w, h, rotary, watch, masks)
        return mixed + self.attention.whole(ops, w, h, rotary, None, {})
