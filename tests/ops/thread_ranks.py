"""A process group of threads, so that split-vocabulary losses are tested without processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch


class Ranks:
    """Stands for a process group of threads; `all_reduce` below meets at its barrier."""

    def __init__(self, size: int) -> None:
        self.count, self.barrier, self.parts = size, threading.Barrier(size, timeout=60), [None] * size
        self.local = threading.local()

    def size(self) -> int:
        return self.count

    def rank(self) -> int:
        return self.local.rank

    def all_reduce(self, tensor: torch.Tensor, op=torch.distributed.ReduceOp.SUM, group=None) -> None:
        self.parts[self.rank()] = tensor.clone()
        self.barrier.wait()
        whole = torch.stack(self.parts)
        tensor.copy_(whole.amax(0) if op == torch.distributed.ReduceOp.MAX else whole.sum(0))
        self.barrier.wait()

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """What `work` returns on each rank."""
        results: list[Any] = [None] * self.count
        errors: list[Exception] = []

        def target(rank: int) -> None:
            self.local.rank = rank
            try:
                results[rank] = work(rank)
            except Exception as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=target, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        if errors:
            raise errors[0]
        return results
