"""A fixture: megatron-core in this process, one rank, no launcher. Undone after each test module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def megatron() -> Iterator[None]:
    import torch

    from nemotron_h.platform import cpu, quiet

    quiet.hush()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small shapes
    with cpu.megatron_on_cpu():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        yield
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
    torch.set_num_threads(threads)
