"""Fixtures of the data tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from inline_pool import one_worker_here
from local_corpus import Corpus


@pytest.fixture(scope="session", autouse=True)
def one_worker() -> Iterator[None]:
    """Preparation by one worker starts no process; by several, and in processes of their own, it does."""
    with one_worker_here():
        yield


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Local sources and a blend of them, in a folder of this test's own."""
    return Corpus(tmp_path)
