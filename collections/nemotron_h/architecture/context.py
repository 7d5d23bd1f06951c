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

#: mamba-ssm 2.3's kernels multiply token and stride in 32 bits: 131,072 tokens of the 8B on one H200 ended in an
#: illegal memory access
ADDRESSED = 2**31


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
    definition: ModelDefinition,
    size: int,
    origin: str,
    *,
    tensor: int,
    sequence: bool,
    seq_length: int | None = None,
    micro_batch: int = 1,
) -> None:
    """Check that the layers, and the tokens of a sequence, split over `size` context-parallel ranks, each of which gets
    no more of them than kernels can address.

    Args:
        origin: the file or recipe to name in an error.
        tensor, sequence: as `ParallelSchema`; with sequence parallelism each rank's tokens are split once more.
        seq_length: tokens of a sequence; None where the model alone is asked about.
        micro_batch: sequences of a forward pass.
    Errors:
        UserError: names the key, and the largest size that the model takes, or the smallest that the tokens need.
    """
    if seq_length is not None:
        check_addressed(definition, micro_batch * seq_length, origin, tensor=tensor, context=size)
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


def check_addressed(definition: ModelDefinition, tokens: int, origin: str, *, tensor: int, context: int) -> None:
    """Check that kernels can address the tokens of a rank's forward pass.

    Args:
        tokens: of all context-parallel ranks together.
    Errors:
        UserError: names the keys, and the smallest size that is enough.
    """
    widest = max(block.addressed for block in definition.blocks) // tensor
    if tokens * widest // context < ADDRESSED:
        return
    enough = next((size for size in context_sizes(definition, tensor) if tokens * widest // size < ADDRESSED), None)
    raise UserError(
        f"{origin}: data.micro_batch_size * data.seq_length = {tokens:,} tokens of {widest:,} values are more than "
        "2^31 on a rank, and mamba-ssm's kernels address them in 32 bits",
        hint=f"split them: parallel.context={enough}" if enough else "split them over a larger parallel.tensor",
    )
