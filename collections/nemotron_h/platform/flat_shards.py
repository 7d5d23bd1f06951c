"""Read optimizer states that another layout has saved, of them no more than this rank needs.

A rank saves the flat range that it holds of each parameter's state (`SHARDING`). In the checkpoint a tensor of shape G,
which tensor parallelism had cut into F chunks of shape C (G = F * C by axis), is one of shape [*F, size of C], each
chunk flat. A rank of the same layout reads ranges of its last axis. megatron-core 0.15.3 reads whole chunks for any
other rank, however little of a parameter that holds, and takes F of the checkpoint and of this run to divide equal
shapes: with another padding of the vocabulary, which the tensor-parallel size decides, it reads what memory has. Here a
rank reads the rows that its range lies in, of the chunks that have them.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import resharding
from megatron.core.dist_checkpointing.strategies.resharding import TensorReformulationMetadata
from torch import Tensor

#: megatron-core's name of the format, `distrib_optim_sharding_type` of a checkpoint's content
SHARDING = "fully_sharded_model_space"


def install() -> None:
    """Have megatron-core read the states of another layout by `rows_of_chunks`."""
    resharding.reformulate_single_nd_flattened_tensor = rows_of_chunks


def rows_of_chunks(wanted: ShardedTensor, saved: TensorReformulationMetadata) -> ShardedTensorFactory:
    """Return a factory of the parts of the checkpoint that a flat range lies in, which merges them to the range.

    Args:
        wanted: a range of the flat state of one parameter, of this rank.
        saved: shapes of the whole state in the checkpoint, G and [*F, size of C].
    Returns:
        its parts are flat ranges of chunks; rows that the checkpoint lacks (padding) are zero.
    """
    rank_shape = (1,) * wanted.prepend_axis_num + wanted.local_shape
    cuts = saved.ckpt_reform_global_shape[:-1]
    chunk_shape = tuple(size // cut for size, cut in zip(saved.ckpt_orig_global_shape, cuts, strict=True))
    axis = wanted.prepend_axis_num  # of the rows
    row, chunk_row = math.prod(rank_shape[axis + 1 :]), math.prod(chunk_shape[axis + 1 :])
    flat = wanted.flattened_range
    first, end = flat.start // row, -(-flat.stop // row)

    # the box of the whole tensor that has the range's rows
    starts, sizes = list(wanted.global_offset), list(rank_shape)
    starts[axis], sizes[axis] = starts[axis] + first, end - first
    chunks = [
        range(min(start // chunk, cut - 1), min((start + size - 1) // chunk, cut - 1) + 1)
        for start, size, chunk, cut in zip(starts, sizes, chunk_shape, cuts, strict=True)
    ]
    parts: list[ShardedTensor] = []
    places: list[tuple[tuple[slice, ...], tuple[slice, ...]]] = []  # of the same numbers in the box and in the part
    for numbers in itertools.product(*chunks):
        offset = tuple(number * size for number, size in zip(numbers, chunk_shape, strict=True))
        in_box, in_chunk = zip(*map(_overlap, starts, sizes, offset, chunk_shape), strict=True)
        rows = in_chunk[axis]
        count = rows.stop - rows.start
        places.append((in_box, (*in_chunk[:axis], slice(0, count), *in_chunk[axis + 1 :])))
        parts.append(
            replace(
                wanted,
                data=None,
                local_shape=chunk_shape[axis:],
                global_shape=tuple(saved.ckpt_orig_global_shape),
                global_offset=offset,
                axis_fragmentations=tuple(cuts),
                allow_shape_mismatch=False,
                # megatron-core loads no empty list of parts: for padding alone a row is read and not used
                flattened_range=slice(rows.start * chunk_row, rows.stop * chunk_row) if count else slice(0, chunk_row),
            )
        )

    def merge(loaded: list[Tensor]) -> Tensor:
        box = torch.zeros(sizes, dtype=wanted.dtype)
        for part, (in_box, in_part) in zip(loaded, places, strict=True):
            box[in_box] = part.view(*chunk_shape[:axis], -1, *chunk_shape[axis + 1 :])[in_part]
        return box.flatten()[flat.start - first * row : flat.stop - first * row]

    return ShardedTensorFactory(wanted.key, None, lambda *_: parts, torch.no_grad()(merge), wanted.replica_id)


def _overlap(start: int, size: int, other: int, length: int) -> tuple[slice, slice]:
    """Return what two spans of an axis, each a start and a size, share: in the first one and in the second."""
    low = max(start, other)
    high = max(low, min(start + size, other + length))
    return slice(low - start, high - start), slice(low - other, high - other)
