"""A mixture of experts at run time.

Axes: b batch, l tokens, t tokens of all sequences, k experts of a token, n experts, h hidden, f width of an expert.

With scores s_n = sigmoid(x.g_n), the chosen set K of the k largest s_n + bias_n, and a scaling c (DeepSeek-V3, arXiv
2412.19437, 2.1.2): out = shared(x) + c sum_{n in K} s_n / (sum_{m in K} s_m) expert_n(x)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_h.architecture.blocks.experts import Experts
from nemotron_h.model import init
from nemotron_h.model.blocks.cpu_step import Residual
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

#: megatron-core's, of the sum that scores are divided by
_TINY = 1e-20


@dataclass
class ExpertsWeights:
    """Weights of a mixture of experts.

    Attributes:
        gate, bias: [n, h], [n]; float32 (float64 in a float64 model).
        up, down: of all experts, [n, f, h] and [n, h, f].
    """

    norm: Tensor
    gate: Tensor
    bias: Tensor
    up: Tensor
    down: Tensor
    shared_up: Tensor
    shared_down: Tensor


class RunningExperts(Running):
    """A mixture of experts."""

    kind = Experts
    Weights = ExpertsWeights
    exact = ("gate", "bias")
    block: Experts

    def layer_spec(self, parts: Parts) -> ModuleSpec:
        """Return our layer of megatron-core's mixture; one norm is before router, experts and shared expert."""
        from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
        from megatron.core.transformer.mlp import MLPSubmodules
        from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
        from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
        from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
        from megatron.core.transformer.spec_utils import ModuleSpec
        from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

        from nemotron_h.model.expert_layers import ExpertsLayer

        grouped, parts = parts.grouped, parts.unfused()
        matrices = MLPSubmodules(linear_fc1=parts.column, linear_fc2=parts.row)
        experts = ModuleSpec(module=SequentialMLP, submodules=matrices)
        if grouped is not None:
            pair = MLPSubmodules(linear_fc1=grouped[0], linear_fc2=grouped[1])
            experts = ModuleSpec(module=TEGroupedMLP, submodules=pair)
        shared = ModuleSpec(module=SharedExpertMLP, params={"gate": False}, submodules=matrices)
        return ModuleSpec(
            module=ExpertsLayer,
            submodules=TransformerLayerSubmodules(
                mlp=ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=experts, shared_experts=shared)),
                mlp_bda=get_bias_dropout_add,
                **parts.own_norm("pre_mlp_layernorm"),
            ),
        )

    def prepare_layer(self, layer: Any, config: Any) -> None:
        """Give the router the number that the layer has by now, and the experts the ranks that hold the same ones."""
        layer.mlp.set_layer_number(layer.layer_number)
        if config.tensor_model_parallel_size > 1:
            layer.spread_experts()

    def initialize(self, layer: Any, name: str, weights: InitialWeights) -> None:
        """Set router, experts (each by its number over all ranks) and shared expert; the correction bias stays 0."""
        seed, shared = weights.shard["seed"], layer.mlp.shared_experts
        init.fill(layer.mlp.router.weight, f"{name}.router", weights.weight, seed)
        for number, up, down in layer.expert_weights():
            init.fill(up, f"{name}.experts.{number}.linear_fc1", weights.weight, seed)
            init.fill(down, f"{name}.experts.{number}.linear_fc2", weights.residual, seed)
        first, second = shared.linear_fc1.weight, shared.linear_fc2.weight
        init.fill(first, f"{name}.shared_experts.linear_fc1", weights.weight, axis=0, **weights.shard)
        init.fill(second, f"{name}.shared_experts.linear_fc2", weights.residual, axis=1, **weights.shard)

    def forward(self, layer: Any, hidden: Tensor, around: Surroundings) -> Tensor:
        """Return the layer's output [l, b, h]."""
        layer.mlp.router.loss_count = around.loss_count
        return layer(hidden_states=hidden, attention_mask=None)[0]

    def extend(
        self, ops: Ops, w: ExpertsWeights, h: Tensor, state: None, start: int, rotary: Rotary | None, last: int
    ) -> Tensor:
        """Return the outputs of the last tokens."""
        return self._run(w, h[:, -last:])

    def step(self, ops: Ops, w: ExpertsWeights, h: Tensor, state: None, at: Step) -> Tensor:
        """Return the output [b, h]."""
        return self._run_by_shape(w, h) if h.is_cuda else self._run(w, h)

    def try_tokens(self, ops: Ops, w: ExpertsWeights, h: Tensor, state: None, window: None, at: Trial) -> Tensor:
        """Return the output [b, l, h]; a CUDA graph records it."""
        return self._run_by_shape(w, h.flatten(0, 1)).view(h.shape) if h.is_cuda else self._run(w, h)

    def _run_by_shape(self, w: ExpertsWeights, h: Tensor) -> Tensor:
        """Return the output [t, h] by operations whose shapes do not depend on the choice: a CUDA graph records them.

        The chosen experts' weights are gathered; where these are more than all there are, each expert reads each token.
        """
        experts, scores = self._choice(w, h)
        if experts.numel() <= self.block.num_experts:
            inner = F.relu(torch.einsum("bh,bkfh->bkf", h, w.up[experts])).square()
            inner = (inner * scores.unsqueeze(-1)).to(h.dtype)
            routed = torch.einsum("bkf,bkhf->bh", inner, w.down[experts])
        else:
            weights = scores.new_zeros(len(h), self.block.num_experts).scatter_(1, experts, scores)
            inner = F.relu(torch.matmul(h, w.up.transpose(1, 2))).square()  # [n, b, f]
            inner = (inner * weights.t().unsqueeze(-1)).to(h.dtype)
            routed = torch.matmul(inner, w.down.transpose(1, 2)).sum(dim=0)
        return routed + self._shared(w, h)

    def _choice(self, w: ExpertsWeights, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts of [t, h] and their weights, both [t, k]."""
        scores = F.linear(h.to(w.gate.dtype), w.gate).sigmoid()
        experts = (scores + w.bias).topk(self.block.experts_per_token, dim=1).indices
        chosen = scores.gather(1, experts)
        if self.block.experts_per_token > 1:
            chosen = chosen / (chosen.sum(dim=1, keepdim=True) + _TINY)
        return experts, chosen * self.block.expert_scaling

    def _run(self, w: ExpertsWeights, h: Tensor) -> Tensor:
        """Return the output of [..., h]: each expert reads its tokens at once."""
        rows = h.flatten(0, -2)
        return (self._routed(w, rows) + self._shared(w, rows)).view(h.shape)

    def _routed(
        self,
        w: ExpertsWeights,
        rows: Tensor,
        watch: Callable[[int, Tensor, Tensor, Tensor], None] = lambda *_: None,
    ) -> Tensor:
        """Return the routed experts' output [t, h].

        Args:
            watch: told of each expert that has tokens: number, their places, inner activations and outputs.
        """
        experts, scores = self._choice(w, rows)
        order = experts.flatten().argsort(stable=True)  # of the pairs of a token and an expert, by expert
        tokens, scores = order // experts.shape[1], scores.flatten()[order, None]
        counts = experts.flatten().bincount(minlength=self.block.num_experts).tolist()
        out = torch.zeros_like(rows)
        parts = zip(tokens.split(counts), scores.split(counts), w.up, w.down, strict=True)
        for number, (mine, weights, up, down) in enumerate(parts):
            if len(mine):
                inner = (F.relu(F.linear(rows[mine], up)).square() * weights).to(rows.dtype)
                added = F.linear(inner, down)
                watch(number, mine, inner, added)
                out.index_add_(0, mine, added)
        return out

    def _shared(self, w: ExpertsWeights, h: Tensor) -> Tensor:
        return F.linear(self._shared_inner(w, h), w.shared_down)

    @staticmethod
    def _shared_inner(w: ExpertsWeights, h: Tensor) -> Tensor:
        return F.relu(F.linear(h, w.shared_up)).square()

    def cpu_buffers(self, batch: int, dtype: torch.dtype) -> Tensor:
        """Return the buffer of the normalised stream."""
        return torch.empty(batch, self.block.hidden_size, dtype=dtype)

    def cpu_step(
        self, buffers: Tensor, residual: Residual, w: ExpertsWeights, h: Tensor, state: None, at: Step
    ) -> None:
        """Add the output to the residual stream."""
        residual.values.add_(self._run(w, torch.mul(h, residual.gain, out=buffers)))

    def whole(
        self, ops: Ops, w: ExpertsWeights, h: Tensor, rotary: Rotary | None, watch: Watch | None, masks: Masks
    ) -> Tensor:
        """Return the output [b, l, h].

        What is watched of experts is a mean over all tokens, 0 for those that pass another: the length of what an
        expert adds, and its inner activations weighed by its score.
        """
        w = self._masked(w, masks)
        if watch is None:
            return self._run(w, h)
        rows, length = h.flatten(0, 1), h.shape[1]
        sizes = len(h), self.block.num_experts, self.block.expert_hidden_size
        wide = torch.promote_types(h.dtype, torch.float32)
        neurons, added = h.new_zeros(sizes, dtype=wide), h.new_zeros(sizes[:2], dtype=wide)

        def add(number: int, tokens: Tensor, inner: Tensor, out: Tensor) -> None:
            samples = tokens // length
            neurons[:, number].index_add_(0, samples, inner.to(wide))
            added[:, number].index_add_(0, samples, torch.linalg.vector_norm(out, dim=-1, dtype=wide))

        routed = self._routed(w, rows, add)
        watch("experts", added[:, None] / length)
        watch("expert_neurons", neurons.flatten(1)[:, None] / length)
        shared = self._shared_inner(w, h)
        watch("shared_neurons", shared)
        return routed.view(h.shape) + F.linear(shared, w.shared_down)

    @staticmethod
    def _masked(w: ExpertsWeights, masks: Masks) -> ExpertsWeights:
        """Return weights of which dropped experts are never chosen, and dropped neurons add nothing."""
        if (mask := masks.get("experts")) is not None:
            w = replace(w, bias=w.bias.masked_fill(mask == 0, -torch.inf))
        if (mask := masks.get("expert_neurons")) is not None:
            w = replace(w, down=w.down * mask.view(len(w.down), 1, -1))
        if (mask := masks.get("shared_neurons")) is not None:
            w = replace(w, shared_down=w.shared_down * mask)
        return w
