"""Preparation by one worker in the process of the test: starting a process takes longer than a small source."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest

from nemotron_h.core.worker_pool import worker_pool
from nemotron_h.data.prepare import pipeline


class _Inline:
    """An executor that has done what is submitted."""

    def submit(self, call: Callable, *arguments) -> Future:
        future = Future()
        try:
            future.set_result(call(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


@contextlib.contextmanager
def _pool(workers: int, start: Callable, arguments: tuple, *words: str) -> Iterator:
    if workers > 1:
        with worker_pool(workers, start, arguments, *words) as pool:
            yield pool
        return
    start(*arguments)
    yield _Inline()


@contextlib.contextmanager
def one_worker_here() -> Iterator[None]:
    """Run the jobs of preparations by one worker where they are submitted; those by several have processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "worker_pool", _pool)
        yield
