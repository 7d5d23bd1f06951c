"""Train a mixer to mix tokens as the attention in its place does: the first stage of MOHAWK (arXiv 2408.10189).

Both mix what they read by a matrix over the tokens of a window, one of every head (`ops/mixing_matrix.py`). The loss is
the Frobenius norm of their difference, on what the parent's layer reads, the mean over heads and windows (the paper's),
over that of the attention's own (ours: layers compare, and a matrix of zeros has 1). It depends on C, B, dt, A, D and
the convolution of B and C, which alone get gradients: the input is normalised by the parent, and x, z, the gated norm
and the output projection have no part in it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemotron_h.compression.forward import Forward
from nemotron_h.compression.puzzle.local import Aim, Piece
from nemotron_h.ops import mixing_matrix
from nemotron_h.ops.mixing_matrix import Mixing


class Matrices(Aim):
    """The matrices by which a layer's heads mix tokens."""

    def target(self, forward: Forward, layers: range, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Mixing]:
        """Return the layer's normalised input [b, l, h] and its matrices."""
        (layer,) = layers
        weights, running = forward.weights(layer), forward.model.running[layer]
        h = forward.norm(x, weights.norm)
        return h, running.mixing(forward.ops, weights, h, forward.rotary(h)).to(dtype)

    def distance(self, piece: Piece, x: Tensor, target: tuple[Tensor, Mixing]) -> Tensor:
        """Return the sum over heads and windows of the norms of the differences."""
        h, wanted = target
        own = piece.running.mixing(piece.forward.ops, piece.weights(), h, piece.forward.rotary(h))
        return mixing_matrix.distance(wanted, own.to(wanted.factors[0].dtype))

    def size(self, target: tuple[Tensor, Mixing]) -> Tensor:
        """Return the sum over heads and windows of the norms of the attention's."""
        return mixing_matrix.size(target[1])


MATRIX = Matrices()
