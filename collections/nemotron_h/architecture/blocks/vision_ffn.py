"""Feed-forward layer of an image encoder: GELU between two matrices with biases; InternViT (arXiv 2312.14238)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from nemotron_h.architecture.blocks.block import Block, LayerMemory, Matrix, Tensors
from nemotron_h.architecture.blocks.vision_attention import vision_norm

if TYPE_CHECKING:
    from nemotron_h.architecture.rank import Rank


@dataclass(frozen=True)
class VisionFFN(Block):
    """A GELU FFN; the attributes are as in `VisionSchema`.

    Attributes:
        norm_bias: the norm before the layer has a bias: it is a LayerNorm.
    """

    letter: ClassVar[str] = "F"
    name: ClassVar[str] = "vision_ffn"
    title: ClassVar[str] = "FFN of the encoder"
    widths: ClassVar[tuple[str, ...]] = ("ffn_hidden_size", "norm_bias")
    sharded: ClassVar[tuple[str, ...]] = ("ffn_hidden_size",)

    ffn_hidden_size: int
    norm_bias: bool

    def matrices(self) -> tuple[Matrix, ...]:
        """Return up and down."""
        hidden, inner, keys = self.hidden_size, self.ffn_hidden_size, ("vision.hidden_size", "vision.ffn_hidden_size")
        shared = {"part": "vision", "adapts": False, "parts": None}
        return (
            Matrix("linear_fc1", inner, hidden, "outputs", keys=keys, **shared),
            Matrix("linear_fc2", hidden, inner, "inputs", keys=keys[::-1], **shared),
        )

    def vectors(self) -> int:
        """Return biases and LayerScale."""
        return self.ffn_hidden_size + self._whole_vectors

    def whole_parameters(self) -> int:
        """Return the norm, the output's bias and LayerScale."""
        return super().whole_parameters() + self._whole_vectors

    @property
    def _whole_vectors(self) -> int:
        return self.hidden_size * (2 + self.norm_bias)

    def memory(self, rank: Rank, fp8: bool) -> LayerMemory:
        """Return what training keeps and allocates."""
        up, down = self.matrices()
        inner = rank.act(self.ffn_hidden_size)
        # both sides of the GELU, and the output before LayerScale
        kept = rank.input(up, False) + 2 * inner + rank.residual
        return LayerMemory(kept, 2 * rank.residual + max(inner + rank.weight(down), 2 * inner))

    def tensors(self, ours: str, theirs: str) -> Iterator[Tensors]:
        """Yield norm, up, down, LayerScale."""
        hidden, inner = self.hidden_size, self.ffn_hidden_size
        yield from vision_norm(hidden, self.norm_bias, ours, f"{theirs}layernorm_after")
        for name, outputs, inputs in (("fc1", inner, hidden), ("fc2", hidden, inner)):
            for what, shape in (("weight", (outputs, inputs)), ("bias", (outputs,))):
                yield Tensors({f"{ours}linear_{name}.{what}": shape}, {f"{theirs}mlp.{name}.{what}": shape})
        yield Tensors({f"{ours}layer_scale": (hidden,)}, {f"{theirs}lambda_2": (hidden,)})
