"""Mixers that begin from a parent's attention layers, before and after their first training.

Each trains alone to do what the attention does (2502.14458 and MOHAWK, 2408.10189: the second stage): it reads what the
parent's layer reads, as variants of Puzzle do (`compression/puzzle/local.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from nemotron_h.architecture.blocks.transplant import Transplant
from nemotron_h.compression.forward import Forward
from nemotron_h.compression.heads.fusion import qkv_row
from nemotron_h.compression.importance import check_tokens
from nemotron_h.compression.puzzle.initial import layer_tensors
from nemotron_h.compression.puzzle.local import Advance, Change, Piece, Training, changes, imitate_each
from nemotron_h.compression.transplant.layers import child_definition
from nemotron_h.export.source import ModelSource
from nemotron_h.model.blocks.transplant import mixer_tensors

#: variants of a layer that are scored
AS_MIXER, LEFT_OUT = "transplanted", "left out"


@dataclass(frozen=True)
class Error:
    """Error of a mixer over held-out text: |o_p - o_c|^2 / |o_p|^2 of what it and the attention add to the residual
    stream, when it is transplanted and after its training. A layer that is left out has 1.
    """

    transplanted: float
    trained: float


class Mixers:
    """Weights of the mixers in the place of attention layers.

    Args:
        source: the parent's checkpoint.
        transplants: by layer.
        seed: of what attention lacks.
    Attributes:
        blocks: of a model in which all of these layers are mixers.
        trained: layer -> weights that training left.
    """

    def __init__(self, source: ModelSource, transplants: Mapping[int, Transplant], seed: int) -> None:
        self.source, self.transplants, self.seed = source, transplants, seed
        self.blocks = child_definition(source.definition, transplants, "transplanted").blocks
        self.trained: dict[int, list[Tensor]] = {}

    def tensors(self, layer: int) -> list[Tensor]:
        """Return a mixer's weights as a checkpoint holds them, in the parent's dtype unless they were trained."""
        if layer in self.trained:
            return self.trained[layer]
        transplant, tensors = self.transplants[layer], layer_tensors(self.source, layer)
        heads = transplant.heads
        qkv = qkv_row(transplant.attention).to_theirs(tensors[heads.qkv]).values()
        of_attention = (tensors[0], *qkv, tensors[heads.proj])
        return mixer_tensors(transplant, self.blocks[layer], of_attention, layer, self.seed)

    def piece(self, layer: int, forward: Forward) -> Piece:
        """Return a mixer that runs beside its parent's layers, and trains in their dtype."""
        tensors = [tensor.to(forward.model.dtype) for tensor in self.tensors(layer)]
        return Piece(self.blocks[layer], tensors, forward)

    def train(
        self,
        forward: Forward,
        training: Training,
        batches: Callable[[int], np.ndarray],
        held_out: np.ndarray,
        advance: Advance = lambda _: None,
        done: Callable[[int, Error], None] = lambda *_: None,
    ) -> dict[int, Error]:
        """Train each mixer to do what the attention does; what training makes worse stays as it was transplanted.

        Args:
            forward: of the parent, in float32 or wider.
            training: of each layer.
            batches: number of a step -> token ids, int64 [b, l].
            held_out: token ids, int64 [samples, l].
            advance: told the tokens of each step.
            done: told of each layer.
        Errors:
            UserError: token ids that the model lacks.
        """
        errors, pieces = {}, ((layer, self.piece(layer, forward)) for layer in self.transplants)
        for layer, piece, *both in imitate_each(forward, pieces, training, batches, held_out, advance):
            self.trained[layer] = [tensor.cpu() for tensor in piece.tensors]
            errors[layer] = Error(*both)
            done(layer, errors[layer])
        return errors

    def scores(
        self, forward: Forward, windows: np.ndarray, batch: int, advance: Advance = lambda _: None
    ) -> dict[int, dict[str, Change]]:
        """Return layer -> what changes with its mixer in its place, and without the layer, and no other change.

        Args:
            windows: token ids, int64 [samples, l + 1].
            batch: of them that go through the model at once.
            advance: told the tokens of each batch.
        Errors:
            UserError: token ids that the model lacks.
        """
        check_tokens(windows, forward.definition)
        return {
            layer: changes(
                forward, layer, {AS_MIXER: self.piece(layer, forward), LEFT_OUT: None}, windows, batch, advance
            )
            for layer in self.transplants
        }


def least_harmful(scores: Mapping[int, Mapping[str, Change]], count: int) -> list[int]:
    """Return so many layers whose mixers move the distribution of the next token least, ascending."""
    return sorted(sorted(scores, key=lambda layer: scores[layer][AS_MIXER].kl)[:count])
