"""A layer of merged key-value heads that trains with gates: it begins as the parent's layer and ends as a plain one.

    W_i = z_i W_i + (1 - z_i) W_shared,    of the keys of each head i, rotated by its alignment, and of its values

which mixes keys and values themselves, as they are linear in W. z = 1 is the parent's layer, z = 0 the merged one.

Axes: g key-value heads of the parent, s shared ones, d channels of a head, h hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nemotron_h.architecture.blocks.block import Block
from nemotron_h.compression.forward import Forward
from nemotron_h.compression.heads.alignment import LayerAlignment
from nemotron_h.compression.heads.fusion import qkv_row
from nemotron_h.compression.heads.gates import Gates
from nemotron_h.compression.puzzle.local import Piece
from nemotron_h.model.blocks.registry import RUNNING

#: as in the paper's code: learning rate of shared heads, times that of the layer
_SHARED_LR = 2.0


class GatedPiece(Piece):
    """A merged layer outside of its model, with its parent's key-value heads beside the shared ones while it trains.

    Args:
        block: with merged heads.
        alignment: by which heads are merged.
        tensors: as of `Piece`, merged by `alignment`.
        qkv: the parent's queries with keys and values, as a checkpoint holds them; they do not train.
        forward: of the parent.
        gates: one of each head.
    """

    def __init__(
        self,
        block: Block,
        alignment: LayerAlignment,
        tensors: Sequence[Tensor],
        qkv: Tensor,
        forward: Forward,
        gates: Gates,
    ) -> None:
        super().__init__(block, tensors, forward)
        self.gates, self.alignment, self._z = gates, alignment, None
        heads = alignment.heads
        widths = {**{key: getattr(block, key) for key in block.widths}, heads.key: heads.groups}
        whole = forward.definition.block(block.letter, widths)
        self._whole = RUNNING[whole.letter](whole, forward.definition.norm_epsilon)
        self._row, self._whole_row = (qkv_row(each) for each in (block, whole))
        parts = alignment.qkv(*self._whole_row.to_theirs(qkv).values(), merge=False)
        like = self.tensors[self._place]
        self._originals = self._by_head(torch.cat(parts[1:])).to(like)  # [2, g, d, h]
        queries, *merged = self._row.to_theirs(like).values()
        self._queries, self._shared = queries.clone(), self._by_head(torch.cat(merged)).clone()  # [2, s, d, h]

    @property
    def _place(self) -> int:
        return self.alignment.heads.qkv

    def _by_head(self, rows: Tensor) -> Tensor:
        """Return keys and values [2, heads, d, h] of their rows."""
        return rows.unflatten(0, (2, -1, self.alignment.heads.dim))

    def __call__(self, x: Tensor) -> Tensor:
        """Return what it adds to the residual stream x [b, l, h]: in training with the gates of the step."""
        return super().__call__(x) if self._z is None else self.mixed(x, self._z)

    def mixed(self, x: Tensor, z: Tensor) -> Tensor:
        """Return what the layer adds to x [b, l, h] under gates z, [g] in the order of the alignment's groups."""
        shared = self._shared.repeat_interleave(self._originals.shape[1] // self._shared.shape[1], dim=1)
        keys_and_values = shared + z.to(shared)[:, None, None] * (self._originals - shared)
        tensors = list(self.tensors)
        whole = torch.cat([self._queries, keys_and_values.flatten(0, 2)])
        (tensors[self._place],) = self._whole_row.to_ours(whole).values()
        weights = self._whole.weights(self.forward.cast(self._whole.block, tensors))
        return self.forward.apply(self._whole, self._whole.loaded(weights), x)

    def parameter_groups(self, lr: float, steps: int) -> list[dict[str, Any]]:
        """Return the layer's but the parent's heads, the shared ones, and the gates."""
        others = [tensor for tensor in self.tensors if tensor is not self.tensors[self._place]]
        return [
            {"params": [*others, self._queries], "lr": lr},
            {"params": [self._shared], "lr": _SHARED_LR * lr},
            *self.gates.parameter_groups(steps),
        ]

    def begin(self, done: float) -> Tensor:
        """Set the gates of a step, and return their penalty."""
        self._z = self.gates.begin(done)
        return self.gates.penalty().to(self._shared.device)

    def finish(self) -> None:
        """Drop the gates and the parent's heads."""
        merged = torch.cat([self._queries, self._shared.flatten(0, 2)])
        (self.tensors[self._place],) = self._row.to_ours(merged).values()
        self._z = self._originals = None
