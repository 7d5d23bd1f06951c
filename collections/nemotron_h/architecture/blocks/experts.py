"""A mixture of experts: a router sends each token to a few of many FFNs, and all tokens pass a shared one (Nemotron 3).

The router scores a token by the sigmoid of its logits. A correction bias, which no gradient changes, is added to choose
the experts; the chosen ones' scores, normalised and scaled, weigh their outputs. Experts and shared expert are
squared-ReLU FFNs without biases. With a latent size the experts work between two linear layers, narrower than the
residual stream. Routed experts are split over expert-parallel ranks, and none of them over tensor-parallel ranks
(megatron-core's `expert_tensor_parallel_size` 1).
"""

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
    Operation,
    Tensors,
    input_norm,
    stays,
)

if TYPE_CHECKING:
    from nemotron_h.architecture.rank import Rank


@dataclass(frozen=True)
class Experts(Block):
    """A router, its experts and a shared one; the attributes are as in `ModelDefinition`."""

    letter: ClassVar[str] = "E"
    name: ClassVar[str] = "experts"
    title: ClassVar[str] = "mixture of experts"
    widths: ClassVar[tuple[str, ...]] = (
        "num_experts",
        "experts_per_token",
        "expert_hidden_size",
        "shared_expert_hidden_size",
        "expert_scaling",
        "expert_latent_size",
    )
    optional: ClassVar[tuple[str, ...]] = ("expert_latent_size",)
    at_most: ClassVar[tuple[tuple[str, str], ...]] = (("experts_per_token", "num_experts"),)
    sharded: ClassVar[tuple[str, ...]] = ("shared_expert_hidden_size",)
    distributed: ClassVar[tuple[str, ...]] = ("num_experts",)
    llama_cpp: ClassVar[Mapping[str, str]] = {
        "norm.weight": "attn_norm.weight",
        "mixer.gate.weight": "ffn_gate_inp.weight",
        "mixer.gate.e_score_correction_bias": "exp_probs_b.bias",
        "mixer.experts.up_proj.weight": "ffn_up_exps.weight",
        "mixer.experts.down_proj.weight": "ffn_down_exps.weight",
        "mixer.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
        "mixer.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
    }

    num_experts: int
    experts_per_token: int
    expert_hidden_size: int
    shared_expert_hidden_size: int
    expert_scaling: float
    expert_latent_size: int = 0

    @property
    def expert_width(self) -> int:
        """Return the width of the routed experts' inputs and outputs."""
        return self.expert_latent_size or self.hidden_size

    def matrices(self) -> tuple[Matrix, ...]:
        """Return router, projection to the latent, up and down of the experts, the way back, the shared up and down."""
        hidden, width, latent = self.hidden_size, self.expert_width, self.expert_latent_size
        inner, shared = self.expert_hidden_size, self.shared_expert_hidden_size
        stream = "expert_latent_size" if latent else "hidden_size"
        routed = {"experts": self.num_experts, "active": self.experts_per_token}
        up, down = (stream, "expert_hidden_size"), ("hidden_size", "shared_expert_hidden_size")
        keys = ("hidden_size", "num_experts")
        router = Matrix("router", self.num_experts, hidden, "", "router", keys, adapts=False, exact=True, parts=None)
        experts = (
            Matrix("experts.linear_fc1", inner, width, "", "experts", up, **routed),
            Matrix("experts.linear_fc2", width, inner, "", "experts", up[::-1], **routed),
        )
        if latent:
            keys = ("hidden_size", "expert_latent_size")
            experts = (
                Matrix("fc1_latent_proj", latent, hidden, "", "experts", keys),
                *experts,
                Matrix("fc2_latent_proj", hidden, latent, "", "experts", keys[::-1]),
            )
        return (
            router,
            *experts,
            Matrix("shared_experts.linear_fc1", shared, hidden, "outputs", "experts", down),
            Matrix("shared_experts.linear_fc2", hidden, shared, "inputs", "experts", down[::-1]),
        )

    def tensor_count(self) -> int:
        """Return the matrices and the correction bias."""
        return len(self.matrices()) + 1

    def pieces(self, tensor: int) -> int:
        """Return a piece of each expert's matrices, those of the shared one on each rank, and the others whole."""
        matrices = self.matrices()
        return 1 + sum(matrix.experts or (tensor if matrix.split else 1) for matrix in matrices)

    def vectors(self) -> int:
        """Return the correction bias: a number for each expert."""
        return self.num_experts

    def whole_parameters(self) -> int:
        """Return norm, router, its bias and the latent's projections, which every tensor-parallel rank holds."""
        return self.hidden_size * (1 + self.num_experts + 2 * self.expert_latent_size) + self.num_experts

    def float32_parameters(self, tensor: int = 1) -> int:
        """Return the router's, with its bias."""
        return self.num_experts * (self.hidden_size + 1)

    def operations(self, seq_length: int, chunk: int) -> Iterator[Operation]:
        """Yield a token's matmuls: of the routed experts those of the chosen ones."""
        for matrix in self.matrices():
            yield Operation(matrix.part, 2 * matrix.active_size, matrix)

    def memory(self, rank: Rank, fp8: bool) -> LayerMemory:
        """Return what training keeps and allocates, with tokens spread evenly over the experts.

        A rank sends its tokens to their experts, `experts_per_token` rows each, and gets as many rows.
        """
        by_name = {matrix.name: matrix for matrix in self.matrices()}
        *_, up, down = by_name.values()
        first, second = by_name["experts.linear_fc1"], by_name["experts.linear_fc2"]
        tokens = rank.own_tokens
        rows, e = tokens * self.experts_per_token, rank.e
        width, inner = rows * self.expert_width * e, rows * self.expert_hidden_size * e
        shared = rank.act(self.shared_expert_hidden_size)
        # megatron-core's dispatcher holds weights in float32, the choice, and the order of the rows
        between = tokens * self.num_experts * (4 + 1) + rows * 8
        # logits, scores and their sum in float32, and the order of the rows before and after each exchange
        routing = tokens * self.num_experts * 3 * 4 + rows * 3 * 8
        # relu(x), relu(x)^2, and that weighed by its score, the second matmul's input
        experts = rank.saved_input(first, width, fp8) + 2 * inner + rank.saved_input(second, inner, fp8)
        both = shared + rank.saved_input(down, shared, fp8)
        kept = rank.input(up, fp8) + routing + experts + both
        if self.expert_latent_size:
            kept += rank.saved_input(by_name["fc2_latent_proj"], tokens * self.expert_latent_size * e, fp8)
        # the rows as they came, the experts' outputs one by one, and together; on a GPU in groups, whose backward has
        # the gradients of all inner activations at once
        routed = 3 * width if rank.cpu else max(3 * width, width + 3 * inner)
        backward = rank.residual + max(routed, rank.gathered + shared + rank.weight(down))
        return LayerMemory(kept, backward, between)

    def tensors(self, ours: str, theirs: str) -> Iterator[Tensors]:
        """Yield norm, router, its bias, the experts' up and down, the latent's projections, the shared up and down.

        In a checkpoint of megatron-core a tensor holds one matrix of all experts, [experts, outputs, inputs].
        """
        hidden, mlp, mixer = self.hidden_size, f"{ours}mlp.", f"{theirs}mixer."
        yield input_norm(hidden, f"{ours}pre_mlp_layernorm.weight", "", theirs)
        shape = (self.num_experts, hidden)
        yield Tensors({f"{mlp}router.weight": shape}, {f"{mixer}gate.weight": shape}, exact=True)
        bias = {f"{mlp}router.expert_bias": shape[:1]}
        yield Tensors(bias, {f"{mixer}gate.e_score_correction_bias": shape[:1]}, exact=True)
        for matrix in self.matrices()[1:]:
            name, shape = matrix.name, (matrix.outputs, matrix.inputs)
            other = name.replace("linear_fc1", "up_proj").replace("linear_fc2", "down_proj")
            if not matrix.experts:
                yield Tensors({f"{mlp}{name}.weight": shape}, {f"{mixer}{other}.weight": shape})
                continue
            every = {
                f"{mixer}{other.replace('experts.', f'experts.{number}.')}.weight": shape
                for number in range(matrix.experts)
            }
            yield Tensors({f"{mlp}experts.{name}.weight": (matrix.experts, *shape)}, every, stacked=True)

    def axes(self) -> tuple[Axis, ...]:
        """Return the routed experts, the neurons of each, and those of the shared one; none with a latent, which only
        plans know.
        """
        if self.expert_latent_size:
            return ()
        inner, shared = self.expert_hidden_size, self.shared_expert_hidden_size
        return (
            Axis("experts", "num_experts", self.num_experts, "experts"),
            Axis("expert_neurons", "expert_hidden_size", inner, "expert_neurons", each="experts"),
            Axis("shared_neurons", "shared_expert_hidden_size", shared, "shared_neurons"),
        )

    def cuts(self, kept: Mapping[str, Indices], hidden: Indices) -> tuple[Cut, ...]:
        """Return what stays of each tensor; router and correction bias lose the rows of the experts that go."""
        stay = {axis.key: stays(kept[axis.name], axis.size) for axis in self.axes()}
        stream, experts = stays(hidden, self.hidden_size), stay.get("num_experts")
        stay["hidden_size"] = stream
        cuts: list[Cut] = [(stream, None), (experts, stream), (experts, None)]
        for matrix in self.matrices()[1:]:
            columns, rows = (stay.get(key) for key in matrix.keys)
            cuts.append((experts, rows, columns) if matrix.experts else (rows, columns))
        return tuple(cuts)
