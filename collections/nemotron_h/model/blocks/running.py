"""Layers at run time: on Megatron's layers in training, on plain tensors in generation and compression.

Imports no Megatron: generation does without it. What needs it is imported where Megatron's layers are built.

Axes: b batch, l tokens, h hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from nemotron_h.architecture.blocks.block import Block
from nemotron_h.core.errors import UserError
from nemotron_h.ops.mixing_matrix import Mixing
from nemotron_h.ops.select import Ops

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec

    from nemotron_h.model.blocks.cpu_step import Residual
    from nemotron_h.model.core_attention import Documents

#: cosines and sines of rotary positions, [positions, 1, 1, channels]
Rotary = tuple[Tensor, Tensor]
#: told of the name and the values [b, l, channels] of an activation, or of their mean over l, [b, 1, channels]
Watch = Callable[[str, Tensor], None]
#: activation -> 1 or 0 for each of its channels, if it stays; those that lose none are left out
Masks = Mapping[str, Tensor]


@dataclass(frozen=True)
class Parts:
    """Classes that Megatron's layers are built of.

    Attributes:
        column, row: column- and row-parallel linear layers.
        attention: core attention.
        norm: before a layer; None where the column-parallel layer normalises its own input.
        plain_column, shared_norm: a column-parallel layer that never does, and a norm before several of them; None
            where `column` and `norm` are these.
        grouped: column- and row-parallel layers of all experts of a rank; None where each expert has its own.
        duplicated: a linear layer that every tensor-parallel rank holds whole.
    """

    column: type
    row: type
    attention: type
    norm: type | None
    plain_column: type | None = None
    shared_norm: type | None = None
    grouped: tuple[type, type] | None = None
    duplicated: type | None = None

    def unfused(self) -> Parts:
        """Return the classes for layers of which no projection normalises its input."""
        return replace(self, column=self.plain_column or self.column, norm=self.shared_norm or self.norm)

    def own_norm(self, name: str) -> dict[str, type]:
        """Return the norm as a submodule of this name, nothing where the projection has it inside."""
        return {} if self.norm is None else {name: self.norm}


@dataclass(frozen=True)
class Surroundings:
    """Positions, documents and weight of a pass, which a layer gets beside its input in training.

    Attributes:
        documents: of each whole row, for attention; None is one document a row.
        seq_idx: int32 [b, l], the document of each token of whole rows, or None.
        rotary: angles [l, 1, 1, channels], or None.
        loss_count: tokens or pairs that the loss of this micro-batch counts, int64, or None.
    """

    documents: Documents | None = None
    seq_idx: Tensor | None = None
    rotary: Tensor | None = None
    loss_count: Tensor | None = None


@dataclass(frozen=True)
class InitialWeights:
    """Initial weights keyed by (seed, global name), whatever the layout.

    Attributes:
        weight, residual: distributions of matrices, and of those that add to the residual stream.
        shard: keyword arguments of `model.init.fill`: seed, and what tensor parallelism splits.
    """

    weight: Any
    residual: Any
    shard: Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """Positions of a batch that reads one token each.

    Attributes:
        positions, lengths: int64 [b], on the device, before the token and with it.
        longest: of all sequences, with the token.
        ragged: the sequences differ in length.
        rotary: of the positions, or None.
    """

    positions: Tensor
    lengths: Tensor
    longest: int
    ragged: bool
    rotary: Rotary | None


@dataclass(frozen=True)
class Trial:
    """Positions of a batch that reads a few tokens each on trial.

    Attributes:
        positions, lengths: int64 [b], on the device, before the first of these tokens and with it.
        longest: of all sequences, with all of the tokens.
        slot: tokens of the window before these.
        rotary: of the positions, [b, l, 1, 1, channels] each, or None.
    """

    positions: Tensor
    lengths: Tensor
    longest: int
    slot: int
    rotary: Rotary | None


class State:
    """State of one layer for a batch; its tensors have the batch as first axis."""

    def rows(self, begin: int, end: int) -> State:
        """Return some of the sequences: a view."""
        return type(self)(*(t[begin:end] for t in vars(self).values()))

    def taken(self, rows: Tensor) -> State:
        """Return these sequences, int64 [rows]: a copy."""
        return type(self)(*(t[rows] for t in vars(self).values()))

    def put(self, rows: Tensor, other: State) -> None:
        """Replace these sequences, int64 [rows], by all those of another state of the same capacity."""
        for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True):
            mine[rows] = theirs

    def reserve(self, capacity: int) -> None:
        """Make room for sequences of so many tokens; what was read stays."""


class Running:
    """A layer of a model as it runs.

    Attributes of a kind:
        kind: its block.
        Weights: dataclass of its tensors in generation, in the order of `Block.tensors`.
        exact: fields of `Weights` that stay in float32 at least.

    Args:
        block: the layer's widths.
        epsilon: of norms.
    """

    kind: ClassVar[type[Block]]
    Weights: ClassVar[type]
    exact: ClassVar[tuple[str, ...]] = ()

    def __init__(self, block: Block, epsilon: float) -> None:
        self.block, self.epsilon = block, epsilon

    # training

    def layer_spec(self, parts: Parts) -> ModuleSpec:
        """Return the spec of Megatron's layer."""
        raise NotImplementedError

    def prepare_layer(self, layer: Any, config: Any) -> None:
        """Change a layer that Megatron has built, as the configuration asks."""

    def initialize(self, layer: Any, name: str, weights: InitialWeights) -> None:
        """Set the initial weights of Megatron's layer; `name` is its global name."""
        raise NotImplementedError

    def forward(self, layer: Any, hidden: Tensor, around: Surroundings) -> Tensor:
        """Return what Megatron's layer makes of [l, b, h]."""
        raise NotImplementedError

    # generation

    def weights(self, tensors: list[Tensor]) -> Any:
        """Return the layer's weights, of its tensors in the order of `Block.tensors`."""
        return self.Weights(*tensors)

    def loaded(self, weights: Any) -> Any:
        """Return weights as steps use them, of those that a checkpoint holds."""
        return weights

    def state(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> State | None:
        """Return the state before the first token; None where the layer remembers nothing."""
        return None

    def keys_and_values(self, w: Any, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [b, l, g, d] of the normalised input [b, l, h], before positions rotate the keys.

        Of layers alone whose block has `attention_heads`; multipliers that the weights hold are in them.
        """
        raise NotImplementedError

    def extend(self, ops: Ops, w: Any, h: Tensor, state: Any, start: int, rotary: Rotary | None, last: int) -> Tensor:
        """Read tokens.

        Args:
            h: [b, l, h], normalised.
            state: updated.
            start: position of the first token.
            last: tokens at the end whose outputs are wanted.
        Returns:
            [b, last, h].
        """
        raise NotImplementedError

    def step(self, ops: Ops, w: Any, h: Tensor, state: Any, at: Step) -> Tensor:
        """Read one token of every sequence, [b, h] normalised; return [b, h] and update the state."""
        raise NotImplementedError

    # generation with tokens that may be taken back: a window of them is read on trial while the state stays before it

    def window(self, state: Any, width: int) -> State | None:
        """Return room for what the layer remembers of a window beside its state; None where that is nothing.

        Errors:
            UserError: the kind has a state and cannot take tokens back.
        """
        if state is None:
            return None
        raise UserError(
            f"{self.kind.name} layers cannot take back tokens that they have read, as a draft needs",
            hint="leave --draft out",
        )

    def try_tokens(self, ops: Ops, w: Any, h: Tensor, state: Any, window: Any, at: Trial) -> Tensor:
        """Read more tokens of a window, [b, l, h] normalised; return [b, l, h]. The next token does not follow them
        before they are accepted.
        """
        return self.extend(ops, w, h, state, 0, None, h.shape[1])

    def accept(self, ops: Ops, w: Any, state: Any, window: Any, counts: Tensor) -> None:
        """Advance the state over the first tokens of the window, as many of each sequence as `counts`, int64 [b]."""

    def cpu_buffers(self, batch: int, dtype: torch.dtype) -> Any:
        """Return the buffers of `cpu_step`, made once per batch; layers of equal widths share them."""
        raise NotImplementedError

    def cpu_step(self, buffers: Any, residual: Residual, w: Any, h: Tensor, state: Any, at: Step) -> None:
        """Read one token of every sequence on the CPU, in as few operations as there can be, and add to the residual.

        Args:
            h: [b, h], to be multiplied by `residual.gain`.
        """
        raise NotImplementedError

    # compression

    def mixing(self, ops: Ops, w: Any, h: Tensor, rotary: Rotary | None) -> Mixing:
        """Return the matrices by which the heads mix the tokens of the normalised input [b, l, h], over windows from
        empty states; their rows are those of the first sequence, then of the second. Of kinds alone that mix tokens.
        """
        raise NotImplementedError

    def whole(self, ops: Ops, w: Any, h: Tensor, rotary: Rotary | None, watch: Watch | None, masks: Masks) -> Tensor:
        """Return the layer's output [b, l, h] over windows from empty states.

        Args:
            watch: told of what pruning measures, under the names of `Block.activations`.
            masks: of `Block.masks`; under them the layer computes what its slice does.
        """
        raise NotImplementedError
