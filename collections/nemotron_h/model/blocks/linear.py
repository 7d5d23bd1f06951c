"""The linear layer at run time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from nemotron_h.architecture.blocks.linear import Linear
from nemotron_h.model import init
from nemotron_h.model.blocks.cpu_step import Residual
from nemotron_h.model.blocks.running import InitialWeights, Masks, Parts, Rotary, Running, Step, Surroundings, Watch
from nemotron_h.ops.select import Ops

if TYPE_CHECKING:
    import torch
    from megatron.core.transformer.spec_utils import ModuleSpec


@dataclass
class LinearWeights:
    """A norm and a matrix [hidden, hidden]."""

    norm: Tensor
    linear: Tensor


class RunningLinear(Running):
    """A linear layer."""

    kind = Linear
    Weights = LinearWeights
    block: Linear

    def layer_spec(self, parts: Parts) -> ModuleSpec:
        """Return our layer of a norm and a matrix that each rank holds whole."""
        from megatron.core.transformer.spec_utils import ModuleSpec

        from nemotron_h.model.megatron_layers import LinearLayer

        return ModuleSpec(module=LinearLayer, submodules=parts.unfused())

    def initialize(self, layer: Any, name: str, weights: InitialWeights) -> None:
        """Set the matrix."""
        init.fill(layer.linear.weight, f"{name}.linear", weights.residual, weights.shard["seed"])

    def forward(self, layer: Any, hidden: Tensor, around: Surroundings) -> Tensor:
        """Return the layer's output [l, b, h]."""
        return layer(hidden)

    def extend(
        self, ops: Ops, w: LinearWeights, h: Tensor, state: None, start: int, rotary: Rotary | None, last: int
    ) -> Tensor:
        """Return the outputs of the last tokens."""
        return F.linear(h[:, -last:], w.linear)

    def step(self, ops: Ops, w: LinearWeights, h: Tensor, state: None, at: Step) -> Tensor:
        """Return the output [b, h]."""
        return F.linear(h, w.linear)

    def cpu_buffers(self, batch: int, dtype: torch.dtype) -> None:
        """Return none: the matmul adds to the residual stream itself."""

    def cpu_step(self, buffers: None, residual: Residual, w: LinearWeights, h: Tensor, state: None, at: Step) -> None:
        """Add the output to the residual stream."""
        residual.values.addmm_(h, w.linear.t(), alpha=residual.gain)

    def whole(
        self, ops: Ops, w: LinearWeights, h: Tensor, rotary: Rotary | None, watch: Watch | None, masks: Masks
    ) -> Tensor:
        """Return the output."""
        return F.linear(h, w.linear)
