"""Exchange tokens for heads between context-parallel ranks, for what mixes tokens.

Outside of these layers rank i of c holds tokens i l / c to (i + 1) l / c of every row, in their order. For a scan, a
convolution or attention the ranks exchange: each gets whole rows of its share of the heads, runs what one rank would
run, and sends back the others' tokens (Jacobs et al. 2023, arXiv 2309.14509; for Mamba-2 megatron-core's
`MambaContextParallel`). So edges of the convolution and of documents need no care, and all ranks do the same work.

Axes: l tokens of a row, c context-parallel ranks, t = l / c tokens of one, b rows, w channels of all heads of a
tensor-parallel rank, h heads and g groups of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import all_to_all
from torch import Tensor
from torch.distributed import ProcessGroup

from nemotron_h.architecture.blocks.block import copies, filled_up


def own_tokens(x: Tensor, group: ProcessGroup, axis: int) -> Tensor:
    """Return this rank's tokens: its part of an axis of length l, a view."""
    return x.chunk(group.size(), axis)[group.rank()]


def tokens_for_heads(parts: Sequence[Tensor], group: ProcessGroup) -> Tensor:
    """Send every rank its heads of this rank's tokens.

    Args:
        parts: [t, b, w] each, w of a multiple of c: the channels of the first rank's heads, of the second's, ...
    Returns:
        [l, b, sum of w / c], this rank's share of each part behind the other.
    """
    ranks = group.size()
    by_rank = [part.unflatten(-1, (ranks, -1)).movedim(-2, 0) for part in parts]  # [c, t, b, w / c]
    return all_to_all(group, torch.cat(by_rank, dim=-1)).flatten(0, 1)


def heads_for_tokens(x: Tensor, group: ProcessGroup) -> Tensor:
    """Send every rank its tokens of this rank's heads: of [l, b, w / c] return [t, b, w]."""
    by_rank = all_to_all(group, x.unflatten(0, (group.size(), -1)))  # [c, t, b, w / c]
    return by_rank.movedim(0, 2).flatten(2)


@dataclass(frozen=True)
class HeadShare:
    """The heads of a tensor-parallel rank that one context-parallel rank runs, and the groups that they share.

    Attributes:
        group: the context-parallel ranks.
        heads, groups: its share.
        copies: ranks that get a group, where groups are fewer than ranks.
    """

    group: ProcessGroup
    heads: range
    groups: range
    copies: int

    @classmethod
    def of(cls, group: ProcessGroup, heads: int, groups: int) -> HeadShare | None:
        """Return this rank's share of `heads` heads, filled up, and `groups` groups; None where it runs all of them.

        The sizes divide: `nemotron_h.architecture.context`.
        """
        ranks, rank = group.size(), group.rank()
        if ranks == 1:
            return None
        shared, each = copies(groups, ranks), max(groups // ranks, 1)
        first = rank // shared * each
        of_heads = filled_up(heads, groups, ranks) // ranks
        return cls(group, range(rank * of_heads, (rank + 1) * of_heads), range(first, first + each), shared)

    def copied(self, x: Tensor, width: int) -> Tensor:
        """Return [t, b, g * width] with each group as often as it is sent, consecutively."""
        if self.copies == 1:
            return x
        return x.unflatten(-1, (-1, width)).repeat_interleave(self.copies, dim=-2).flatten(-2)


def channels(share: range, width: int) -> slice:
    """Return the channels of a share of heads or groups of this width."""
    return slice(share.start * width, share.stop * width)
