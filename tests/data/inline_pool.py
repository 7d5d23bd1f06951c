"""Preparation in the process of the test: starting workers takes longer than a small source."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest

from nemotron_h.data.prepare import pipeline


class _Inline:
    def submit(self, call: Callable, *arguments) -> Future:
        future = Future()
        future.set_result(call(*arguments))
        return future


@contextlib.contextmanager
def _inline_pool(workers: int, start: Callable, arguments: tuple, *words: str) -> Iterator[_Inline]:
    start(*arguments)
    yield _Inline()


@contextlib.contextmanager
def without_workers() -> Iterator[None]:
    """Run all jobs of preparations where they are submitted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "worker_pool", _inline_pool)
        yield
