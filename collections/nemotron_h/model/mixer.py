"""The Mamba-2 mixer on Megatron's tensor-parallel layers.

Parameter names, shapes and checkpoint layout are those of megatron-core's `MambaMixer`, so released checkpoints load;
the scan, convolution and norm come from `nemotron_h.ops`, so it runs without a GPU and takes `seq_idx`.

Axes: l tokens, b batch, h hidden; and of one rank: n heads, p channels of a head, g groups, s state per channel (the
paper's H, P, G, N), inner = n * p.

Of a layer's input u (Dao and Gu 2024, arXiv 2405.21060, section 7.1; Nemotron-H, arXiv 2504.03624, section 2.1):

    z, x, B, C, dt = u W_in      x, B, C = silu(conv(x, B, C))
    y = SSD(x, softplus(dt + dt_bias), A = -exp(A_log), B, C) + D x
    out = RMSNorm(y silu(z)) W_out, the mean square over the channels of a group

Falcon-H1 (arXiv 2507.22448) multiplies z, x, B, C and dt by a number each, and leaves out the norm in its smallest.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules, _split_tensor_factory
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint, sharded_state_dict_default
from torch import Tensor, nn

from nemotron_h.model import init
from nemotron_h.model.context_parallel import HeadShare, channels, heads_for_tokens, tokens_for_heads
from nemotron_h.ops.activation import gated_silu
from nemotron_h.ops.scale import scale_sections
from nemotron_h.ops.select import select_ops

logger = logging.getLogger(__name__)

#: what causal-conv1d's vectorised loads need: channels, and the distance between tokens, in multiples of so many
FUSED_ALIGNMENT = 8


def fused_obstacle(conv_channels: int, projected: int) -> str:
    """Return why the fused kernel cannot take these widths of one rank; empty where it can.

    mamba-ssm 2.3 copies rows that are not aligned and so runs; older releases raise, and a copy of every row costs more
    than the fusion saves. Both apply to few heads per rank (the 4B's 112 heads over 4 or 8 ranks).

    Args:
        conv_channels: channels of the convolution: x, B and C.
        projected: output width of the input projection: z, x, B, C and dt.
    """
    for name, width in (("convolution channels", conv_channels), ("outputs of the input projection", projected)):
        if width % FUSED_ALIGNMENT:
            return f"{width} {name} per rank are not a multiple of {FUSED_ALIGNMENT}"
    return ""


@functools.cache
def _say_once(text: str) -> None:
    logger.info(text)


def _split(shard: ShardedTensor, sections: list[int], parts: list[str]) -> ShardedTensorFactory:
    """Return Megatron's factory of a tensor's parts along its first axis, with flat ranges of Python's integers.

    The optimizer's state is a flat range of each part. Megatron's ends are numpy's scalars, which the checkpoint's
    index would name a function for.
    """
    factory = _split_tensor_factory(shard, sections, parts, 0)
    build = factory.build_fn

    def build_parts(*args: object) -> list[ShardedTensor]:
        shards = build(*args)
        for part in shards:
            if (flat := part.flattened_range) is not None:
                part.flattened_range = slice(int(flat.start), int(flat.stop))
        return shards

    return dataclasses.replace(factory, build_fn=build_parts)


class GatedNorm(nn.Module):
    """The weight of the gated RMSNorm; one value per channel of this rank."""

    def __init__(self, channels: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, dtype=dtype, device=device))
        self.weight.tensor_model_parallel = True

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, object]:
        """Return the weight, sharded over tensor-parallel ranks along its only axis."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets)


class NemotronHMixer(MegatronModule):
    """Mamba-2 mixer: input projection, causal convolution, SSD scan, gated RMSNorm, output projection.

    Args:
        config: the model's Megatron configuration (`NemotronHConfig`).
        submodules: the classes of the two projections.
        d_model: width of the residual stream.
        layer_number: counted from 1 over the whole model.
        pg_collection: process groups; `tp` and `cp` are used.
    """

    #: kept in float32 whatever the parameters' dtype: the scan's decays are exponentials of them
    float32_parameters = ("A_log", "D", "dt_bias")
    #: training takes the kernel that fuses all between the projections
    fused = False
    #: of the input projection's parts, or None
    in_proj_scales: tuple[float, ...] | None = None

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MambaMixerSubmodules,
        d_model: int,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config)
        if pg_collection is None:
            raise ValueError("NemotronHMixer needs pg_collection")
        self.layer_number = layer_number
        self.tp_group = pg_collection.tp
        tp_size = self.tp_group.size()
        self.head_dim = config.mamba_head_dim
        self.state_dim = config.mamba_state_dim
        self.heads_local = config.mamba_num_heads // tp_size
        self.groups_local = config.mamba_num_groups // tp_size
        self.inner_local = self.heads_local * self.head_dim
        self.inner = config.mamba_num_heads * self.head_dim
        self.share = HeadShare.of(pg_collection.cp, self.heads_local, self.groups_local)
        state_local = self.groups_local * self.state_dim
        self.in_proj_sections = [self.inner_local, self.inner_local, state_local, state_local, self.heads_local]
        self.conv_sections = [self.inner_local, state_local, state_local]
        device = torch.cuda.current_device() if not config.use_cpu_initialization else torch.device("cpu")

        self.in_proj = build_module(
            submodules.in_proj,
            d_model,
            sum(self.in_proj_sections) * tp_size,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="fc1",
            tp_group=self.tp_group,
        )
        conv_channels = sum(self.conv_sections)
        self.conv1d = nn.Conv1d(
            conv_channels,
            conv_channels,
            kernel_size=config.conv_kernel,
            groups=conv_channels,
            padding=config.conv_kernel - 1,
            device=device,
            dtype=config.params_dtype,
        )
        for name in self.float32_parameters:
            parameter = nn.Parameter(torch.ones(self.heads_local, dtype=torch.float32, device=device))
            parameter._no_weight_decay = True
            self.register_parameter(name, parameter)
        self.norm = GatedNorm(self.inner_local, config.params_dtype, device) if config.mamba_norm else None
        self.out_proj = build_module(
            submodules.out_proj,
            self.inner,
            d_model,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_comm_buffer_name="fc2",
            tp_group=self.tp_group,
        )
        for parameter in (self.conv1d.weight, self.conv1d.bias, self.A_log, self.D, self.dt_bias):
            parameter.tensor_model_parallel = True
        self.ops = select_ops()
        if self.ops.fused_mixer is not None:
            obstacle = fused_obstacle(conv_channels, sum(self.in_proj_sections))
            if self.share is not None:
                obstacle = "with context parallelism convolution and scan see other tokens than the norm"
            self.fused = not obstacle
            which = f"one by one: {obstacle}" if obstacle else "in one memory-saving kernel"
            _say_once(f"Mamba-2 convolution, scan and norm run {which}")

    def initialize(self, name: str, seed: int, out_std: float | None = None) -> None:
        """Initialize the mixer's weights (`nemotron_h.model.init`).

        Args:
            name: the mixer's global name.
            seed: of the run.
            out_std: of the output projection; None divides the others' by the root of the number of layers.
        """
        rank, size = self.tp_group.rank(), self.tp_group.size()
        bound = 1.0 / math.sqrt(self.config.conv_kernel)  # kaiming uniform with a = sqrt(5) over the window
        std = self.config.init_method_std
        shard = {"seed": seed, "axis": 0, "tp_rank": rank, "tp_size": size}
        init.fill(self.in_proj.weight, f"{name}.in_proj", init.normal(std), sections=self.in_proj_sections, **shard)
        for part in ("weight", "bias"):
            init.fill(
                getattr(self.conv1d, part),
                f"{name}.conv1d.{part}",
                init.uniform(-bound, bound),
                sections=self.conv_sections,
                **shard,
            )
        init.fill(self.A_log, f"{name}.A_log", init.log_uniform_a, **shard)
        init.fill(self.dt_bias, f"{name}.dt_bias", init.dt_bias, **shard)
        residual = std / math.sqrt(self.config.num_layers) if out_std is None else out_std
        init.fill(self.out_proj.weight, f"{name}.out_proj", init.normal(residual), **{**shard, "axis": 1})

    def _apply(self, fn, recurse: bool = True):
        """Keep `float32_parameters` in float32 when the model is cast to a lower precision (moves still apply)."""
        kept = {name: getattr(self, name).data for name in self.float32_parameters}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            parameter = getattr(self, name)
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = before.to(device=parameter.device)
        return self

    def forward(self, hidden_states: Tensor, seq_idx: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Mix along the sequence.

        Args:
            hidden_states: [l, b, h] (sequence-parallel shard where that is on), of this context-parallel rank.
            seq_idx: int32 [b, l], the document of each token of whole rows; states start anew where it changes.
        Returns:
            the output in the input's shape, and the output projection's bias (None).
        """
        projected, _ = self.in_proj(hidden_states)
        if self.in_proj_scales is not None:
            projected = scale_sections(projected, self.in_proj_sections, self.in_proj_scales)
        projected = projected.transpose(0, 1)  # [b, l, 2 inner + 2 g s + n], a view: the ops take strided input
        mix = self._mix_fused if self.fused and self.training else self._mix
        y = mix(projected, seq_idx)  # [b, l, inner]
        return self.out_proj(y.transpose(0, 1))

    def _mix_fused(self, projected: Tensor, seq_idx: Tensor | None) -> Tensor:
        """Run `_mix` in one kernel, which keeps `projected` and the scan's output, and computes the rest again."""
        return self.ops.fused_mixer(
            projected,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.dt_bias,
            -torch.exp(self.A_log),
            self.D,
            None if self.norm is None else self.norm.weight,
            head_dim=self.head_dim,
            groups=self.groups_local,
            eps=self.config.layernorm_epsilon,
            seq_idx=seq_idx,
        )

    def _mix(self, projected: Tensor, seq_idx: Tensor | None) -> Tensor:
        """Run convolution, scan and gated norm on z, x, B, C and dt side by side; return [b, l, inner]."""
        z, xbc, dt = projected.split([self.inner_local, sum(self.conv_sections), self.heads_local], dim=-1)
        y = (self._scan if self.share is None else self._exchanged_scan)(xbc, dt, seq_idx)
        if self.norm is None:
            return gated_silu(z, y)
        return self.ops.gated_rms_norm(
            y,
            z,
            self.norm.weight,
            group_size=self.inner_local // self.groups_local,
            eps=self.config.layernorm_epsilon,
        )

    def _exchanged_scan(self, xbc: Tensor, dt: Tensor, seq_idx: Tensor | None) -> Tensor:
        """Run `_scan` over whole rows of this context-parallel rank's heads; [b, t, ...] to [b, t, inner]."""
        share = self.share
        x, b, c = xbc.transpose(0, 1).split(self.conv_sections, dim=-1)  # [t, b, ...]
        states = (share.copied(each, self.state_dim) for each in (b, c))
        whole = tokens_for_heads([x, *states, dt.transpose(0, 1)], share.group).transpose(0, 1)  # [b, l, ...]
        xbc, dt = whole.split([whole.shape[-1] - len(share.heads), len(share.heads)], dim=-1)
        y = self._scan(xbc, dt, seq_idx)  # [b, l, inner / c]
        return heads_for_tokens(y.transpose(0, 1), share.group).transpose(0, 1)

    def _scan(self, xbc: Tensor, dt: Tensor, seq_idx: Tensor | None) -> Tensor:
        """Run convolution and scan of this rank's heads on x, B and C side by side, and dt; return [b, l, inner]."""
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        exponents, skips, biases = self.A_log, self.D, self.dt_bias
        if self.share is not None:
            weight, bias = (self._own_channels(each) for each in (weight, bias))
            own = channels(self.share.heads, 1)
            exponents, skips, biases = (each[own] for each in (exponents, skips, biases))
        xbc = self.ops.conv1d(xbc, weight, bias, seq_idx=seq_idx)
        inner = len(exponents) * self.head_dim
        states = (xbc.shape[-1] - inner) // 2
        x, b, c = xbc.split([inner, states, states], dim=-1)
        y = self.ops.ssd(
            x.unflatten(-1, (-1, self.head_dim)),  # [b, l, n, p]
            dt,
            -torch.exp(exponents),
            b.unflatten(-1, (-1, self.state_dim)),  # [b, l, g, s]
            c.unflatten(-1, (-1, self.state_dim)),
            D=skips,
            dt_bias=biases,
            seq_idx=seq_idx,
        )
        return y.flatten(-2)

    def _own_channels(self, x: Tensor) -> Tensor:
        """Return the rows of the convolution's weight or bias that this context-parallel rank's heads have."""
        parts = zip(
            x.split(self.conv_sections),
            (self.share.heads, self.share.groups, self.share.groups),
            (self.head_dim, self.state_dim, self.state_dim),
            strict=True,
        )
        return torch.cat([part[channels(share, width)] for part, share, width in parts])

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, object]:
        """Return Megatron's distributed-checkpoint layout, projections and convolution split into z, x, B, C, dt."""
        own: dict[str, object] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        state = make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            tensor_parallel_layers_axis_map={"A_log": 0, "dt_bias": 0, "D": 0},
            sharded_offsets=sharded_offsets,
        )
        for name, module in self.named_children():
            child = f"{prefix}{name}."
            if name == "conv1d":
                tensors = module.state_dict(prefix="", keep_vars=True)
                shards = make_sharded_tensors_for_checkpoint(tensors, child, {"weight": 0, "bias": 0}, sharded_offsets)
            else:
                shards = sharded_state_dict_default(module, child, sharded_offsets, metadata)
            state.update(shards)
        in_proj = (self.in_proj_sections, ["z", "x", "B", "C", "dt"])
        adapter = [key for key in ("b", "magnitude") if f"{prefix}in_proj.adapter.{key}" in state]
        for key, sections, parts in (
            ("in_proj.weight", *in_proj),
            *((f"in_proj.adapter.{key}", *in_proj) for key in adapter),
            ("conv1d.weight", self.conv_sections, ["x", "B", "C"]),
            ("conv1d.bias", self.conv_sections, ["x", "B", "C"]),
        ):
            state[f"{prefix}{key}"] = _split(state[f"{prefix}{key}"], sections, parts)
        return state
