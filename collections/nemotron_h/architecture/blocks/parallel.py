"""Attention and Mamba-2 side by side: one norm before both, their outputs summed (Falcon-H1, arXiv 2507.22448).

Each branch has an output projection of its own, so that the sum is the same map as one projection of both outputs,
concatenated. Its letter is P, as in Megatron-Bridge.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from nemotron_h.architecture.blocks.attention import Attention
from nemotron_h.architecture.blocks.block import (
    AttentionHeads,
    Axis,
    Block,
    Cut,
    Indices,
    LayerMemory,
    Matrix,
    Operation,
    Shape,
    Tensors,
)
from nemotron_h.architecture.blocks.mamba import Mamba
from nemotron_h.architecture.multipliers import ONES, Multipliers

if TYPE_CHECKING:
    from nemotron_h.architecture.rank import Rank


@dataclass(frozen=True)
class Parallel(Block):
    """Both branches; their widths are attributes too.

    Attributes:
        mamba, attention: the branches.
        scales: of the model; those of `multipliers` are applied.
    """

    letter: ClassVar[str] = "P"
    name: ClassVar[str] = "parallel"
    title: ClassVar[str] = "attention beside Mamba-2"
    widths: ClassVar[tuple[str, ...]] = (*Mamba.widths, *Attention.widths)
    divides: ClassVar[tuple[tuple[str, str], ...]] = (*Mamba.divides, *Attention.divides)
    sharded: ClassVar[tuple[str, ...]] = (*Mamba.sharded, *Attention.sharded)
    exchanges: ClassVar[tuple[tuple[str, str], ...]] = (*Mamba.exchanges, *Attention.exchanges)
    pads: ClassVar[tuple[str, ...]] = Attention.pads
    attends: ClassVar[bool] = True
    switches: ClassVar[tuple[str, ...]] = Mamba.switches
    lacks: ClassVar[tuple[str, ...]] = Attention.switches
    multipliers: ClassVar[tuple[str, ...]] = (
        "attention_in",
        "key",
        "attention_out",
        "ssm_in",
        "ssm_out",
        "ssm_z",
        "ssm_x",
        "ssm_b",
        "ssm_c",
        "ssm_dt",
    )
    llama_cpp: ClassVar[Mapping[str, str]] = {
        "input_layernorm.weight": "attn_norm.weight",
        **{name.replace("mixer.", "mamba."): own for name, own in Mamba.llama_cpp.items() if name.startswith("mixer.")},
        **{
            name.replace("mixer.", "self_attn."): own
            for name, own in Attention.llama_cpp.items()
            if name.startswith("mixer.")
        },
    }

    mamba: Mamba
    attention: Attention
    scales: Multipliers = ONES

    @classmethod
    def of(cls, widths: Mapping[str, Any]) -> Parallel:
        """Return the block with the widths of a layer."""
        return cls(widths["hidden_size"], Mamba.of(widths), Attention.of(widths), widths["multipliers"])

    def __getattr__(self, name: str) -> Any:
        """Return a width of a branch."""
        for branch, kind in (("mamba", Mamba), ("attention", Attention)):
            if name in kind.widths:
                return getattr(getattr(self, branch), name)
        raise AttributeError(name)

    def matrices(self) -> tuple[Matrix, ...]:
        """Return the projections of both branches."""
        return (*self.mamba.matrices(), *self.attention.matrices())

    def vectors(self) -> int:
        """Return the mixer's parameters."""
        return self.mamba.vectors()

    def float32_parameters(self, tensor: int = 1) -> int:
        """Return those of the scan."""
        return self.mamba.float32_parameters(tensor)

    def operations(self, seq_length: int, chunk: int) -> Iterator[Operation]:
        """Yield those of both branches."""
        yield from self.mamba.operations(seq_length, chunk)
        yield from self.attention.operations(seq_length, chunk)

    @property
    def addressed(self) -> int:
        """Return those of the scan's branch."""
        return self.mamba.addressed

    def exchanged(self, tensor: int, context: int) -> int:
        """Return those of both branches."""
        return self.mamba.exchanged(tensor, context) + self.attention.exchanged(tensor, context)

    def empty_flops(self, seq_length: int, tensor: int, context: int) -> float:
        """Return the attention's."""
        return self.attention.empty_flops(seq_length, tensor, context)

    def states(self, context: int) -> dict[str, int]:
        """Return the mixer's states, and keys and values."""
        return {**self.mamba.states(context), **self.attention.states(context)}

    def memory(self, rank: Rank, fp8: bool) -> LayerMemory:
        """Return what training keeps and allocates."""
        mamba, attention = self.mamba.memory(rank, fp8), self.attention.memory(rank, fp8)
        # one input and one norm; one normalised input too, where neither branch scales or quantises its own
        inputs = [rank.saved_input(branch.matrices()[0], rank.residual, fp8) for branch in (self.mamba, self.attention)]
        shared = 0 if fp8 or self.scales.attention_in != 1 else min(inputs)
        attention_kept = attention.kept - rank.residual - rank.norm_rows - shared
        # the branches' backwards follow on each other: the scaled gradient of an output, the input's gradient so far
        first, second = attention.backward + rank.residual, mamba.backward + 2 * rank.residual
        return LayerMemory(mamba.kept + attention_kept, max(first, second - attention_kept))

    def tensors(self, ours: str, theirs: str) -> Iterator[Tensors]:
        """Yield the norm, the mixer's and the attention's."""
        hidden = (self.hidden_size,)
        yield Tensors({f"{ours}norm.weight": hidden}, {f"{theirs}input_layernorm.weight": hidden})
        yield from self.mamba.mixer_tensors(f"{ours}mixer.", f"{theirs}mamba.")
        yield from self.attention.projection_tensors(f"{ours}self_attention.", f"{theirs}self_attn.")

    def llama_cpp_shape(self, name: str, shape: Shape) -> Shape:
        """Return llama.cpp's shape of the mixer's tensors."""
        return self.mamba.llama_cpp_shape(name, shape)

    def row_scales(self, name: str) -> tuple[tuple[int, float], ...]:
        """Return those of both branches' projections; what multiplies an input multiplies the outputs."""
        scales, attention = self.scales, self.attention
        if name == "mamba.in_proj.weight":
            return tuple(zip(self.mamba.in_proj_sections, scales.in_proj, strict=True))
        rows, scale = {
            "mamba.out_proj.weight": (self.hidden_size, scales.ssm_out),
            "self_attn.q_proj.weight": (attention.queries, scales.attention_in),
            "self_attn.k_proj.weight": (attention.keys, scales.attention_in * scales.key),
            "self_attn.v_proj.weight": (attention.keys, scales.attention_in),
            "self_attn.o_proj.weight": (self.hidden_size, scales.attention_out),
        }.get(name, (0, 1.0))
        return () if scale == 1 else ((rows, scale),)

    def attention_heads(self) -> AttentionHeads:
        """Return the attention's; its projections are the last two tensors here too."""
        return self.attention.attention_heads()

    def axes(self) -> tuple[Axis, ...]:
        """Return the mixer's heads and channels."""
        return self.mamba.axes()

    def cuts(self, kept: Mapping[str, Indices], hidden: Indices) -> tuple[Cut, ...]:
        """Return what stays of norm, mixer and attention."""
        whole: Mapping[str, Indices] = {}
        return (*self.mamba.cuts(kept, hidden), *self.attention.cuts(whole, hidden)[1:])
