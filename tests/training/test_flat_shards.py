"""Parts of a checkpoint that a rank of another layout reads, against slices of the whole tensor."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.resharding import TensorReformulationMetadata

from nemotron_h.platform.flat_shards import rows_of_chunks


def chunk(whole: torch.Tensor, cuts: tuple[int, ...], numbers: tuple[int, ...]) -> torch.Tensor:
    """Return one of the equal chunks of a tensor."""
    for axis, (cut, number) in enumerate(zip(cuts, numbers, strict=True)):
        whole = whole.chunk(cut, dim=axis)[number]
    return whole


def read(
    whole: torch.Tensor, saved: tuple[int, ...], shape: tuple[int, ...], cuts: tuple[int, ...], flat: slice, own: tuple
) -> tuple[torch.Tensor, int]:
    """Read a flat range of a rank's chunk out of a tensor that was saved in other chunks; return it, and the numbers
    that were read for it.

    Args:
        saved: chunks by axis in the checkpoint.
        shape, cuts: of the tensor in this layout, and its chunks by axis.
        flat: the range, of chunk `own`.
    """
    local = tuple(size // cut for size, cut in zip(shape, cuts, strict=True))
    offset = tuple(size * number for size, number in zip(local, own, strict=True))
    wanted = ShardedTensor("w", None, whole.dtype, local, shape, offset, cuts, flattened_range=flat)
    size = whole.numel() // torch.tensor(saved).prod().item()
    factory = rows_of_chunks(wanted, TensorReformulationMetadata(tuple(whole.shape), (*saved, size)))
    parts = [
        chunk(whole, saved, part.local_chunk_offset_in_global()).flatten()[part.flattened_range]
        for part in factory.build()
    ]
    return factory.merge_fn(parts), sum(part.numel() for part in parts)


@pytest.mark.parametrize("shape", [(24,), (24, 12), (24, 1, 4), (8, 6, 4)])
def test_any_range_of_any_layout_is_read(shape: tuple[int, ...]) -> None:
    whole = torch.arange(1.0, 1 + torch.tensor(shape).prod().item()).reshape(shape)
    ways = list(itertools.product(*([cut for cut in (1, 2, 4) if size % cut == 0] for size in shape)))
    rng = random.Random(1)
    for saved, cuts in itertools.product(ways, ways):
        own = tuple(rng.randrange(cut) for cut in cuts)
        mine = chunk(whole, cuts, own).flatten()
        start = rng.randrange(mine.numel())
        flat = slice(start, rng.randrange(start, mine.numel()) + 1)
        assert torch.equal(read(whole, saved, shape, cuts, flat, own)[0], mine[flat]), (saved, cuts, own, flat)


def test_more_and_fewer_rows_of_padding() -> None:
    """640 rows were saved by one rank or two; 768 are read by two, 512 by one: rows that nobody saved are zero."""
    saved = torch.arange(1.0, 1 + 640 * 3).reshape(640, 3)
    wide = torch.cat([saved, torch.zeros(128, 3)])
    for cuts, (rows, ranks) in itertools.product((1, 2), ((768, 2), (512, 1))):
        for own in range(ranks):
            mine = chunk(wide[:rows], (ranks, 1), (own, 0)).flatten()
            for flat in (slice(0, mine.numel()), slice(5, 7), slice(mine.numel() - 4, mine.numel())):
                found = read(saved, (cuts, 1), (rows, 3), (ranks, 1), flat, (own, 0))[0]
                assert torch.equal(found, mine[flat]), (cuts, rows, own, flat)


def test_no_more_rows_are_read_than_a_range_lies_in() -> None:
    whole = torch.rand(64, 10)
    for saved in ((1, 1), (4, 1), (1, 2)):
        _, numbers = read(whole, saved, (64, 10), (2, 1), slice(23, 48), (1, 0))
        assert numbers == 3 * 10, saved
