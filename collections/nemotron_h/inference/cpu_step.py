"""Decode one token of every sequence on the CPU, in as few operations as there can be.

A small model's step is short against what PyTorch takes per operation. So every operation writes into buffers that are
made once per batch, and so are the views of them; matmuls add to the residual stream themselves and scale what a norm
left unscaled.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_h.architecture.definition import MAMBA, ModelDefinition
from nemotron_h.inference.states import KeyValueCache, MambaState, States
from nemotron_h.ops.attention import attention_step, cache_append

if TYPE_CHECKING:
    from nemotron_h.inference.model import GenerationModel, MambaWeights

#: of weights; in others a step has casts between its operations
DTYPES = (torch.float32, torch.float64)


class _Normed:
    """The last dimension of `values`, divided by its length in one operation after the length itself.

    A constant channel behind the others holds what epsilon adds: sqrt(sum of squares + channels * epsilon) is then a
    plain length. The root mean square is that length / sqrt(channels): `gain`, left to the matmul that follows.
    """

    def __init__(self, *shape: int, eps: float, dtype: torch.dtype) -> None:
        self.whole = torch.full((*shape[:-1], shape[-1] + 1), math.sqrt(shape[-1] * eps), dtype=dtype)
        self.values = self.whole[..., :-1]
        self.length = torch.empty(*shape[:-1], 1, dtype=dtype)
        self.result = torch.empty(shape, dtype=dtype)
        self.flat = self.result.flatten(1)
        self.gain = math.sqrt(shape[-1])

    def __call__(self, weight: Tensor) -> Tensor:
        """Return [batch, channels], to be multiplied by `gain`."""
        torch.linalg.vector_norm(self.whole, dim=-1, keepdim=True, out=self.length)
        torch.div(self.values, self.length, out=self.result)
        return self.flat.mul_(weight)


class _Mixer:
    """A Mamba-2 layer between norm and residual stream; `wide` is [batch, groups, channels of a group, ...]."""

    def __init__(self, d: ModelDefinition, batch: int, dtype: torch.dtype) -> None:
        groups, heads, state, size = d.mamba_num_groups, d.mamba_num_heads, d.mamba_state_dim, d.d_inner
        self.wide = batch, groups, size // groups, state

        def buffer(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype)

        self.projected = buffer(batch, d.in_proj_size)
        z, xbc, self.dt = self.projected.split([size, d.conv_channels, heads], dim=-1)
        self.z, self.newest = z.unflatten(-1, (groups, -1)), xbc.unsqueeze(1)
        self.taps = buffer(batch, d.conv_kernel, d.conv_channels)
        self.kept = self.taps[:, 1:]
        self.convolved = buffer(batch, d.conv_channels)
        x, b, c = self.convolved.split([size, groups * state, groups * state], dim=-1)
        self.x = x.unflatten(-1, (heads, -1))
        self.b, self.c = b.unflatten(-1, (groups, 1, -1)), c.unflatten(-1, (groups, 1, -1))
        self.raw, self.decay = buffer(batch, heads), buffer(batch, heads, 1, 1)
        self.decay_by_head = self.decay.view(batch, heads)
        self.u = buffer(batch, heads, d.mamba_head_dim)
        self.u_column = self.u.view(batch, groups, -1, 1)
        self.c_copy = buffer(batch, groups, 1, state)
        self.c_rows = self.c_copy.flatten(0, 1)
        self.y_rows = buffer(batch * groups, 1, size // groups)
        self.y, self.y_by_group = self.y_rows.view_as(self.u), self.y_rows.view(batch, groups, -1)
        self.gated = _Normed(batch, groups, size // groups, eps=d.norm_epsilon, dtype=dtype)

    def __call__(self, w: MambaWeights, state: MambaState) -> Tensor:
        """Return the input of `out_proj`, without the gain of `gated`, from `projected`."""
        torch.cat([state.conv, self.newest], dim=1, out=self.taps)
        state.conv.copy_(self.kept)
        torch.sum(self.taps.mul_(w.conv_weight.t()), dim=1, out=self.convolved).add_(w.conv_bias)
        F.silu(self.convolved, inplace=True)

        dt = F.softplus(torch.add(self.dt, w.dt_bias, out=self.raw))
        torch.mul(dt, w.A, out=self.decay_by_head).exp_()
        torch.mul(self.x, dt.unsqueeze(-1), out=self.u)
        state.ssm.mul_(self.decay)
        wide = state.ssm.view(self.wide).addcmul_(self.u_column, self.b)
        self.c_copy.copy_(self.c)  # rows one after the other, as `bmm` takes them; a row times a matrix is the faster
        torch.bmm(self.c_rows, wide.flatten(0, 1).mT, out=self.y_rows)
        self.y.addcmul_(self.x, w.D.unsqueeze(-1))

        torch.mul(F.silu(self.z), self.y_by_group, out=self.gated.values)
        return self.gated(w.gated_norm)


class CpuStep:
    """A step of a batch, with its buffers.

    Args:
        batch: sequences.
        dtype: of the model, one of `DTYPES`.
    """

    def __init__(self, definition: ModelDefinition, batch: int, dtype: torch.dtype) -> None:
        d = definition
        self.batch = batch
        self.residual = _Normed(batch, d.hidden_size, eps=d.norm_epsilon, dtype=dtype)
        self.mixer = _Mixer(d, batch, dtype) if MAMBA in d.pattern else None
        self.up = torch.empty(batch, d.ffn_hidden_size, dtype=dtype)
        self.qkv = torch.empty(batch, (d.num_attention_heads + 2 * d.num_query_groups) * d.head_dim, dtype=dtype)

    def run(self, model: GenerationModel, tokens: Tensor, states: States) -> Tensor:
        """Read `tokens` (int64 [batch]) into `states`, without counting them.

        Returns:
            hidden states [batch, hidden], a new tensor.
        """
        longest = int(states.lengths.max()) + 1
        ragged = bool((states.lengths != longest - 1).any())
        rotary = model.rotary(states.positions)
        x = self.residual.values
        x.copy_(F.embedding(tokens, model.embedding))
        for weights, state in zip(model.layers, states.layers, strict=True):
            h = self.residual(weights.norm)
            if isinstance(state, MambaState):
                self._product(h, weights.in_proj, self.mixer.projected)
                x.addmm_(self.mixer(weights, state), weights.out_proj.t(), alpha=self.mixer.gated.gain)
            elif isinstance(state, KeyValueCache):
                q, k, v = model.split_qkv(self._product(h, weights.qkv, self.qkv), rotary)
                if ragged:
                    cache_append(state.keys, state.values, k, v, states.positions)
                else:
                    state.keys[:, :, longest - 1].copy_(k)
                    state.values[:, :, longest - 1].copy_(v)
                out = attention_step(q, state.keys, state.values, states.positions + 1, longest, ragged)
                x.addmm_(out, weights.proj.t())
            else:
                up = self._product(h, weights.up, self.up).relu_()
                x.addmm_(torch.mul(up, up, out=up), weights.down.t())
        return x.clone()

    def _product(self, h: Tensor, weight: Tensor, out: Tensor) -> Tensor:
        return torch.addmm(out, h, weight.t(), beta=0, alpha=self.residual.gain, out=out)
