"""Memory of image encoder and projector in training. Pure arithmetic.

A micro-batch is planned with as many tiles as its sequences hold, which is the most that there can be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from nemotron_h.architecture.blocks.block import Block, LayerMemory
from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.architecture.rank import Layout, Rank
from nemotron_h.architecture.vision import PROJECTOR, VISION


def encoder_memory(definition: ModelDefinition, layout: Layout) -> list[tuple[str, LayerMemory]]:
    """Return part and memory of the encoder's layers and of the projector, in the order of a forward pass; empty for a
    model that reads text alone, or a sequence too short for a tile.

    What has no backward keeps nothing: its `backward` is then what the forward holds of one layer.
    """
    encoder = definition.encoder
    if encoder is None or not (tiles := encoder.tiles(layout.seq_length) * layout.micro_batch):
        return []
    tiles = math.ceil(tiles / layout.context)
    parts: list[tuple[str, Sequence[Block], int]] = [
        (VISION, encoder.blocks, encoder.positions),
        (PROJECTOR, [encoder.projector], encoder.tokens_per_tile),
    ]
    trained = [part for part in (VISION, PROJECTOR) if not layout.frozen and part not in layout.untrained]
    memory = []
    for part, blocks, rows in parts:
        # every tensor-parallel rank has all positions of its context-parallel rank's tiles
        own = replace(layout, seq_length=rows, micro_batch=tiles, context=1, sequence=False, documents=False)
        rank = Rank(blocks[0], own)
        backward = part in trained or (part == PROJECTOR and VISION in trained)
        recomputed = part == VISION and layout.recompute_vision == "layer"
        for block in blocks:
            size = block.memory(rank, False)
            if not backward:
                size = LayerMemory(0, size.kept)
            elif recomputed:
                size = LayerMemory(rank.residual, size.kept + size.backward)
            memory.append((part, size))
    return memory
