"""Attention of an image encoder: every patch sees every other; InternViT (arXiv 2312.14238; 2404.16821 3.1)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from nemotron_h.architecture.blocks.block import Block, Indices, LayerMemory, Matrix, Operation, Tensors

if TYPE_CHECKING:
    from nemotron_h.architecture.rank import Rank


@dataclass(frozen=True)
class VisionAttention(Block):
    """Attention in both directions; the attributes are as in `VisionSchema`.

    Attributes:
        norm_bias: the norm before the layer has a bias: it is a LayerNorm.
    """

    letter: ClassVar[str] = "A"
    name: ClassVar[str] = "vision_attention"
    title: ClassVar[str] = "attention of the encoder"
    widths: ClassVar[tuple[str, ...]] = ("num_attention_heads", "norm_bias", "qkv_bias", "qk_norm")
    divides: ClassVar[tuple[tuple[str, str], ...]] = (("hidden_size", "num_attention_heads"),)
    sharded: ClassVar[tuple[str, ...]] = ("num_attention_heads",)

    num_attention_heads: int
    norm_bias: bool
    qkv_bias: bool
    qk_norm: bool

    @property
    def head_dim(self) -> int:
        """Return the channels of a head."""
        return self.hidden_size // self.num_attention_heads

    def matrices(self) -> tuple[Matrix, ...]:
        """Return queries, keys and values in one, and the output projection."""
        hidden, keys = self.hidden_size, ("vision.hidden_size", "vision.hidden_size")
        shared = {"part": "vision", "keys": keys, "adapts": False, "parts": None}
        return (
            Matrix("linear_qkv", 3 * hidden, hidden, "outputs", **shared),
            Matrix("linear_proj", hidden, hidden, "inputs", **shared),
        )

    def vectors(self) -> int:
        """Return biases, norms of queries and keys, and LayerScale."""
        return self.hidden_size * (3 * self.qkv_bias + 2 * self.qk_norm) + self._whole_vectors

    def whole_parameters(self) -> int:
        """Return the norm, the output's bias and LayerScale."""
        return super().whole_parameters() + self._whole_vectors

    @property
    def _whole_vectors(self) -> int:
        return self.hidden_size * (2 + self.norm_bias)

    def operations(self, seq_length: int, chunk: int) -> Iterator[Operation]:
        """Yield projections and core: scores and weighted values of all pairs of positions."""
        qkv, projection = super().operations(seq_length, chunk)
        yield qkv
        yield Operation("vision", 4 * self.hidden_size * seq_length, of_activations=True)
        yield projection

    def memory(self, rank: Rank, fp8: bool) -> LayerMemory:
        """Return what training keeps and allocates."""
        qkv, projection = self.matrices()
        inner = rank.act(self.hidden_size)
        # queries, keys, values and the output; the kernel keeps a log-sum-exp of each row, a norm its inputs
        kept = 4 * inner + rank.tokens * self.num_attention_heads // rank.layout.tensor * 4
        if self.qk_norm:
            # queries and keys before and behind the norm's weights; in BF16 also wide, from which it is computed
            wide = 0 if rank.float32 else 2 * inner // rank.e * 4
            kept += 4 * inner + wide + 2 * rank.tokens * 4
        # the output before LayerScale
        kept += rank.input(qkv, False) + rank.residual
        backward = max(2 * rank.residual + rank.weight(projection), 4 * inner + rank.weight(qkv))
        return LayerMemory(kept, rank.residual + backward)

    def tensors(self, ours: str, theirs: str) -> Iterator[Tensors]:
        """Yield norm, queries with keys and values, norms of both, the output projection, LayerScale."""
        hidden = self.hidden_size
        yield from vision_norm(hidden, self.norm_bias, ours, f"{theirs}layernorm_before")
        order = self._query_key_value_order()
        for what, shape in (("weight", (hidden,)), ("bias", ()))[: 1 + self.qkv_bias]:
            yield Tensors(
                {f"{ours}linear_qkv.{what}": (3 * hidden, *shape)},
                {f"{theirs}attention.{name}_proj.{what}": (hidden, *shape) for name in "qkv"},
                order=order,
            )
        for name in ("q_norm", "k_norm")[: 2 * self.qk_norm]:
            yield Tensors({f"{ours}{name}.weight": (hidden,)}, {f"{theirs}attention.{name}.weight": (hidden,)})
        for what, shape in (("weight", (hidden, hidden)), ("bias", (hidden,))):
            yield Tensors({f"{ours}linear_proj.{what}": shape}, {f"{theirs}attention.projection_layer.{what}": shape})
        yield Tensors({f"{ours}layer_scale": (hidden,)}, {f"{theirs}lambda_1": (hidden,)})

    def _query_key_value_order(self) -> Indices:
        """Order ours (head by head its query, its key, its value) as theirs: all queries, all keys, all values."""
        import numpy as np  # a plan does without

        rows = np.arange(3 * self.hidden_size).reshape(self.num_attention_heads, 3, self.head_dim)
        return rows.transpose(1, 0, 2).reshape(-1)


def vision_norm(hidden: int, bias: bool, ours: str, theirs: str) -> Iterator[Tensors]:
    """Yield the norm before a layer; `theirs` is its name."""
    for what in ("weight", "bias")[: 1 + bias]:
        yield Tensors({f"{ours}norm.{what}": (hidden,)}, {f"{theirs}.{what}": (hidden,)})
