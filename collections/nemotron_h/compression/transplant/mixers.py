"""Mixers that begin from a parent's attention layers, before and after their first training.

Each trains alone on what the parent's layer reads (MOHAWK, 2408.10189; 2502.14458): first to mix tokens as the
attention does (`matrices.py`), then to add what it adds, as variants of Puzzle do (`compression/puzzle/local.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from nemotron_h.architecture.blocks.transplant import Transplant
from nemotron_h.compression.forward import Forward
from nemotron_h.compression.heads.fusion import qkv_row
from nemotron_h.compression.importance import check_tokens
from nemotron_h.compression.puzzle.initial import layer_tensors
from nemotron_h.compression.puzzle.local import Advance, Change, Piece, Training, changes, errors, imitate
from nemotron_h.compression.transplant.layers import child_definition
from nemotron_h.compression.transplant.matrices import MATRIX
from nemotron_h.export.source import ModelSource
from nemotron_h.model.blocks.transplant import mixer_tensors

#: variants of a layer that are scored
AS_MIXER, LEFT_OUT = "transplanted", "left out"


@dataclass(frozen=True)
class MatrixError:
    """Error of a mixer's matrix over held-out text: |M_p - M_c|_F over |M_p|_F, each the mean over heads and windows,
    when it is transplanted and after its training; a matrix of zeros has 1.

    Attributes:
        output: as `Error`, after the training of the matrix alone.
    """

    transplanted: float
    trained: float
    output: float


@dataclass(frozen=True)
class Error:
    """Error of a mixer over held-out text: |o_p - o_c|^2 / |o_p|^2 of what it and the attention add to the residual
    stream, when it is transplanted and after its training. A layer that is left out has 1.

    Attributes:
        matrix: of the training of its matrix; None where that has none.
    """

    transplanted: float
    trained: float
    matrix: MatrixError | None = None

    def line(self) -> str:
        """Return the errors on a line."""
        said = f"error {self.transplanted:.4f} transplanted"
        if self.matrix:
            matrix = self.matrix
            said += f", {matrix.output:.4f} with its matrix trained ({matrix.transplanted:.4f} to {matrix.trained:.4f})"
        return f"{said}, {self.trained:.4f} trained"


@dataclass(frozen=True)
class Lengths:
    """Training of a mixer by itself; None is none.

    Attributes:
        matrix, output: tokens, windows of a step and learning rate of the training of its matrix, then of its output.
    """

    matrix: Training | None
    output: Training | None

    @classmethod
    def of(cls, matrices: int, mixers: int, batch: int, lr: float) -> Lengths:
        """Return the lengths of so many tokens each; 0 is none."""
        return cls(*(Training(tokens, batch, lr) if tokens else None for tokens in (matrices, mixers)))

    def steps(self, tokens_of_step: int) -> tuple[int, int]:
        """Return the steps of both."""
        both = (self.matrix, self.output)
        matrix, output = (math.ceil(each.tokens / tokens_of_step) if each else 0 for each in both)
        return matrix, output


class Mixers:
    """Weights of the mixers in the place of attention layers.

    Args:
        source: the parent's checkpoint.
        transplants: by layer.
        seed: of what attention lacks.
        start: as of `mixer_tensors`.
    Attributes:
        blocks: of a model in which all of these layers are mixers.
        trained: layer -> weights that training left.
    """

    def __init__(
        self, source: ModelSource, transplants: Mapping[int, Transplant], seed: int, start: str = "transplant"
    ) -> None:
        self.source, self.transplants, self.seed, self.start = source, transplants, seed, start
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
        return mixer_tensors(transplant, self.blocks[layer], of_attention, layer, self.seed, self.start)

    def piece(self, layer: int, forward: Forward) -> Piece:
        """Return a mixer that runs beside its parent's layers, and trains in their dtype."""
        tensors = [tensor.to(forward.model.dtype) for tensor in self.tensors(layer)]
        return Piece(self.blocks[layer], tensors, forward)

    def train(
        self,
        layer: int,
        forward: Forward,
        lengths: Lengths,
        batches: Callable[[int], np.ndarray],
        held_out: np.ndarray,
        batch: int,
        advance: Advance = lambda _: None,
    ) -> Error:
        """Train a mixer to do what the attention does; what training makes worse stays as it was before.

        Args:
            forward: of the parent, in float32 or wider.
            batches: number of a step -> token ids, int64 [b, l]; the steps of the output follow those of the matrix.
            held_out: token ids, int64 [samples, l].
            batch: windows that go through the layers at once where errors are measured.
            advance: told the tokens of each step.
        Errors:
            UserError: token ids that the model lacks.
        """
        for windows in (held_out, batches(0)):
            check_tokens(windows, forward.definition)
        piece, there = self.piece(layer, forward), range(layer, layer + 1)

        def output() -> float:
            return errors(forward, there, {"": piece}, held_out, batch)[""]

        transplanted, matrix = output(), None
        trained = transplanted
        if lengths.matrix:
            each = {"": lengths.matrix}
            both = imitate(forward, there, {"": piece}, each, batches, held_out, advance, MATRIX)[""]
            trained = output()
            matrix = MatrixError(*both, trained)
        if lengths.output:
            steps, _ = lengths.steps(batches(0).size)
            each = {"": lengths.output}
            _, trained = imitate(
                forward, there, {"": piece}, each, lambda step: batches(steps + step), held_out, advance
            )[""]
        self.trained[layer] = [tensor.cpu() for tensor in piece.tensors]
        return Error(transplanted, trained, matrix)

    def score(
        self, layer: int, forward: Forward, windows: np.ndarray, batch: int, advance: Advance = lambda _: None
    ) -> dict[str, Change]:
        """Return what changes with a layer's mixer in its place, and without the layer, and no other change.

        Args:
            windows: token ids, int64 [samples, l + 1].
            batch: of them that go through the model at once.
            advance: told the tokens of each batch.
        Errors:
            UserError: token ids that the model lacks.
        """
        check_tokens(windows, forward.definition)
        pieces = {AS_MIXER: self.piece(layer, forward), LEFT_OUT: None}
        return changes(forward, layer, pieces, windows, batch, advance)


def least_harmful(scores: Mapping[int, Mapping[str, Change]], count: int) -> list[int]:
    """Return so many layers whose mixers move the distribution of the next token least, ascending."""
    return sorted(sorted(scores, key=lambda layer: scores[layer][AS_MIXER].kl)[:count])
