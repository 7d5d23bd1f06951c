"""A toy block, the part without torch: a gated linear layer, down(sigmoid(gate x) * up x)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from nemotron_h.architecture.blocks.block import (
    Axis,
    Block,
    Cut,
    Indices,
    LayerMemory,
    Matrix,
    Tensors,
    input_norm,
    stays,
)
from nemotron_h.architecture.rank import Rank


@dataclass(frozen=True)
class Gated(Block):
    """A gated linear layer as wide as an FFN."""

    letter: ClassVar[str] = "G"
    name: ClassVar[str] = "gated"
    title: ClassVar[str] = "gated linear"
    widths: ClassVar[tuple[str, ...]] = ("ffn_hidden_size",)
    sharded: ClassVar[tuple[str, ...]] = ("ffn_hidden_size",)

    ffn_hidden_size: int

    def matrices(self) -> tuple[Matrix, ...]:
        """Return gate, up and down."""
        hidden, inner = self.hidden_size, self.ffn_hidden_size
        keys = ("hidden_size", "ffn_hidden_size")
        return (
            Matrix("gate_proj", inner, hidden, "outputs", "ffn", keys),
            Matrix("up_proj", inner, hidden, "outputs", "ffn", keys),
            Matrix("down_proj", hidden, inner, "inputs", "ffn", keys[::-1]),
        )

    def memory(self, rank: Rank, fp8: bool) -> LayerMemory:
        """Return what training keeps: input, gate, its sigmoid, up, their product."""
        gate, _, down = self.matrices()
        inner = rank.act(self.ffn_hidden_size)
        kept = rank.input(gate, fp8) + 3 * inner + rank.saved_input(down, inner, fp8)
        return LayerMemory(kept, rank.residual + rank.gathered + 2 * inner + rank.weight(down))

    def tensors(self, ours: str, theirs: str) -> Iterator[Tensors]:
        """Yield norm, gate, up and down."""
        yield input_norm(self.hidden_size, f"{ours}norm.weight", f"{ours}gate_proj.layer_norm_weight", theirs)
        for matrix in self.matrices():
            shape = (matrix.outputs, matrix.inputs)
            yield Tensors({f"{ours}{matrix.name}.weight": shape}, {f"{theirs}{matrix.name}.weight": shape})

    def axes(self) -> tuple[Axis, ...]:
        """Return the neurons."""
        return (Axis("neurons", "ffn_hidden_size", self.ffn_hidden_size, "neurons"),)

    def cuts(self, kept: Mapping[str, Indices], hidden: Indices) -> tuple[Cut, ...]:
        """Return what stays of norm, gate, up and down."""
        stream, neurons = stays(hidden, self.hidden_size), stays(kept["neurons"], self.ffn_hidden_size)
        return (stream, None), (neurons, stream), (neurons, stream), (stream, neurons)
