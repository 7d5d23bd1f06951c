"""Leave a layout for the next one in the same process."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import distributed_c10d


def leave_model_parallel() -> None:
    """Destroy the groups of a layout, which Megatron only forgets: gloo has three threads for each, and each wakes a
    hundred times a second.
    """
    parallel_state.destroy_model_parallel()
    dist.barrier()
    for group in list(distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
