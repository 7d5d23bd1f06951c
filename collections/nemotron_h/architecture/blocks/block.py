"""A block: all that is known of one kind of layer without running it. Imports no torch.

A model is a list of blocks. Parameters, FLOPs, memory, states, adapters, pruning, tensor names and the table of matmuls
are asked of them; how a block runs is in `model/blocks/`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from nemotron_h.core.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from nemotron_h.architecture.rank import Rank

Shape = tuple[int, ...]
Indices: TypeAlias = "np.ndarray"
#: what stays of a tensor along each of its first axes, rows and columns of a matrix; None is all of them. Indices of
#: two dimensions have a row for each place that stays on the first axis.
Cut: TypeAlias = "tuple[Indices | None, ...]"


@dataclass(frozen=True)
class Matrix:
    """The weight of a linear layer, [outputs, inputs].

    Attributes:
        name: of Megatron's module.
        split: what tensor-parallel ranks split: `outputs` (column parallel), `inputs` (row parallel), or "", nothing.
        part: of `planning.flops.FlopsByPart`.
        keys: of the model, that inputs and outputs come from.
        experts: how many experts have one each, over all expert-parallel ranks; 0 where all tokens pass the same one.
        active: of these, how many a token passes.
        adapts: it may have an adapter.
        exact: in float32 whatever the model's dtype, and never in FP8.
        parts: outputs of the parts that Muon orthogonalizes one by one; () is the matrix as one, None leaves it to
            AdamW. Each tensor-parallel rank has its share of every part.
        groups: how often the parts follow each other; with several, tensor-parallel ranks split the groups, and every
            part is whole.
    """

    name: str
    outputs: int
    inputs: int
    split: str
    part: str
    keys: tuple[str, str]
    experts: int = 0
    active: int = 1
    adapts: bool = True
    exact: bool = False
    parts: tuple[int, ...] | None = ()
    groups: int = 1

    @property
    def size(self) -> int:
        """Return its number of parameters, over all experts."""
        return self.outputs * self.inputs * (self.experts or 1)

    @property
    def active_size(self) -> int:
        """Return the number of parameters that one token passes."""
        return self.outputs * self.inputs * self.active

    def adapter_size(self, rank: int, lengths: bool) -> int:
        """Return the parameters of adapters of this rank, over all experts; `lengths` are DoRA's."""
        return (rank * (self.outputs + self.inputs) + self.outputs * lengths) * (self.experts or 1)

    def on_rank(self, tensor: int) -> tuple[int, int]:
        """Return outputs and inputs of the part that one of `tensor` ranks has."""
        if self.split == "inputs":
            return self.outputs, self.inputs // tensor
        return self.outputs // (tensor if self.split else 1), self.inputs

    def part_rows(self, tensor: int = 1) -> tuple[range, ...]:
        """Return the rows of the parts that Muon orthogonalizes, on one of `tensor` ranks."""
        if self.parts is None:
            return ()
        outputs = self.on_rank(tensor)[0]
        shares = tensor if self.split == "outputs" and self.groups == 1 else 1
        sizes = [part // shares for part in self.parts] or [outputs]
        sizes *= outputs // sum(sizes)
        ends = list(itertools.accumulate(sizes))
        return tuple(range(end - size, end) for size, end in zip(sizes, ends, strict=True))

    def part_shapes(self) -> tuple[Shape, ...]:
        """Return the shapes of the parts that Muon orthogonalizes, of one expert and over all ranks."""
        return tuple((len(rows), self.inputs) for rows in self.part_rows())


@dataclass(frozen=True)
class Operation:
    """Operation of a forward pass and its FLOPs.

    Attributes:
        part: of `planning.flops.FlopsByPart`.
        forward: FLOPs per token.
        matrix: the weight, or None.
        of_activations: both factors are activations, none is a weight.
    """

    part: str
    forward: float
    matrix: Matrix | None = None
    of_activations: bool = False


@dataclass(frozen=True, eq=False)
class Tensors:
    """The same numbers under both of their names: Megatron's checkpoint (`ours`) and Hugging Face's (`theirs`).

    Attributes:
        ours, theirs: names and shapes; along the first axis both sum to the same number of rows.
        fused: our name where Transformer Engine's layers hold a norm inside the projection that follows it, or "".
        order: for each row of `theirs`, the row of `ours` that it is; None where both are in one order.
        exact: in float32 whatever the model's dtype; the scan's decays are exponentials of it.
        padded: rows of padding, which depend on the layout that trained, may follow in `ours`.
        stacked: `ours` is one tensor, of `theirs` along a first axis of its own.
    """

    ours: dict[str, Shape]
    theirs: dict[str, Shape]
    fused: str = ""
    order: Indices | None = None
    exact: bool = False
    padded: bool = False
    stacked: bool = False


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of one layer and micro-batch.

    Attributes:
        kept: between its forward and its backward.
        backward: on top of that, at the worst moment of its backward.
        between: from its first forward on, until the next one replaces it.
    """

    kept: int
    backward: int
    between: int = 0


@dataclass(frozen=True)
class Axis:
    """Channels of a block that pruning may remove.

    Attributes:
        name: as in importance artefacts and errors.
        key: of the model, that states how many there are.
        size: how many there are.
        activation: by whose size they are chosen, as `Running.whole` names it; axes of the same one are its dimensions.
        groups: each keeps the same number of them.
        each: axis of which every place has channels of its own, as many as the others: its dimension comes first.
    """

    name: str
    key: str
    size: int
    activation: str
    groups: int = 1
    each: str = ""


@dataclass(frozen=True)
class AttentionHeads:
    """Heads of a layer's attention and where they are: rows of its queries, keys and values, columns of its output.

    Attributes:
        groups: key-value heads.
        queries: query heads of each; a group's follow each other, in the order of the key-value heads.
        dim: channels of a head.
        rotary: of these the first ones that positions rotate, channel n together with n + rotary / 2.
        key: of the model, that states `groups`.
        qkv, proj: places of the projections among `Block.tensors`; `theirs` of the first are queries, keys, values.
        fixed: switches of the model by which queries and keys are more than their projection: no rotation of a head's
            channels leaves the scores as they are, or the projection alone does not hold it.
    """

    groups: int
    queries: int
    dim: int
    rotary: int
    key: str
    qkv: int
    proj: int
    fixed: tuple[str, ...] = ()

    def check_free(self, asked: str) -> None:
        """Refuse to merge heads of which something is `fixed`.

        Args:
            asked: begins the error: what asks for it.
        Errors:
            UserError: names the model's keys.
        """
        if self.fixed:
            raise UserError(
                f"{asked}: the model has model.{' and model.'.join(self.fixed)}, through which no rotation of a head "
                "goes, so key-value heads are not merged",
                hint=f"keep all {self.groups}: layers, FFNs and the hidden size can be pruned",
            )


@dataclass(frozen=True)
class Block:
    """Layer of a model, with its own widths.

    Attributes of a kind:
        letter: in a pattern.
        name: in recipes (`recompute.<name>`, `expect.<name>`), tables and errors.
        title: in sentences.
        widths: keys of the model that this kind needs; a pattern without a kind that needs a key must leave it out.
        optional: those of `widths` that may be left out.
        divides: pairs of keys of which the first is a multiple of the second.
        at_most: pairs of keys of which the first is no larger than the second.
        sharded: keys that tensor-parallel ranks split, the one that says most first.
        exchanges: pairs of keys, heads and the groups that these share, of what mixes tokens: context-parallel ranks
            exchange tokens for them. A kind without them sees each token alone.
        pads: those heads of `exchanges` that are filled up where they do not divide.
        distributed: keys that expert-parallel ranks split.
        attends: attention's positions and documents matter to it.
        switches: keys of the model, true or false, that it has a part for.
        lacks: switches that it has no part for although a layer of it is what another kind switches by them.
        multipliers: those that it applies.
        llama_cpp: Hugging Face's name of a tensor, inside the layer -> llama.cpp's; of experts without their number.
    """

    letter: ClassVar[str]
    name: ClassVar[str]
    title: ClassVar[str]
    widths: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]] = ()
    divides: ClassVar[tuple[tuple[str, str], ...]] = ()
    at_most: ClassVar[tuple[tuple[str, str], ...]] = ()
    sharded: ClassVar[tuple[str, ...]] = ()
    exchanges: ClassVar[tuple[tuple[str, str], ...]] = ()
    pads: ClassVar[tuple[str, ...]] = ()
    distributed: ClassVar[tuple[str, ...]] = ()
    attends: ClassVar[bool] = False
    switches: ClassVar[tuple[str, ...]] = ()
    lacks: ClassVar[tuple[str, ...]] = ()
    multipliers: ClassVar[tuple[str, ...]] = ()
    llama_cpp: ClassVar[Mapping[str, str]] = {}

    hidden_size: int

    @classmethod
    def of(cls, widths: Mapping[str, Any]) -> Block:
        """Return the block with the widths of a layer, by their keys in the model."""
        return cls(widths["hidden_size"], *(widths[key] for key in cls.widths))

    def matrices(self) -> tuple[Matrix, ...]:
        """Return the weights of the linear layers, in the order in which a forward pass uses them."""
        raise NotImplementedError

    def tensor_count(self) -> int:
        """Return how many `ours` of `tensors` has beside the input norm."""
        return len(self.matrices())

    def pieces(self, tensor: int) -> int:
        """Return the pieces of these that a checkpoint of `tensor` ranks has; each rank writes one of each."""
        return self.tensor_count() * tensor

    def vectors(self) -> int:
        """Return the parameters beside the matrices and the input norm."""
        return 0

    def whole_parameters(self) -> int:
        """Return the parameters that every tensor-parallel rank holds: the input norm's."""
        return self.hidden_size

    def float32_parameters(self, tensor: int = 1) -> int:
        """Return the parameters of one of `tensor` ranks that stay in float32 in any precision."""
        return 0

    @property
    def parameters(self) -> int:
        """Return all parameters, the input norm included."""
        return self.hidden_size + sum(matrix.size for matrix in self.matrices()) + self.vectors()

    @property
    def active_parameters(self) -> int:
        """Return the parameters that one token passes: of the routed experts those of the chosen ones."""
        return self.hidden_size + sum(matrix.active_size for matrix in self.matrices()) + self.vectors()

    @property
    def expert_parameters(self) -> int:
        """Return the parameters of the routed experts, which expert-parallel ranks split."""
        return sum(matrix.size for matrix in self.matrices() if matrix.experts)

    def operations(self, seq_length: int, chunk: int) -> Iterator[Operation]:
        """Yield what a forward pass does, in order.

        Args:
            seq_length: tokens of a sequence.
            chunk: tokens of a chunk of the scan.
        """
        for matrix in self.matrices():
            yield Operation(matrix.part, 2 * matrix.size, matrix)

    def exchanged(self, tensor: int, context: int) -> int:
        """Return the values of a token that a rank of `tensor` exchanges with `context` ranks in a forward pass."""
        return 0

    @property
    def addressed(self) -> int:
        """Return the values of a token in the widest tensor that kernels address in 32 bits; 0 is none."""
        return 0

    def empty_flops(self, seq_length: int, tensor: int, context: int) -> float:
        """Return forward FLOPs per token of heads that are filled up."""
        return 0

    def states(self, context: int) -> dict[str, int]:
        """Return the values that a sequence of `context` tokens keeps, by part of `planning.inference`."""
        return {}

    def memory(self, rank: Rank, fp8: bool) -> LayerMemory:
        """Return what training keeps and allocates, without recomputation of the whole layer.

        Args:
            rank: sizes of one rank's tensors.
            fp8: this layer's matmuls run in FP8.
        """
        raise NotImplementedError

    def tensors(self, ours: str, theirs: str) -> Iterator[Tensors]:
        """Yield all tensors, in the order in which the layer applies them.

        Args:
            ours, theirs: prefixes of the layer's names.
        """
        raise NotImplementedError

    def llama_cpp_shape(self, name: str, shape: Shape) -> Shape:
        """Return the shape of one of llama.cpp's tensors, of that in Hugging Face's file."""
        return shape

    def row_scales(self, name: str) -> tuple[tuple[int, float], ...]:
        """Return the multipliers that a tensor's rows have in them where a format knows none: numbers of rows, each
        with its factor; none where all are 1.

        Args:
            name: Hugging Face's, inside the layer.
        """
        return ()

    def attention_heads(self) -> AttentionHeads | None:
        """Return the heads of its attention; None where it has none."""
        return None

    def axes(self) -> tuple[Axis, ...]:
        """Return what pruning may remove beside the layer and channels of the residual stream."""
        return ()

    def activations(self) -> dict[str, tuple[Axis, ...]]:
        """Return activation -> the axes that are its dimensions, that of an axis' `each` first."""
        axes = {axis.name: axis for axis in self.axes()}
        dimensions: dict[str, tuple[Axis, ...]] = {}
        for axis in axes.values():
            outer = (axes[axis.each],) if axis.each else dimensions.get(axis.activation, ())
            dimensions[axis.activation] = (*outer, axis)
        return dimensions

    def masks(self, kept: Mapping[str, Indices]) -> dict[str, np.ndarray]:
        """Return activation -> for each of its channels, bool, if it stays; those that lose none are left out.

        Args:
            kept: as of `cuts`.
        """
        import numpy as np  # a plan does without

        masks = {}
        for activation, axes in self.activations().items():
            mask = np.zeros([axis.size for axis in axes], dtype=bool)
            *outer, last = (kept[axis.name] for axis in axes)
            mask[(outer[0][:, None], last) if axes[-1].each else np.ix_(*outer, last)] = True
            if not mask.all():
                masks[activation] = mask.reshape(-1)
        return masks

    def cuts(self, kept: Mapping[str, Indices], hidden: Indices) -> tuple[Cut, ...]:
        """Return what stays of each of `tensors`.

        Args:
            kept: axis -> what stays of it, ascending; a row for each place that stays of an axis' `each`.
            hidden: channels of the residual stream that stay.
        """
        raise NotImplementedError


def copies(groups: int, context: int) -> int:
    """Return the context-parallel ranks that get the same of a tensor-parallel rank's groups."""
    return max(context // groups, 1)


def filled_up(heads: int, groups: int, context: int) -> int:
    """Return the heads of a tensor-parallel rank with those that let context-parallel ranks split every group's."""
    units = groups * copies(groups, context)
    return -(-heads // units) * units


def stays(indices: Indices, size: int) -> Indices | None:
    """Return the indices that stay of `size`, None where all do."""
    return None if indices.shape[-1] == size else indices


def input_norm(hidden_size: int, ours: str, fused: str, theirs: str) -> Tensors:
    """Return the norm before a layer.

    Args:
        ours, fused: its name as a layer of its own, and inside the projection that follows.
        theirs: prefix of the layer's names.
    """
    shape = (hidden_size,)
    return Tensors({ours: shape}, {f"{theirs}norm.weight": shape}, fused=fused)
