"""A feed-forward layer: squared ReLU between two matrices, no gate (paper 2.1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

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

if TYPE_CHECKING:
    from nemotron_h.architecture.rank import Rank


@dataclass(frozen=True)
class FFN(Block):
    """A squared-ReLU FFN; the attribute is as in `ModelDefinition`."""

    letter: ClassVar[str] = "-"
    name: ClassVar[str] = "ffn"
    title: ClassVar[str] = "FFN"
    widths: ClassVar[tuple[str, ...]] = ("ffn_hidden_size",)
    sharded: ClassVar[tuple[str, ...]] = ("ffn_hidden_size",)
    llama_cpp: ClassVar[Mapping[str, str]] = {
        "norm.weight": "attn_norm.weight",
        "mixer.up_proj.weight": "ffn_up.weight",
        "mixer.down_proj.weight": "ffn_down.weight",
    }

    ffn_hidden_size: int

    def matrices(self) -> tuple[Matrix, ...]:
        """Return up and down."""
        hidden, inner = self.hidden_size, self.ffn_hidden_size
        return (
            Matrix("linear_fc1", inner, hidden, "outputs", "ffn", ("hidden_size", "ffn_hidden_size")),
            Matrix("linear_fc2", hidden, inner, "inputs", "ffn", ("ffn_hidden_size", "hidden_size")),
        )

    def memory(self, rank: Rank, fp8: bool) -> LayerMemory:
        """Return what training keeps and allocates."""
        up, down = self.matrices()
        inner = rank.act(self.ffn_hidden_size)
        second = rank.saved_input(down, inner, fp8)
        backward = rank.residual + rank.gathered + inner + rank.weight(down)
        if rank.layout.recompute(self.name) == "activation":
            # the first matmul's output is kept; relu(x) and relu(x)^2 come again before the second's backward
            return LayerMemory(rank.input(up, fp8) + inner, backward + inner + second)
        # relu(x), and relu(x)^2, the second matmul's input
        return LayerMemory(rank.input(up, fp8) + inner + second, backward)

    def tensors(self, ours: str, theirs: str) -> Iterator[Tensors]:
        """Yield norm, up and down."""
        yield input_norm(
            self.hidden_size, f"{ours}pre_mlp_layernorm.weight", f"{ours}mlp.linear_fc1.layer_norm_weight", theirs
        )
        for matrix, other in zip(self.matrices(), ("up_proj", "down_proj"), strict=True):
            shape = (matrix.outputs, matrix.inputs)
            yield Tensors({f"{ours}mlp.{matrix.name}.weight": shape}, {f"{theirs}mixer.{other}.weight": shape})

    def axes(self) -> tuple[Axis, ...]:
        """Return the neurons."""
        return (Axis("neurons", "ffn_hidden_size", self.ffn_hidden_size, "neurons"),)

    def cuts(self, kept: Mapping[str, Indices], hidden: Indices) -> tuple[Cut, ...]:
        """Return what stays of norm, up and down."""
        stream = stays(hidden, self.hidden_size)
        neurons = stays(kept["neurons"], self.ffn_hidden_size)
        return (stream, None), (neurons, stream), (stream, neurons)
