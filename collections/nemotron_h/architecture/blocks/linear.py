"""A linear layer: y = x + W norm(x), in place of an attention layer or an FFN (Puzzle, arXiv 2411.19146)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from nemotron_h.architecture.blocks.block import Block, Cut, Indices, LayerMemory, Matrix, Tensors, input_norm, stays

if TYPE_CHECKING:
    from nemotron_h.architecture.rank import Rank


@dataclass(frozen=True)
class Linear(Block):
    """A linear layer, whose matrix [hidden, hidden] every tensor-parallel rank holds whole."""

    letter: ClassVar[str] = "L"
    name: ClassVar[str] = "linear"
    title: ClassVar[str] = "linear layer"
    widths: ClassVar[tuple[str, ...]] = ()

    def matrices(self) -> tuple[Matrix, ...]:
        """Return the matrix."""
        keys = ("hidden_size", "hidden_size")
        return (Matrix("linear", self.hidden_size, self.hidden_size, "", "linear_layers", keys),)

    def pieces(self, tensor: int) -> int:
        """Return the one piece of the matrix."""
        return 1

    def whole_parameters(self) -> int:
        """Return norm and matrix."""
        return self.parameters

    def memory(self, rank: Rank, fp8: bool) -> LayerMemory:
        """Return what training keeps and allocates."""
        (matrix,) = self.matrices()
        # gradients of output and normalised input, then of the input too, when the normalised input is gone
        product = 2 * rank.residual + rank.weight(matrix)
        norm = 3 * rank.residual - rank.saved_input(matrix, rank.residual, fp8) + rank.norm_blocks
        return LayerMemory(rank.input(matrix, fp8), max(product, norm))

    def tensors(self, ours: str, theirs: str) -> Iterator[Tensors]:
        """Yield norm and matrix."""
        shape = (self.hidden_size, self.hidden_size)
        yield input_norm(self.hidden_size, f"{ours}input_layernorm.weight", "", theirs)
        yield Tensors({f"{ours}linear.weight": shape}, {f"{theirs}mixer.linear.weight": shape})

    def cuts(self, kept: Mapping[str, Indices], hidden: Indices) -> tuple[Cut, ...]:
        """Return what stays of norm and matrix."""
        stream = stays(hidden, self.hidden_size)
        return (stream, None), (stream, stream)
