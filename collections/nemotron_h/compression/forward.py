"""A forward pass over whole windows, one layer at a time, that can be watched and masked.

Importance watches it; the gate of a slice masks it, so that the parent computes what its child should. Generation's
forward (`inference/model.py`) keeps states and is written apart from this; tests hold the two, and the training model,
to each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_h.inference.model import AttentionWeights, GenerationModel, LayerWeights, MambaWeights
from nemotron_h.ops.select import select_ops

#: told of the name and the values [rows, length, channels] of what a layer computes: `norm` of every layer, `neurons`
#: of an FFN (after the activation), `x` of a Mamba-2 layer (x's part of the input projection)
Watch = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class Mask:
    """What of a layer's inner channels stays: 1 or 0 per channel, in the activations' dtype; None is all.

    Attributes:
        neurons: of an FFN.
        inner: of a Mamba-2 mixer, heads x head_dim.
    """

    neurons: Tensor | None = None
    inner: Tensor | None = None


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
        """The residual stream before the first layer, [rows, length, hidden] of int64 [rows, length]."""
        rows = F.embedding(tokens.to(self.model.device), self.model.embedding).to(self.device)
        return rows if self.hidden is None else rows * self.hidden

    def weights(self, index: int) -> LayerWeights:
        """A layer's weights on the device."""
        weights = self.model.layers[index]
        if weights.norm.device == self.device:
            return weights
        return type(weights)(*(getattr(weights, f.name).to(self.device, non_blocking=True) for f in fields(weights)))

    def layer(self, w: LayerWeights, x: Tensor, watch: Watch | None = None, mask: Mask | None = None) -> Tensor:
        """What a layer adds to the residual stream `x` [rows, length, hidden]."""
        mask = mask or Mask()
        h = self.norm(x, w.norm)
        if watch:
            watch("norm", h)
        if isinstance(w, MambaWeights):
            out = self._mamba(h, w, watch, mask.inner)
        elif isinstance(w, AttentionWeights):
            out = self._attention(h, w)
        else:
            inner = F.relu(F.linear(h, w.up)).square()
            if watch:
                watch("neurons", inner)
            out = F.linear(inner if mask.neurons is None else inner * mask.neurons, w.down)
        return out if self.hidden is None else out * self.hidden

    def final(self, x: Tensor) -> Tensor:
        """The activations before the output matrix, of the residual stream after the last layer."""
        return self.norm(x, self.model.final_norm.to(self.device))

    def logits(self, x: Tensor) -> Tensor:
        """Of the next token, [..., vocabulary], of the residual stream after the last layer."""
        return F.linear(self.final(x), self.model.output.to(self.device))

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm; under a mask the mean goes over the channels that stay."""
        if self.hidden is None:
            return F.rms_norm(x, weight.shape, weight, self.definition.norm_epsilon)
        wide = x.to(_wide(x))
        mean = wide.square().sum(-1, keepdim=True) / self.hidden.sum()
        return (wide * (mean + self.definition.norm_epsilon).rsqrt() * weight).to(x.dtype) * self.hidden

    def _mamba(self, h: Tensor, w: MambaWeights, watch: Watch | None, mask: Tensor | None) -> Tensor:
        d = self.definition
        z, xbc, dt = F.linear(h, w.in_proj).split([d.d_inner, d.conv_channels, d.mamba_num_heads], dim=-1)
        if watch:
            watch("x", xbc[..., : d.d_inner])
        width = d.mamba_num_groups * d.mamba_state_dim
        x, b, c = self.ops.conv1d(xbc, w.conv_weight, w.conv_bias).split([d.d_inner, width, width], dim=-1)
        x = x.unflatten(-1, (d.mamba_num_heads, d.mamba_head_dim))
        b, c = (part.unflatten(-1, (d.mamba_num_groups, d.mamba_state_dim)) for part in (b, c))
        y = self.ops.ssd(x, dt, w.A, b, c, D=w.D, dt_bias=w.dt_bias).flatten(-2)
        if mask is None:
            size = d.d_inner // d.mamba_num_groups
            normed = self.ops.gated_rms_norm(y, z, w.gated_norm, group_size=size, eps=d.norm_epsilon)
            return F.linear(normed, w.out_proj)
        gated = (y.to(_wide(y)) * F.silu(z.to(_wide(y))) * mask).unflatten(-1, (d.mamba_num_groups, -1))
        kept = mask.to(gated.dtype).unflatten(-1, (d.mamba_num_groups, -1)).sum(-1, keepdim=True)
        mean = gated.square().sum(-1, keepdim=True) / kept
        normed = (gated * (mean + d.norm_epsilon).rsqrt()).flatten(-2) * w.gated_norm
        return F.linear(normed.to(h.dtype), w.out_proj)

    def _attention(self, h: Tensor, w: AttentionWeights) -> Tensor:
        # positions count from the window's start; the layout of queries, keys and values is the model's own
        rotary = self.model.rotary(torch.arange(h.shape[1], device=self.device))
        q, k, v = self.model.split_qkv(F.linear(h, w.qkv), rotary)
        out = F.scaled_dot_product_attention(
            q.flatten(2, 3).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        )
        return F.linear(out.transpose(1, 2).flatten(2), w.proj)


def _wide(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32
