"""Train layers whose key-value heads are merged, each to do what the parent's layer does, with gates or without.

Each reads what the parent's layer reads, as variants of Puzzle do (`compression/puzzle/local.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemotron_h.compression.forward import Forward
from nemotron_h.compression.heads.alignment import LayerAlignment
from nemotron_h.compression.heads.fusion import merged_tensors
from nemotron_h.compression.heads.gates import Gates
from nemotron_h.compression.importance import check_tokens
from nemotron_h.compression.puzzle.gated import GatedPiece
from nemotron_h.compression.puzzle.initial import layer_tensors
from nemotron_h.compression.puzzle.local import Advance, Piece, Training, imitate
from nemotron_h.export.source import ModelSource


@dataclass(frozen=True)
class TrainedLayer:
    """A layer of merged heads after its training.

    Attributes:
        piece: the layer; its `tensors` are in float32.
        merged, trained: |o_p - o_c|^2 / |o_p|^2 of what it and the parent's add to the residual stream, over held-out
            text, before and after the training.
        largest_gate: when the noise ends; None without gates.
    """

    piece: Piece
    merged: float
    trained: float
    largest_gate: float | None = None

    def line(self) -> str:
        """Return the errors on a line."""
        return f"error {self.merged:.4f} merged, {self.trained:.4f} trained"

    def record(self) -> dict[str, Any]:
        """Return errors and gate, for JSON."""
        gate = {} if self.largest_gate is None else {"largest_gate": self.largest_gate}
        return {"error": {"merged": self.merged, "trained": self.trained}, **gate}


def train_layers(
    forward: Forward,
    source: ModelSource,
    alignments: Mapping[int, LayerAlignment],
    kv_heads: int,
    training: Training,
    batches: Callable[[int], np.ndarray],
    held_out: np.ndarray,
    gates: Callable[[int], Gates] | None = None,
    advance: Advance = lambda _: None,
    done: Callable[[int, TrainedLayer], None] = lambda *_: None,
) -> dict[int, TrainedLayer]:
    """Return layer -> what training makes of it; what it makes worse stays as it is merged.

    Args:
        forward, source: of the parent, in float32 or wider, and its checkpoint.
        kv_heads: of each layer.
        training: of each layer.
        batches: number of a step -> token ids, int64 [b, l].
        held_out: token ids, int64 [samples, l].
        gates: number of heads -> their gates; None trains merged layers as they are.
        advance: told the tokens of each step.
        done: told of each layer.
    Errors:
        UserError: token ids that the model lacks.
    """
    for windows in (held_out, batches(0)):
        check_tokens(windows, forward.definition)
    layers = {}
    for layer, alignment in alignments.items():
        piece, there = merged_piece(forward, source, layer, alignment, kv_heads, gates), range(layer, layer + 1)
        both = imitate(forward, there, {"": piece}, {"": training}, batches, held_out, advance)[""]
        gate = piece.gates.largest if isinstance(piece, GatedPiece) else None
        layers[layer] = TrainedLayer(piece, *both, gate)
        done(layer, layers[layer])
    return layers


def merged_piece(
    forward: Forward,
    source: ModelSource,
    layer: int,
    alignment: LayerAlignment,
    kv_heads: int,
    gates: Callable[[int], Gates] | None = None,
) -> Piece:
    """Return a layer of merged heads that is to train; arguments as of `train_layers`."""
    parent, heads = forward.definition, alignment.heads
    block = parent.blocks[layer]
    merged = parent.block(block.letter, {**parent.overrides.get(layer, {}), heads.key: kv_heads})
    whole = [tensor.to(forward.model.dtype) for tensor in layer_tensors(source, layer)]
    tensors = merged_tensors(block, merged, alignment, whole)
    if gates is None or heads.groups == kv_heads:
        return Piece(merged, tensors, forward)
    return GatedPiece(merged, alignment, tensors, whole[heads.qkv], forward, gates(heads.groups))
