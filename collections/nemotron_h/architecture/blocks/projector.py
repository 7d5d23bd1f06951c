"""The projector: a norm of an encoder's channels and two matrices to the language model's width (paper 4)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from nemotron_h.architecture.blocks.block import Block, LayerMemory, Matrix, Tensors

if TYPE_CHECKING:
    from nemotron_h.architecture.rank import Rank


@dataclass(frozen=True)
class Projector(Block):
    """RMSNorm, and a squared-ReLU FFN without biases; `hidden_size` is the width of what it reads.

    Attributes:
        ffn_hidden_size: inner width.
        output_size: hidden size of the language model.
    """

    letter: ClassVar[str] = "J"
    name: ClassVar[str] = "projector"
    title: ClassVar[str] = "projector"
    widths: ClassVar[tuple[str, ...]] = ("ffn_hidden_size", "output_size")
    sharded: ClassVar[tuple[str, ...]] = ("ffn_hidden_size",)

    ffn_hidden_size: int
    output_size: int

    def matrices(self) -> tuple[Matrix, ...]:
        """Return up and down."""
        inner, shared = self.ffn_hidden_size, {"part": "projector", "adapts": False, "parts": None}
        keys = ("vision.hidden_size", "projector.ffn_hidden_size", "hidden_size")
        return (
            Matrix("linear_fc1", inner, self.hidden_size, "outputs", keys=keys[:2], **shared),
            Matrix("linear_fc2", self.output_size, inner, "inputs", keys=keys[1:], **shared),
        )

    def memory(self, rank: Rank, fp8: bool) -> LayerMemory:
        """Return what training keeps and allocates."""
        up, down = self.matrices()
        inner = rank.act(self.ffn_hidden_size)
        kept = rank.input(up, False) + inner + rank.saved_input(down, inner, False)
        return LayerMemory(kept, rank.residual + 2 * inner + rank.weight(down))

    def tensors(self, ours: str, theirs: str) -> Iterator[Tensors]:
        """Yield norm, up and down; both names are one."""
        yield Tensors({f"{ours}norm.weight": (self.hidden_size,)}, {f"{theirs}norm.weight": (self.hidden_size,)})
        for matrix in self.matrices():
            shape = (matrix.outputs, matrix.inputs)
            yield Tensors({f"{ours}{matrix.name}.weight": shape}, {f"{theirs}{matrix.name}.weight": shape})
