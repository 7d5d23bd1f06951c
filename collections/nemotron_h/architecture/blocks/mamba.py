"""A Mamba-2 layer: input projection, causal convolution, state-space scan, gated norm, output projection.

The input projection's outputs are, in order, z, x, B, C and dt.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from nemotron_h.architecture.blocks.block import (
    Axis,
    Block,
    Cut,
    Indices,
    LayerMemory,
    Matrix,
    Operation,
    Shape,
    Tensors,
    copies,
    input_norm,
    stays,
)

if TYPE_CHECKING:
    from nemotron_h.architecture.rank import Rank

#: tokens per chunk of the kernels' scan (ops/select.py), and of ours, with the size of ours' segments (ops/ssd.py)
KERNEL_CHUNK, CPU_CHUNK, CPU_SEGMENT_ELEMENTS = 128, 32, 1 << 18
#: widths of one rank that the fused kernel takes are multiples of this (model/mixer.py)
FUSED_ALIGNMENT = 8


@dataclass(frozen=True)
class Mamba(Block):
    """A Mamba-2 mixer; the attributes are as in `ModelDefinition`."""

    letter: ClassVar[str] = "M"
    name: ClassVar[str] = "mamba"
    title: ClassVar[str] = "Mamba-2"
    widths: ClassVar[tuple[str, ...]] = (
        "mamba_num_heads",
        "mamba_head_dim",
        "mamba_num_groups",
        "mamba_state_dim",
        "conv_kernel",
    )
    divides: ClassVar[tuple[tuple[str, str], ...]] = (("mamba_num_heads", "mamba_num_groups"),)
    sharded: ClassVar[tuple[str, ...]] = ("mamba_num_groups", "mamba_num_heads")
    exchanges: ClassVar[tuple[tuple[str, str], ...]] = (("mamba_num_heads", "mamba_num_groups"),)
    switches: ClassVar[tuple[str, ...]] = ("mamba_norm",)
    llama_cpp: ClassVar[Mapping[str, str]] = {
        "norm.weight": "attn_norm.weight",
        "mixer.in_proj.weight": "ssm_in.weight",
        "mixer.conv1d.weight": "ssm_conv1d.weight",
        "mixer.conv1d.bias": "ssm_conv1d.bias",
        "mixer.dt_bias": "ssm_dt.bias",
        "mixer.A_log": "ssm_a",
        "mixer.D": "ssm_d",
        "mixer.norm.weight": "ssm_norm.weight",
        "mixer.out_proj.weight": "ssm_out.weight",
    }

    mamba_num_heads: int
    mamba_head_dim: int
    mamba_num_groups: int
    mamba_state_dim: int
    conv_kernel: int
    mamba_norm: bool = True

    @classmethod
    def of(cls, widths: Mapping[str, Any]) -> Mamba:
        """Return the block with the widths of a layer."""
        return replace(super().of(widths), mamba_norm=widths["mamba_norm"])

    @property
    def d_inner(self) -> int:
        """Return the channels of the mixer."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def group_states(self) -> int:
        """Return the width of B, and of C."""
        return self.mamba_num_groups * self.mamba_state_dim

    @property
    def conv_channels(self) -> int:
        """Return the channels of the causal convolution: x, B and C."""
        return self.d_inner + 2 * self.group_states

    @property
    def in_proj_size(self) -> int:
        """Return the outputs of the input projection: z, x, B, C and dt."""
        return self.d_inner + self.conv_channels + self.mamba_num_heads

    @property
    def in_proj_sections(self) -> tuple[int, ...]:
        """Return the widths of z, x, B, C and dt."""
        return self.d_inner, self.d_inner, self.group_states, self.group_states, self.mamba_num_heads

    def matrices(self) -> tuple[Matrix, ...]:
        """Return both projections."""
        hidden, part = self.hidden_size, "mamba_projections"
        keys, sections = ("hidden_size", "mamba_num_heads"), self.in_proj_sections
        return (
            Matrix("in_proj", self.in_proj_size, hidden, "outputs", part, keys, parts=sections),
            Matrix("out_proj", hidden, self.d_inner, "inputs", part, ("mamba_num_heads", "hidden_size")),
        )

    def tensor_count(self) -> int:
        """Return 16: z, x, B, C, dt of the projection in; x, B, C of the convolution's weight and of its bias; A_log, D
        and dt_bias; gated norm; projection out.
        """
        return 5 + 2 * 3 + 3 + 1 + 1

    def vectors(self) -> int:
        """Return the parameters of convolution (weight and bias), scan (A_log, D, dt_bias) and gated norm."""
        norm = self.d_inner if self.mamba_norm else 0
        return self.conv_channels * (self.conv_kernel + 1) + 3 * self.mamba_num_heads + norm

    def float32_parameters(self, tensor: int = 1) -> int:
        """Return those of the scan."""
        return 3 * self.mamba_num_heads // tensor

    def scan_flops(self, chunk: int) -> float:
        """Return forward FLOPs per token of the scan.

        C B^T per group, the decayed [chunk, chunk] matrix times x per head, B^T x into the chunk's state, and C times
        the incoming state. Passing states between chunks is elementwise.
        """
        within = 2 * chunk * (self.group_states + self.d_inner)
        return within + 4 * self.mamba_state_dim * self.d_inner

    def operations(self, seq_length: int, chunk: int) -> Iterator[Operation]:
        """Yield projections, convolution and scan."""
        in_proj, out_proj = super().operations(seq_length, chunk)
        yield in_proj
        yield Operation("convolution", 2 * self.conv_channels * self.conv_kernel)
        yield Operation("ssd", self.scan_flops(min(chunk, seq_length)), of_activations=True)
        yield out_proj

    @property
    def addressed(self) -> int:
        """Return those of the input projection's output, of which mamba-ssm 2.3's kernels read z, x, B, C and dt."""
        return self.in_proj_size

    def exchanged(self, tensor: int, context: int) -> int:
        """Return those of x, B, C and dt, and of the scan's output."""
        return (self._exchanged_inputs(tensor, context) + self.d_inner) // tensor

    def _exchanged_inputs(self, tensor: int, context: int) -> int:
        return self._scanned(tensor, context) + self.mamba_num_heads

    def _scanned(self, tensor: int, context: int) -> int:
        """Return the channels of x, B and C of all context-parallel ranks together, which may share groups."""
        return self.d_inner + 2 * self.group_states * copies(self.mamba_num_groups // tensor, context)

    def states(self, context: int) -> dict[str, int]:
        """Return the scan's state and the last inputs of the convolution, whatever the context."""
        return {
            "ssm_states": self.d_inner * self.mamba_state_dim,
            "conv_states": max(self.conv_kernel - 1, 0) * self.conv_channels,
        }

    def memory(self, rank: Rank, fp8: bool) -> LayerMemory:
        """Return what training keeps and allocates."""
        in_proj, out_proj = self.matrices()
        split = rank.layout.tensor, rank.layout.context
        projected, conv, inner = rank.act(self.in_proj_size), rank.act(self._scanned(*split)), rank.act(self.d_inner)
        whole_rows = rank.act(self._exchanged_inputs(*split)) if rank.layout.context > 1 else 0
        rows = rank.tokens * self.mamba_num_groups // rank.layout.tensor * 4 if self.mamba_norm else 0
        out = rank.saved_input(out_proj, inner, fp8)
        out_weight = rank.gathered + inner + rank.weight(out_proj)
        in_weight = rank.weight(in_proj)
        # projected, the scan's output, the norm's output
        base = rank.input(in_proj, fp8) + projected + inner + out + rows
        fused = self.fused(rank)
        if fused:
            kept = base
            states = self._chunk_states(rank)
            steps = rank.tokens * self.mamba_num_heads // rank.layout.tensor * 4
            # convolution again, gradients of the projection and of x, B, C, of the norm's output and input; the states
            # of our chunks, half of `KERNEL_CHUNK`, and their gradients in bfloat16; step sizes and sums of decays
            kernel = 2 * conv + projected + 2 * inner + 8 * states + 2 * steps - out
        else:
            kept = base + conv + whole_rows + (self._segment_starts(rank) if rank.cpu else 2 * rows)
            # the norm (gradients of its output, of y and of z), the scan (of z, y, x, B and C), the split of x, B, C
            scan = 2 * inner + conv + (self._scan_scratch(rank) if rank.cpu else 0)
            kernel = max(3 * inner - out, scan - out - inner, inner + 2 * conv - out - inner)
            if not rank.cpu:
                kernel += 8 * self._chunk_states(rank)
        after = -(2 * inner + (0 if fused else conv))  # out, y (and x, B, C) are spent
        fuse = 2 * projected + after  # gradients of z, x, B, C and dt, and their concatenation
        project = (
            projected + (rank.residual if not rank.gathered else 2 * rank.gathered) + in_weight + after - projected
        )
        return LayerMemory(kept, rank.residual + max(out_weight, kernel, fuse, project))

    def fused(self, rank: Rank) -> bool:
        """Tell whether mamba-ssm's fused kernel runs: it takes this rank's widths (`nemotron_h.model.mixer`)."""
        t = rank.layout.tensor
        return not (rank.cpu or rank.layout.context > 1) and not (
            self.conv_channels // t % FUSED_ALIGNMENT or self.in_proj_size // t % FUSED_ALIGNMENT
        )

    def _chunk_states(self, rank: Rank) -> int:
        """Return the elements of the states at the edges of a scan's chunks."""
        layout = rank.layout
        chunks = layout.micro_batch * math.ceil(layout.seq_length / KERNEL_CHUNK)
        return chunks * self.d_inner // layout.tensor // layout.context * self.mamba_state_dim

    def _segment(self, rank: Rank) -> tuple[int, int]:
        """Return tokens of a segment of our scan, and of its chunks (ops/ssd.py)."""
        chunk = min(CPU_CHUNK, rank.layout.seq_length)
        heads = self.mamba_num_heads // rank.layout.tensor // rank.layout.context
        tokens = max(CPU_SEGMENT_ELEMENTS // (heads * chunk), chunk)
        return max(tokens // chunk, 1) * chunk, chunk

    def _scan_scratch(self, rank: Rank) -> int:
        """Return bytes of the buffers of our scan's backward, which do not grow with the sequence (ops/ssd.py)."""
        t, context = rank.layout.tensor, rank.layout.context
        step, chunk = self._segment(rank)
        tokens = min(step, rank.tokens * context)
        inner, heads = self.d_inner // t // context, self.mamba_num_heads // t // context
        width = self.group_states * copies(self.mamba_num_groups // t, context) // t // context
        states = 2 * math.ceil(tokens / chunk + 1) * inner * self.mamba_state_dim
        return 4 * (tokens * (3 * heads * chunk + 9 * inner + 5 * width) + states)

    def _segment_starts(self, rank: Rank) -> int:
        """Return bytes of the states that our scan keeps, one per segment of each sequence (ops/ssd.py)."""
        length = rank.layout.seq_length
        step, chunk = self._segment(rank)
        segments = math.ceil((length - length % chunk) / step) + (1 if length % chunk else 0)
        inner = self.d_inner // rank.layout.tensor // rank.layout.context
        return rank.layout.micro_batch * segments * inner * self.mamba_state_dim * 4

    def tensors(self, ours: str, theirs: str) -> Iterator[Tensors]:
        """Yield norm, projection in, convolution, scan, gated norm, projection out."""
        fused = f"{ours}mixer.in_proj.layer_norm_weight"
        yield input_norm(self.hidden_size, f"{ours}norm.weight", fused, theirs)
        yield from self.mixer_tensors(f"{ours}mixer.", f"{theirs}mixer.")

    def mixer_tensors(self, ours: str, theirs: str) -> Iterator[Tensors]:
        """Yield all but the norm before the mixer; `ours` and `theirs` are prefixes of the mixer's names."""
        conv = {"x": self.d_inner, "B": self.group_states, "C": self.group_states}

        def fused(name: str, parts: dict[str, int], *shape: int) -> Tensors:
            whole = {f"{theirs}{name}": (sum(parts.values()), *shape)}
            return Tensors({f"{ours}{name}.{part}": (rows, *shape) for part, rows in parts.items()}, whole)

        def same(name: str, *shape: int, exact: bool = False) -> Tensors:
            return Tensors({f"{ours}{name}": shape}, {f"{theirs}{name}": shape}, exact=exact)

        yield fused("in_proj.weight", {"z": self.d_inner, **conv, "dt": self.mamba_num_heads}, self.hidden_size)
        yield fused("conv1d.weight", conv, 1, self.conv_kernel)
        yield fused("conv1d.bias", conv)
        for name in ("A_log", "D", "dt_bias"):
            yield same(name, self.mamba_num_heads, exact=True)
        if self.mamba_norm:
            yield same("norm.weight", self.d_inner)
        yield same("out_proj.weight", self.hidden_size, self.d_inner)

    def llama_cpp_shape(self, name: str, shape: Shape) -> Shape:
        """Return llama.cpp's shape: the scan's parameters as columns, the norm by groups, the convolution's taps."""
        if name in ("ssm_a", "ssm_d"):
            return (*shape, 1)
        if name == "ssm_norm.weight":
            return (self.mamba_num_groups, self.d_inner // self.mamba_num_groups)
        if name == "ssm_conv1d.weight":
            return (shape[0], shape[2])
        return shape

    def axes(self) -> tuple[Axis, ...]:
        """Return heads (each group keeps as many: its heads share B and C) and channels, the same in all heads."""
        return (
            Axis("heads", "mamba_num_heads", self.mamba_num_heads, "x", groups=self.mamba_num_groups),
            Axis("channels", "mamba_head_dim", self.mamba_head_dim, "x"),
        )

    def inner_channels(self, heads: Indices, channels: Indices) -> Indices:
        """Return the kept channels among heads x head_dim."""
        return (heads[:, None] * self.mamba_head_dim + channels[None, :]).reshape(-1)

    def cuts(self, kept: Mapping[str, Indices], hidden: Indices) -> tuple[Cut, ...]:
        """Return what stays of each tensor; B and C stay whole."""
        import numpy as np  # a plan does without

        heads, inner = kept["heads"], self.inner_channels(kept["heads"], kept["channels"])
        stream, channels = stays(hidden, self.hidden_size), stays(inner, self.d_inner)
        states = np.arange(2 * self.group_states)
        conv = stays(np.concatenate([inner, self.d_inner + states]), self.conv_channels)
        dt = self.d_inner + self.conv_channels + heads
        rows = np.concatenate([inner, self.d_inner + inner, 2 * self.d_inner + states, dt])  # z, x, B and C, dt
        in_proj = stays(rows, self.in_proj_size)
        per_head = [(stays(heads, self.mamba_num_heads), None)] * 3  # A_log, D, dt_bias
        outer = (*([(channels, None)] if self.mamba_norm else []), (stream, channels))
        return (stream, None), (in_proj, stream), (conv, None), (conv, None), *per_head, *outer
