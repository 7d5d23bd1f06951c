"""SwiGLU at run time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_h.architecture.blocks.swiglu import SwiGLU
from nemotron_h.model import init
from nemotron_h.model.blocks.cpu_step import Residual
from nemotron_h.model.blocks.ffn import RunningFFN
from nemotron_h.model.blocks.running import InitialWeights, Masks, Parts, Rotary, Step, Watch
from nemotron_h.ops.select import Ops

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec


@dataclass
class SwiGLUWeights:
    """A SwiGLU FFN; the rows of `up` are those of the gate, and then those of up."""

    norm: Tensor
    up: Tensor
    down: Tensor


class RunningSwiGLU(RunningFFN):
    """A SwiGLU FFN."""

    kind = SwiGLU
    Weights = SwiGLUWeights
    block: SwiGLU

    def layer_spec(self, parts: Parts) -> ModuleSpec:
        """Return Megatron's MLP layer, gated."""
        from nemotron_h.model.megatron_layers import SwiGLULayer

        spec = super().layer_spec(parts)
        spec.module = SwiGLULayer
        return spec

    def prepare_layer(self, layer: Any, config: Any) -> None:
        """Set multipliers and recomputation."""
        layer.mlp.scales = self.block.scales
        layer.mlp.recomputes = config.recompute_swiglu == "activation"

    def initialize(self, layer: Any, name: str, weights: InitialWeights) -> None:
        """Set gate, up and down, all of one deviation, as Hugging Face's `falcon_h1`: the multipliers do the rest."""
        up, down = layer.mlp.linear_fc1.weight, layer.mlp.linear_fc2.weight
        halves = [len(up) // 2] * 2
        init.fill(up, f"{name}.linear_fc1", weights.weight, axis=0, sections=halves, **weights.shard)
        init.fill(down, f"{name}.linear_fc2", weights.weight, axis=1, **weights.shard)

    def loaded(self, weights: SwiGLUWeights) -> SwiGLUWeights:
        """Return the weights with both multipliers in them."""
        weights.up[: self.block.ffn_hidden_size] *= self.block.scales.ffn_gate
        weights.down *= self.block.scales.ffn_down
        return weights

    def _run(self, w: SwiGLUWeights, h: Tensor) -> Tensor:
        gate, up = F.linear(h, w.up).chunk(2, dim=-1)
        return F.linear(F.silu(gate).mul_(up), w.down)

    def cpu_buffers(self, batch: int, dtype: torch.dtype) -> Tensor:
        """Return the buffer of gate and up."""
        return torch.empty(batch, 2 * self.block.ffn_hidden_size, dtype=dtype)

    def cpu_step(self, buffers: Tensor, residual: Residual, w: SwiGLUWeights, h: Tensor, state: None, at: Step) -> None:
        """Add the output to the residual stream."""
        gate, up = residual.matmul(h, w.up, buffers).chunk(2, dim=-1)
        residual.values.addmm_(F.silu(gate, inplace=True).mul_(up), w.down.t())

    def whole(
        self, ops: Ops, w: SwiGLUWeights, h: Tensor, rotary: Rotary | None, watch: Watch | None, masks: Masks
    ) -> Tensor:
        """Return the output; the neurons are watched after the gate."""
        gate, up = F.linear(h, w.up).chunk(2, dim=-1)
        inner = F.silu(gate) * up
        if watch:
            watch("neurons", inner)
        mask = masks.get("neurons")
        return F.linear(inner if mask is None else inner * mask, w.down)
