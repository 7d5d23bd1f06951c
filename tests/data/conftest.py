"""Fixtures of the data tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from local_corpus import Corpus


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Local sources and a blend of them, in a folder of this test's own."""
    return Corpus(tmp_path)
