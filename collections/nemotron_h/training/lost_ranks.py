"""Name the ranks of a run that are gone: asked when a collective operation failed, so a healthy run pays nothing."""

from __future__ import annotations

import contextlib
import threading
import time

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

#: ours: ranks meet the end of one timeout within about a step of each other
GRACE_S = 30.0


def is_of_a_collective(error: BaseException) -> bool:
    """Tell whether an error is of the communication between ranks: a timeout, or a peer that is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def lost_ranks(grace: float, wait: bool = True, place: str = "lost_ranks") -> list[int]:
    """Report that this rank lives, and return the ranks that did not.

    Each rank whose operation fails gets here. The store of the ranks answers without any collective operation; rank 0
    holds it unless a launcher does.

    Args:
        grace: seconds that the others get.
        wait: for the others; without it nothing is returned.
        place: that they all come to, once in a process.
    """
    ranks = set(range(dist.get_world_size()))
    answered: set[int] | None = None

    def ask() -> None:
        nonlocal answered
        store, end = dist.PrefixStore(place, _get_default_store()), time.monotonic() + grace
        with contextlib.suppress(RuntimeError):  # the process that holds the store is gone
            store.set(str(dist.get_rank()), "")
            store.add("number", 1)
            while wait and store.add("number", 0) < len(ranks) and time.monotonic() < end:
                time.sleep(0.5)
            answered = {rank for rank in ranks if store.check([str(rank)])}

    # a thread: the store does not return while the process that holds it is stopped
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(2 * grace if wait else 1)
    if not wait:
        return []
    return [0] if answered is None else sorted(ranks - answered)
