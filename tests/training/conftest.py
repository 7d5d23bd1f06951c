"""Prepared blends, and the runs that others start from."""

from __future__ import annotations

import pytest
from small_run import Small, distill_recipe, prepared, write_talk


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return prepared(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def straight(small: Small) -> dict[int, dict]:
    """What each step of an uninterrupted run did."""
    small.train("straight")
    return small.steps("straight")


@pytest.fixture(scope="session")
def talk(small: Small, straight: dict[int, dict]) -> Small:
    """With conversations prepared beside the texts that `straight` was trained on."""
    write_talk(small)
    return small


@pytest.fixture(scope="session")
def distilled(small: Small, straight: dict[int, dict]) -> Small:
    """With an uninterrupted distillation, `kd`."""
    small.train("kd", recipe=distill_recipe(small, "kd"))
    return small
