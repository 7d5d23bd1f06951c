"""The FFN at run time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_h.architecture.blocks.ffn import FFN
from nemotron_h.model import init
from nemotron_h.model.blocks.cpu_step import Residual
from nemotron_h.model.blocks.running import InitialWeights, Masks, Parts, Rotary, Running, Step, Surroundings, Watch
from nemotron_h.ops.activation import squared_relu
from nemotron_h.ops.select import Ops

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec


@dataclass
class FFNWeights:
    """A squared-ReLU FFN."""

    norm: Tensor
    up: Tensor
    down: Tensor


class RunningFFN(Running):
    """A squared-ReLU FFN."""

    kind = FFN
    Weights = FFNWeights
    block: FFN

    def layer_spec(self, parts: Parts) -> ModuleSpec:
        """Return Megatron's MLP layer."""
        from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
        from megatron.core.ssm.mlp_layer import MLPLayer
        from megatron.core.transformer.mlp import MLP, MLPSubmodules
        from megatron.core.transformer.spec_utils import ModuleSpec
        from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

        return ModuleSpec(
            module=MLPLayer,
            submodules=TransformerLayerSubmodules(
                mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=parts.column, linear_fc2=parts.row)),
                mlp_bda=get_bias_dropout_add,
                **parts.own_norm("pre_mlp_layernorm"),
            ),
        )

    def prepare_layer(self, layer: Any, config: Any) -> None:
        """Compute the activation again in the backward pass, where that is asked for."""
        if config.recompute_ffn == "activation":
            from nemotron_h.model.megatron_layers import RecomputingMLP

            # megatron-core's layer builds no MLP but its own; the class adds no state
            layer.mlp.__class__ = RecomputingMLP

    def initialize(self, layer: Any, name: str, weights: InitialWeights) -> None:
        """Set up and down."""
        init.fill(layer.mlp.linear_fc1.weight, f"{name}.linear_fc1", weights.weight, axis=0, **weights.shard)
        init.fill(layer.mlp.linear_fc2.weight, f"{name}.linear_fc2", weights.residual, axis=1, **weights.shard)

    def forward(self, layer: Any, hidden: Tensor, around: Surroundings) -> Tensor:
        """Return the layer's output [l, b, h]."""
        return layer(hidden_states=hidden, attention_mask=None)[0]

    def extend(
        self, ops: Ops, w: FFNWeights, h: Tensor, state: None, start: int, rotary: Rotary | None, last: int
    ) -> Tensor:
        """Return the outputs of the last tokens."""
        return self._run(w, h[:, -last:])

    def step(self, ops: Ops, w: FFNWeights, h: Tensor, state: None, at: Step) -> Tensor:
        """Return the output [b, h]."""
        return self._run(w, h)

    def _run(self, w: FFNWeights, h: Tensor) -> Tensor:
        inner = F.linear(h, w.up)
        if inner.is_cuda:
            inner = squared_relu(inner)
        else:
            torch.mul(inner.relu_(), inner, out=inner)
        return F.linear(inner, w.down)

    def cpu_buffers(self, batch: int, dtype: torch.dtype) -> Tensor:
        """Return the buffer of the inner activations."""
        return torch.empty(batch, self.block.ffn_hidden_size, dtype=dtype)

    def cpu_step(self, buffers: Tensor, residual: Residual, w: FFNWeights, h: Tensor, state: None, at: Step) -> None:
        """Add the output to the residual stream."""
        up = residual.matmul(h, w.up, buffers).relu_()
        residual.values.addmm_(torch.mul(up, up, out=up), w.down.t())

    def whole(
        self, ops: Ops, w: FFNWeights, h: Tensor, rotary: Rotary | None, watch: Watch | None, masks: Masks
    ) -> Tensor:
        """Return the output; the neurons are watched after the activation (paper 3.2)."""
        inner = F.relu(F.linear(h, w.up)).square()
        if watch:
            watch("neurons", inner)
        mask = masks.get("neurons")
        return F.linear(inner if mask is None else inner * mask, w.down)
