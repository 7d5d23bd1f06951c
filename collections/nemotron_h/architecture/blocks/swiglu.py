"""A feed-forward layer with a gate: down(up(x) silu(gate(x))), as Falcon-H1 has it (arXiv 2507.22448).

Its letter is S: `-` is the FFN without a gate, and G, E and D are other layers of Megatron's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from nemotron_h.architecture.blocks.block import Axis, Block, Cut, Indices, LayerMemory, Matrix, Tensors, stays
from nemotron_h.architecture.multipliers import ONES, Multipliers

if TYPE_CHECKING:
    from nemotron_h.architecture.rank import Rank


@dataclass(frozen=True)
class SwiGLU(Block):
    """A SwiGLU FFN; the width is as in `ModelDefinition`.

    Attributes:
        scales: of the model; those of `multipliers` are applied.
    """

    letter: ClassVar[str] = "S"
    name: ClassVar[str] = "swiglu"
    title: ClassVar[str] = "SwiGLU"
    widths: ClassVar[tuple[str, ...]] = ("ffn_hidden_size",)
    sharded: ClassVar[tuple[str, ...]] = ("ffn_hidden_size",)
    multipliers: ClassVar[tuple[str, ...]] = ("ffn_gate", "ffn_down")
    llama_cpp: ClassVar[Mapping[str, str]] = {
        "pre_ff_layernorm.weight": "ffn_norm",  # no ".weight" there
        "feed_forward.gate_proj.weight": "ffn_gate.weight",
        "feed_forward.up_proj.weight": "ffn_up.weight",
        "feed_forward.down_proj.weight": "ffn_down.weight",
    }

    ffn_hidden_size: int
    scales: Multipliers = ONES

    @classmethod
    def of(cls, widths: Mapping[str, Any]) -> SwiGLU:
        """Return the block with the widths of a layer."""
        return replace(super().of(widths), scales=widths["multipliers"])

    def matrices(self) -> tuple[Matrix, ...]:
        """Return gate and up in one, and down."""
        hidden, inner, widths = self.hidden_size, self.ffn_hidden_size, ("hidden_size", "ffn_hidden_size")
        return (
            Matrix("linear_fc1", 2 * inner, hidden, "outputs", "ffn", widths, parts=(inner, inner)),
            Matrix("linear_fc2", hidden, inner, "inputs", "ffn", ("ffn_hidden_size", "hidden_size")),
        )

    def memory(self, rank: Rank, fp8: bool) -> LayerMemory:
        """Return what training keeps and allocates."""
        up, down = self.matrices()
        inner = rank.act(self.ffn_hidden_size)
        product = rank.saved_input(down, inner, fp8)
        kept = rank.input(up, fp8) + 2 * inner
        # the product's gradient; then those of gate and up, and two buffers that they are computed in
        backward = rank.residual + max(rank.gathered + inner + rank.weight(down), 5 * inner)
        if rank.layout.recompute(self.name) == "activation":
            return LayerMemory(kept, backward + inner + product)
        return LayerMemory(kept + product, backward)

    def tensors(self, ours: str, theirs: str) -> Iterator[Tensors]:
        """Yield norm, gate with up, and down."""
        hidden, inner, mlp = self.hidden_size, self.ffn_hidden_size, f"{theirs}feed_forward."
        yield Tensors(
            {f"{ours}pre_mlp_layernorm.weight": (hidden,)},
            {f"{theirs}pre_ff_layernorm.weight": (hidden,)},
            fused=f"{ours}mlp.linear_fc1.layer_norm_weight",
        )
        yield Tensors(
            {f"{ours}mlp.linear_fc1.weight": (2 * inner, hidden)},
            {f"{mlp}gate_proj.weight": (inner, hidden), f"{mlp}up_proj.weight": (inner, hidden)},
        )
        yield Tensors({f"{ours}mlp.linear_fc2.weight": (hidden, inner)}, {f"{mlp}down_proj.weight": (hidden, inner)})

    def row_scales(self, name: str) -> tuple[tuple[int, float], ...]:
        """Return the gate's and the output's."""
        rows, scale = {
            "feed_forward.gate_proj.weight": (self.ffn_hidden_size, self.scales.ffn_gate),
            "feed_forward.down_proj.weight": (self.hidden_size, self.scales.ffn_down),
        }.get(name, (0, 1.0))
        return () if scale == 1 else ((rows, scale),)

    def axes(self) -> tuple[Axis, ...]:
        """Return the neurons."""
        return (Axis("neurons", "ffn_hidden_size", self.ffn_hidden_size, "neurons"),)

    def cuts(self, kept: Mapping[str, Indices], hidden: Indices) -> tuple[Cut, ...]:
        """Return what stays of norm, gate with up, and down."""
        import numpy as np  # a plan does without

        stream, neurons = stays(hidden, self.hidden_size), stays(kept["neurons"], self.ffn_hidden_size)
        both = None if neurons is None else np.concatenate([neurons, self.ffn_hidden_size + neurons])
        return (stream, None), (both, stream), (stream, neurons)
