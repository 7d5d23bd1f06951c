"""A forward pass over whole windows, one layer at a time, that can be watched and masked.

Importance watches it; the gate of a slice masks it, so that the parent computes what its child should. Each layer is
`Running.whole`, beside its generation with states; tests hold the two, and the training model, to each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_h.architecture.blocks.block import Block
from nemotron_h.inference.model import GenerationModel
from nemotron_h.model.blocks.running import Masks, Rotary, Running, Watch
from nemotron_h.ops.select import select_ops


class Forward:
    """The layers of a model over windows of tokens that start from empty states.

    Args:
        model: its weights, which may be in host memory; a layer's are copied to `device` when it runs.
        hidden: 1 or 0 per channel of the residual stream, for a masked parent; None is all.
        device: where to compute; None is where the weights are.
    """

    def __init__(self, model: GenerationModel, hidden: Tensor | None = None, device: str | None = None) -> None:
        self.model, self.definition = model, model.definition
        self.device = torch.device(device) if device else model.device
        self.hidden = None if hidden is None else hidden.to(self.device)
        self.ops = select_ops(self.device)

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the residual stream before the first layer, [rows, length, hidden] of int64 [rows, length]."""
        rows = F.embedding(tokens.to(self.model.device), self.model.embedding).to(self.device)
        return rows if self.hidden is None else rows * self.hidden

    def weights(self, number: int) -> Any:
        """Return a layer's weights on the device."""
        weights = self.model.layers[number]
        if weights.norm.device == self.device:
            return weights
        return type(weights)(*(getattr(weights, f.name).to(self.device, non_blocking=True) for f in fields(weights)))

    def cast(self, block: Block, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return copies of any layer's weights, as a checkpoint holds them, that run beside the model's layers: in its
        dtype, what is exact in float32 at least. Gradients go back through them.
        """
        dtype, exact = self.model.dtype, torch.promote_types(self.model.dtype, torch.float32)
        rows = zip(block.tensors("", ""), tensors, strict=True)
        return [tensor.to(self.device, exact if row.exact else dtype, copy=True) for row, tensor in rows]

    def layer(self, number: int, w: Any, x: Tensor, watch: Watch | None = None, masks: Masks | None = None) -> Tensor:
        """Return what a layer adds to the residual stream `x` [rows, length, hidden].

        Args:
            w: of `weights`.
            watch: told of `norm` and of what `Running.whole` names.
            masks: of `Running.whole`.
        """
        return self.apply(self.model.running[number], w, x, watch, masks)

    def apply(
        self, running: Running, w: Any, x: Tensor, watch: Watch | None = None, masks: Masks | None = None
    ) -> Tensor:
        """Return what any layer of the model's hidden size adds to the residual stream; as `layer`."""
        h = self.norm(x, w.norm)
        if watch:
            watch("norm", h)
        out = running.whole(self.ops, w, h, self.rotary(h), watch, masks or {})
        return out if self.hidden is None else out * self.hidden

    def rotary(self, h: Tensor) -> Rotary | None:
        """Return cosines and sines of the positions of h [rows, length, hidden]: they count from the window's start."""
        return self.model.rotary(torch.arange(h.shape[1], device=self.device))

    def final(self, x: Tensor) -> Tensor:
        """Return the activations before the output matrix, of the residual stream after the last layer."""
        return self.norm(x, self.model.final_norm.to(self.device))

    def logits(self, x: Tensor) -> Tensor:
        """Return the scores of the next token, [..., vocabulary], of the residual stream after the last layer."""
        return F.linear(self.final(x), self.model.output.to(self.device))

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the RMSNorm; under a mask the mean goes over the channels that stay."""
        if self.hidden is None:
            return F.rms_norm(x, weight.shape, weight, self.definition.norm_epsilon)
        wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        mean = wide.square().sum(-1, keepdim=True) / self.hidden.sum()
        return (wide * (mean + self.definition.norm_epsilon).rsqrt() * weight).to(x.dtype) * self.hidden
