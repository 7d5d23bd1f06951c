"""The Mamba-2 layer at run time.

Axes: b batch, l tokens, w tokens of a window, h hidden, n heads, p channels of a head, g groups, s state per channel,
k taps of the convolution; inner = n * p.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_h.architecture.blocks.mamba import Mamba
from nemotron_h.model.blocks.cpu_step import Normed, Residual
from nemotron_h.model.blocks.running import (
    InitialWeights,
    Masks,
    Parts,
    Rotary,
    Running,
    State,
    Step,
    Surroundings,
    Trial,
    Watch,
)
from nemotron_h.ops.mixing_matrix import Mixing, ssd_matrix
from nemotron_h.ops.norm import rms_norm_inference
from nemotron_h.ops.select import Ops

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec


@dataclass
class MambaWeights:
    """A Mamba-2 layer. `A` is negative; `A`, `D`, `dt_bias` are float32 (float64 in a float64 model); `gated_norm` is
    empty without `mamba_norm`.
    """

    norm: Tensor
    in_proj: Tensor
    conv_weight: Tensor
    conv_bias: Tensor
    A: Tensor
    D: Tensor
    dt_bias: Tensor
    gated_norm: Tensor
    out_proj: Tensor


@dataclass
class MambaState(State):
    """State of one Mamba-2 layer.

    Attributes:
        conv: [b, conv_kernel - 1, channels], the last inputs of the convolution, in the model's dtype.
        ssm: [b, n, p, s], float32 (float64 for a float64 model).
    """

    conv: Tensor
    ssm: Tensor


@dataclass
class MambaWindow(State):
    """Inputs of the tokens of a window: what the state is advanced by, over those that are accepted.

    Attributes:
        inputs: x with B and C before the convolution, and dt as projected, [b, w, channels + n].
        convolved: x with B and C behind it, [b, w, channels].
    """

    inputs: Tensor
    convolved: Tensor


class RunningMamba(Running):
    """A Mamba-2 mixer."""

    kind = Mamba
    Weights = MambaWeights
    exact = ("A", "D", "dt_bias")
    block: Mamba

    def layer_spec(self, parts: Parts) -> ModuleSpec:
        """Return Megatron's Mamba layer around our mixer."""
        from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
        from megatron.core.ssm.mamba_layer import MambaLayerSubmodules
        from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
        from megatron.core.transformer.spec_utils import ModuleSpec

        from nemotron_h.model.megatron_layers import NemotronHMambaLayer
        from nemotron_h.model.mixer import NemotronHMixer

        return ModuleSpec(
            module=NemotronHMambaLayer,
            submodules=MambaLayerSubmodules(
                mixer=ModuleSpec(
                    module=NemotronHMixer,
                    submodules=MambaMixerSubmodules(in_proj=parts.column, out_proj=parts.row),
                ),
                mamba_bda=get_bias_dropout_add,
                **parts.own_norm("norm"),
            ),
        )

    def initialize(self, layer: Any, name: str, weights: InitialWeights) -> None:
        """Set the mixer's weights."""
        layer.mixer.initialize(f"{name}.mixer", weights.shard["seed"])

    def forward(self, layer: Any, hidden: Tensor, around: Surroundings) -> Tensor:
        """Return the layer's output [l, b, h]."""
        return layer(hidden, seq_idx=around.seq_idx)

    def weights(self, tensors: list[Tensor]) -> MambaWeights:
        """Return the layer's weights, of its tensors in the order of `Block.tensors`."""
        if not self.block.mamba_norm:
            names = [each.name for each in fields(self.Weights)]
            tensors.insert(names.index("gated_norm"), tensors[0].new_empty(0))
        return self.Weights(*tensors)

    def loaded(self, weights: MambaWeights) -> MambaWeights:
        """Return A of its logarithm, and the convolution's weight as [channels, taps]."""
        weights.A = -weights.A.exp()  # stored as log(-A)
        weights.conv_weight = weights.conv_weight.squeeze(1)
        return weights

    def state(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> MambaState:
        """Return zeros."""
        block = self.block
        conv = torch.zeros(batch, block.conv_kernel - 1, block.conv_channels, dtype=dtype, device=device)
        shape = (batch, block.mamba_num_heads, block.mamba_head_dim, block.mamba_state_dim)
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        return MambaState(conv, torch.zeros(shape, dtype=exact, device=device))

    def _split(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return z [..., inner], x with B and C [..., conv channels], and dt [..., n] of the input projection."""
        block = self.block
        return projected.split([block.d_inner, block.conv_channels, block.mamba_num_heads], dim=-1)

    def _split_conv(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return x [..., n, p], B and C [..., g, s]."""
        block = self.block
        x, b, c = xbc.split([block.d_inner, block.group_states, block.group_states], dim=-1)
        by_group = (block.mamba_num_groups, block.mamba_state_dim)
        by_head = (block.mamba_num_heads, block.mamba_head_dim)
        return x.unflatten(-1, by_head), b.unflatten(-1, by_group), c.unflatten(-1, by_group)

    def _out(self, ops: Ops, y: Tensor, z: Tensor, w: MambaWeights) -> Tensor:
        """Return the output [..., h] of the scan's y [..., n, p], gated by z."""
        size = self.block.d_inner // self.block.mamba_num_groups
        y = y.flatten(-2)
        if not self.block.mamba_norm:
            y = F.silu(z) * y
        elif not y.is_cuda:
            y = rms_norm_inference(y, w.gated_norm, z, group_size=size, eps=self.epsilon)
        else:
            y = ops.gated_rms_norm(y, z, w.gated_norm, group_size=size, eps=self.epsilon)
        return F.linear(y, w.out_proj)

    def extend(
        self, ops: Ops, w: MambaWeights, h: Tensor, state: MambaState, start: int, rotary: Rotary | None, last: int
    ) -> Tensor:
        """Return the outputs of the last tokens."""
        block = self.block
        if last == h.shape[1]:
            z, xbc, dt = self._split(F.linear(h, w.in_proj))
        else:
            z = F.linear(h[:, -last:], w.in_proj[: block.d_inner])
            rest = F.linear(h, w.in_proj[block.d_inner :])
            xbc, dt = rest.split([block.conv_channels, block.mamba_num_heads], dim=-1)
        xbc, conv = ops.conv1d(xbc, w.conv_weight, w.conv_bias, initial_state=state.conv, return_final_state=True)
        x, b, c = self._split_conv(xbc)
        y, ssm = ops.ssd(x, dt, w.A, b, c, D=w.D, dt_bias=w.dt_bias, initial_state=state.ssm, return_final_state=True)
        state.conv.copy_(conv)
        state.ssm.copy_(ssm)
        return self._out(ops, y[:, -last:], z, w)

    def step(self, ops: Ops, w: MambaWeights, h: Tensor, state: MambaState, at: Step) -> Tensor:
        """Return the output [b, h]."""
        z, xbc, dt = self._split(F.linear(h, w.in_proj))
        x, b, c = self._split_conv(ops.conv1d_step(state.conv, xbc, w.conv_weight, w.conv_bias))
        return self._out(ops, ops.ssd_step(state.ssm, x, dt, w.A, b, c, w.D, w.dt_bias), z, w)

    def window(self, state: MambaState, width: int) -> MambaWindow:
        """Return zeros."""
        batch, _, channels = state.conv.shape
        inputs = state.conv.new_zeros(batch, width, channels + self.block.mamba_num_heads)
        return MambaWindow(inputs, state.conv.new_zeros(batch, width, channels))

    def try_tokens(
        self, ops: Ops, w: MambaWeights, h: Tensor, state: MambaState, window: MambaWindow, at: Trial
    ) -> Tensor:
        """Return the output [b, l, h]."""
        new, end, inner = slice(at.slot, at.slot + h.shape[1]), at.slot + h.shape[1], self.block.d_inner
        projected = F.linear(h, w.in_proj)
        window.inputs[:, new] = projected[..., inner:]
        xbc, dt = self._split_inputs(window.inputs[:, :end])
        ops.conv1d_window(state.conv, xbc, w.conv_weight, w.conv_bias, window.convolved[:, new])
        x, b, c = self._split_conv(window.convolved[:, :end])
        y = ops.ssd_window(state.ssm, x, dt, w.A, b, c[:, new], w.D, w.dt_bias)  # [b, l, n, p]
        return self._out(ops, y, projected[..., :inner], w)

    def accept(self, ops: Ops, w: MambaWeights, state: MambaState, window: MambaWindow, counts: Tensor) -> None:
        """Advance both parts of the state."""
        xbc, dt = self._split_inputs(window.inputs)
        ops.conv1d_advance(state.conv, xbc, counts)
        x, b, _ = self._split_conv(window.convolved)
        ops.ssd_advance(state.ssm, x, dt, w.A, b, w.dt_bias, counts)

    def _split_inputs(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return x with B and C [..., conv channels], and dt [..., n]."""
        return inputs.split([self.block.conv_channels, self.block.mamba_num_heads], dim=-1)

    def cpu_buffers(self, batch: int, dtype: torch.dtype) -> _Mixer:
        """Return the buffers between norm and residual stream."""
        return _Mixer(self.block, batch, dtype, self.epsilon)

    def cpu_step(
        self, buffers: _Mixer, residual: Residual, w: MambaWeights, h: Tensor, state: MambaState, at: Step
    ) -> None:
        """Add the output to the residual stream."""
        residual.matmul(h, w.in_proj, buffers.projected)
        residual.values.addmm_(buffers(w, state), w.out_proj.t(), alpha=buffers.gain)

    def mixing(self, ops: Ops, w: MambaWeights, h: Tensor, rotary: Rotary | None) -> Mixing:
        """Return the matrices of the heads: of each its group's B and C."""
        _, xbc, dt = self._split(F.linear(h, w.in_proj))
        _, *b_and_c = self._split_conv(ops.conv1d(xbc, w.conv_weight, w.conv_bias))
        dt = F.softplus(dt.to(w.dt_bias.dtype) + w.dt_bias)  # [b, l, n]
        heads = self.block.mamba_num_heads // self.block.mamba_num_groups
        b, c = (each.repeat_interleave(heads, dim=2) for each in b_and_c)  # [b, l, n, s]
        factors = (each.transpose(1, 2).flatten(0, 1) for each in (dt, dt * w.A, b, c))
        return Mixing(ssd_matrix, (*factors, w.D.repeat(len(h))))

    def whole(
        self,
        ops: Ops,
        w: MambaWeights,
        h: Tensor,
        rotary: Rotary | None,
        watch: Watch | None,
        masks: Masks,
    ) -> Tensor:
        """Return the output; x's part of the input projection is watched. Under a mask the gated norm's mean goes over
        the channels that stay.
        """
        mask = masks.get("x")
        z, xbc, dt = self._split(F.linear(h, w.in_proj))
        if watch:
            watch("x", xbc[..., : self.block.d_inner])
        x, b, c = self._split_conv(ops.conv1d(xbc, w.conv_weight, w.conv_bias))
        y = ops.ssd(x, dt, w.A, b, c, D=w.D, dt_bias=w.dt_bias).flatten(-2)
        groups = self.block.mamba_num_groups
        if not self.block.mamba_norm:
            y = F.silu(z) * y
            return F.linear(y if mask is None else y * mask, w.out_proj)
        if mask is None:
            size = self.block.d_inner // groups
            return F.linear(ops.gated_rms_norm(y, z, w.gated_norm, group_size=size, eps=self.epsilon), w.out_proj)
        wide = torch.float64 if y.dtype == torch.float64 else torch.float32
        gated = (y.to(wide) * F.silu(z.to(wide)) * mask).unflatten(-1, (groups, -1))
        stay = mask.to(wide).unflatten(-1, (groups, -1)).sum(-1, keepdim=True)
        mean = gated.square().sum(-1, keepdim=True) / stay
        normed = (gated * (mean + self.epsilon).rsqrt()).flatten(-2) * w.gated_norm
        return F.linear(normed.to(h.dtype), w.out_proj)


class _Mixer:
    """A mixer's buffers; `wide` is [b, g, channels of a group, ...]."""

    def __init__(self, block: Mamba, batch: int, dtype: torch.dtype, epsilon: float) -> None:
        groups, heads, state, size = block.mamba_num_groups, block.mamba_num_heads, block.mamba_state_dim, block.d_inner
        self.wide = batch, groups, size // groups, state

        def buffer(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype)

        self.projected = buffer(batch, block.in_proj_size)
        z, xbc, self.dt = self.projected.split([size, block.conv_channels, heads], dim=-1)
        self.z, self.newest = z.unflatten(-1, (groups, -1)), xbc.unsqueeze(1)
        self.taps = buffer(batch, block.conv_kernel, block.conv_channels)
        self.rest = self.taps[:, 1:]
        self.convolved = buffer(batch, block.conv_channels)
        x, b, c = self.convolved.split([size, groups * state, groups * state], dim=-1)
        self.x = x.unflatten(-1, (heads, -1))
        self.b, self.c = b.unflatten(-1, (groups, 1, -1)), c.unflatten(-1, (groups, 1, -1))
        self.raw, self.decay = buffer(batch, heads), buffer(batch, heads, 1, 1)
        self.decay_by_head = self.decay.view(batch, heads)
        self.u = buffer(batch, heads, block.mamba_head_dim)
        self.u_column = self.u.view(batch, groups, -1, 1)
        self.c_copy = buffer(batch, groups, 1, state)
        self.c_rows = self.c_copy.flatten(0, 1)
        self.y_rows = buffer(batch * groups, 1, size // groups)
        self.y, self.y_by_group = self.y_rows.view_as(self.u), self.y_rows.view(batch, groups, -1)
        if block.mamba_norm:
            self.gated = Normed(batch, groups, size // groups, eps=epsilon, dtype=dtype)
            self.gain = self.gated.gain
        else:
            self.gated, self.gain = None, 1.0
            self.product = buffer(batch, groups, size // groups)
            self.product_flat = self.product.flatten(1)

    def __call__(self, w: MambaWeights, state: MambaState) -> Tensor:
        """Return what `out_proj` multiplies, without `gain`, from `projected`."""
        torch.cat([state.conv, self.newest], dim=1, out=self.taps)
        state.conv.copy_(self.rest)
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

        if self.gated is None:
            torch.mul(F.silu(self.z), self.y_by_group, out=self.product)
            return self.product_flat
        torch.mul(F.silu(self.z), self.y_by_group, out=self.gated.values)
        return self.gated(w.gated_norm)
