"""Context parallelism: ranks that hold a part of every sequence each, and how many of them a model takes.

Where a layer mixes tokens, the ranks exchange tokens for heads (`nemotron_h.model.context_parallel`): each has whole
sequences of its share of a tensor-parallel rank's heads. A head is never split; attention fills up heads that do not
divide with empty ones. The groups that heads share (B and C of Mamba-2, keys and values of attention) are split too,
or, where they are fewer than the ranks, sent to several.
"""

from __future__ import annotations

from collections.abc import Iterator

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.core.errors import UserError


def _counts(definition: ModelDefinition, tensor: int) -> Iterator[tuple[str, int, str, int, bool]]:
    """Yield heads and groups of one of `tensor` ranks, each with its key, of what mixes tokens in every layer; and
    whether heads are filled up.
    """
    for index, block in enumerate(definition.blocks):
        own = definition.overrides.get(index, {})
        for keys in block.exchanges:
            heads, groups = (
                (f"overrides.{index}.{key}" if key in own else key, getattr(block, key) // tensor) for key in keys
            )
            yield *heads, *groups, keys[0] in block.pads


def _takes(size: int, heads: int, groups: int, filled_up: bool) -> bool:
    """Tell whether so many ranks can share heads and groups."""
    return (filled_up or heads % size == 0) and (groups % size == 0 or size % groups == 0)


def context_sizes(definition: ModelDefinition, tensor: int) -> list[int]:
    """Return the sizes that every layer takes on `tensor` tensor-parallel ranks, ascending: no more than the fewest
    heads that are not filled up, or where all are, than the fewest heads.
    """
    counts = {(heads, groups, filled_up) for _, heads, _, groups, filled_up in _counts(definition, tensor)}
    exact = [heads for heads, _, filled_up in counts if not filled_up]
    most = min(exact or [heads for heads, *_ in counts], default=1)
    return [size for size in range(1, most + 1) if all(_takes(size, *each) for each in counts)]


def check_context_parallel(
    definition: ModelDefinition, size: int, origin: str, *, tensor: int, sequence: bool, seq_length: int | None = None
) -> None:
    """Check that the layers, and the tokens of a sequence, split over `size` context-parallel ranks.

    Args:
        origin: the file or recipe to name in an error.
        tensor, sequence: as `ParallelSchema`; with sequence parallelism each rank's tokens are split once more.
        seq_length: tokens of a sequence; None where the model alone is asked about.
    Errors:
        UserError: names the key, and the largest size that the model takes.
    """
    if size == 1:
        return
    where = f"{origin}: parallel.context = {size}"
    fits = context_sizes(definition, tensor)
    if size not in fits:
        bad = {
            f"{head} / parallel.tensor = {heads} with {group} / parallel.tensor = {groups}": None
            for head, heads, group, groups, filled_up in _counts(definition, tensor)
            if not _takes(size, heads, groups, filled_up)
        }
        raise UserError(
            f"{where} does not split the heads of model {definition.name}: {', '.join(bad) or 'it has too few'}",
            hint=f"the largest is {fits[-1]}; sizes that fit: {', '.join(map(str, fits))}",
        )
    parts, split = (size * tensor, "parallel.context * parallel.tensor") if sequence else (size, "parallel.context")
    if seq_length is not None and seq_length % parts:
        nearest = max(1, (2 * seq_length + parts) // (2 * parts)) * parts
        raise UserError(
            f"{origin}: data.seq_length = {seq_length} is not a multiple of {split} = {parts}",
            hint=f"the nearest is {nearest}",
        )
