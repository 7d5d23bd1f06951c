"""The toy block's other part: how it runs, in training, generation and compression."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from gated import Gated
from torch import Tensor

from nemotron_h.model import init
from nemotron_h.model.blocks.cpu_step import Residual
from nemotron_h.model.blocks.running import InitialWeights, Masks, Parts, Rotary, Running, Step, Surroundings, Watch
from nemotron_h.ops.select import Ops

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec


@dataclass
class GatedWeights:
    """The matrices, in the order of `Gated.tensors`."""

    norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


class RunningGated(Running):
    """A gated linear layer."""

    kind = Gated
    Weights = GatedWeights

    def layer_spec(self, parts: Parts) -> ModuleSpec:
        """Return a layer of Megatron's parallel linear layers."""
        from megatron.core.transformer.module import MegatronModule
        from megatron.core.transformer.spec_utils import ModuleSpec, build_module

        class GatedLayer(MegatronModule):
            def __init__(self, config: Any, submodules: Parts, layer_number: int, pg_collection: Any) -> None:
                super().__init__(config)
                self.layer_number = layer_number
                self.norm = submodules.norm(config, config.hidden_size, config.layernorm_epsilon)
                options = {"config": config, "bias": False, "skip_bias_add": True, "is_expert": False}
                options |= {"init_method": config.init_method, "tp_group": pg_collection.tp}
                for name in ("gate_proj", "up_proj"):
                    size = (config.hidden_size, config.ffn_hidden_size)
                    setattr(self, name, build_module(submodules.column, *size, gather_output=False, **options))
                size = (config.ffn_hidden_size, config.hidden_size)
                self.down_proj = build_module(submodules.row, *size, input_is_parallel=True, **options)

            def forward(self, hidden: Tensor) -> Tensor:
                h = self.norm(hidden)
                gate, up = self.gate_proj(h)[0], self.up_proj(h)[0]
                return hidden + self.down_proj(gate.sigmoid() * up)[0]

        return ModuleSpec(module=GatedLayer, submodules=parts)

    def initialize(self, layer: Any, name: str, weights: InitialWeights) -> None:
        """Set gate, up and down."""
        for part in ("gate_proj", "up_proj"):
            init.fill(getattr(layer, part).weight, f"{name}.{part}", weights.weight, axis=0, **weights.shard)
        init.fill(layer.down_proj.weight, f"{name}.down_proj", weights.residual, axis=1, **weights.shard)

    def forward(self, layer: Any, hidden: Tensor, around: Surroundings) -> Tensor:
        """Return the layer's output [l, b, h]."""
        return layer(hidden)

    def extend(
        self, ops: Ops, w: GatedWeights, h: Tensor, state: None, start: int, rotary: Rotary | None, last: int
    ) -> Tensor:
        """Return the outputs of the last tokens."""
        return self.whole(ops, w, h[:, -last:], rotary, None, {})

    def step(self, ops: Ops, w: GatedWeights, h: Tensor, state: None, at: Step) -> Tensor:
        """Return the output [b, h]."""
        return self.whole(ops, w, h, None, None, {})

    def cpu_buffers(self, batch: int, dtype: torch.dtype) -> None:
        """Return none: a toy allocates."""

    def cpu_step(self, buffers: None, residual: Residual, w: GatedWeights, h: Tensor, state: None, at: Step) -> None:
        """Add the output to the residual stream."""
        residual.values.add_(self.whole(Ops(), w, h * residual.gain, None, None, {}))

    def whole(self, ops: Ops, w: Any, h: Tensor, rotary: Rotary | None, watch: Watch | None, masks: Masks) -> Tensor:
        """Return the output [..., h]; the neurons are watched after the gate."""
        inner = F.linear(h, w.gate).sigmoid() * F.linear(h, w.up)
        if watch:
            watch("neurons", inner)
        mask = masks.get("neurons")
        return F.linear(inner if mask is None else inner * mask, w.down)
