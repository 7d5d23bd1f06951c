"""Cost of Muon beside AdamW: memory, FLOPs and communication of a step. Pure arithmetic.

A part [m, n], m <= n, takes 4 m^2 n + 2 m^3 operations in each Newton-Schulz step. Ranks send their bfloat16 pieces of
a part to the one that iterates on it and get its result back (training/muon_parts.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nemotron_h.architecture.blocks.block import Block
from nemotron_h.architecture.definition import ModelDefinition, stage_blocks
from nemotron_h.architecture.rank import Layout

#: Newton-Schulz steps of every set of coefficients (ops/newton_schulz.py)
STEPS = 5
#: of the momentum that AdamW's second moment would stand beside
MOMENT_BYTES = 4


@dataclass(frozen=True)
class MuonCost:
    """Cost of a step.

    Attributes:
        parameters: that Muon updates.
        flops: of all parts together.
        rank_flops: of a rank of the stage with most, whose ranks share them.
        largest: rows and columns of the largest part.
        sent: bytes that a rank sends, and gets, in a step; 0 on one rank.
        saved: bytes that the rank with most needs less of than AdamW.
    """

    parameters: int
    flops: float
    rank_flops: float
    largest: tuple[int, int]
    sent: int
    saved: int


def _parts(block: Block) -> Iterator[tuple[tuple[int, int], int]]:
    """Yield the shapes of a block's parts, each with its number of experts, 0 where it is no expert's."""
    for matrix in block.matrices():
        for rows, columns in matrix.part_shapes():
            yield (rows, columns), matrix.experts


def _trained_blocks(definition: ModelDefinition, layout: Layout, stage: int) -> list[Block]:
    return [block for block in stage_blocks(definition, layout.pipeline, stage) if block.name not in layout.untrained]


def _flops(shape: tuple[int, int]) -> float:
    m, n = sorted(shape)
    return STEPS * (4.0 * m * m * n + 2.0 * m**3)


def rank_matrices(definition: ModelDefinition, layout: Layout, stage: int) -> tuple[int, int]:
    """Return the parameters that Muon updates among those of one rank of a stage: experts', and all others."""
    if layout.optimizer != "muon":
        return 0, 0
    experts = others = 0
    for block in _trained_blocks(definition, layout, stage):
        for matrix in block.matrices():
            if matrix.parts is None:
                continue
            outputs, inputs = matrix.on_rank(layout.tensor)
            if matrix.experts:
                experts += matrix.size // layout.expert
            else:
                others += outputs * inputs
    return experts, others


def saved_bytes(definition: ModelDefinition, layout: Layout, stage: int) -> float:
    """Return the bytes of moments that one rank of a stage does not have."""
    experts, others = rank_matrices(definition, layout, stage)
    return MOMENT_BYTES * (experts / layout.expert_shards + others / layout.shards)


def working_bytes(definition: ModelDefinition, layout: Layout, stage: int) -> int:
    """Return the bytes that the iteration on the largest part takes: pieces and part in bfloat16, X before and after a
    step, X X^T and its polynomials; on the CPU these are widened to float32.
    """
    if layout.optimizer != "muon":
        return 0
    shapes = (shape for block in _trained_blocks(definition, layout, stage) for shape, _ in _parts(block))
    wide, square = (20, 14) if layout.backend == "cpu" else (10, 6)
    return max((wide * max(shape) * min(shape) + square * min(shape) ** 2 for shape in shapes), default=0)


def muon_cost(definition: ModelDefinition, layout: Layout) -> MuonCost | None:
    """Return the cost of a step; None for AdamW."""
    if layout.optimizer != "muon":
        return None
    flops = busiest = 0.0
    sent = saved = parameters = 0
    shapes: list[tuple[int, int]] = []
    for stage in range(layout.pipeline):
        shared = of_experts = 0.0
        for block in _trained_blocks(definition, layout, stage):
            for shape, experts in _parts(block):
                shapes.append(shape)
                parameters += shape[0] * shape[1] * (experts or 1)
                if experts:
                    of_experts += experts * _flops(shape)
                else:
                    shared += _flops(shape)
        flops += shared + of_experts
        ranks = layout.ranks // layout.pipeline
        busiest = max(busiest, (shared + of_experts) / ranks)
        experts, others = rank_matrices(definition, layout, stage)
        moved = experts / layout.expert_shards * (layout.expert_shards > 1) + others / layout.shards * (ranks > 1)
        sent = max(sent, round(2 * 2 * moved))
        saved = max(saved, round(saved_bytes(definition, layout, stage)))
    return MuonCost(parameters, flops, busiest, max(shapes, key=_flops), sent, saved)
