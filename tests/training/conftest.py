"""Prepared blends, and the runs that others start from."""

from __future__ import annotations

import json
import random

import pytest
from small_run import TALK, Small, distill_recipe, prepared


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
    rng = random.Random(2)
    words = (small.folder / "low.jsonl").read_text().split()[:400]
    words = [word for word in words if word.isalpha()]

    def said() -> str:
        return " ".join(rng.choices(words, k=rng.randint(1, 12)))

    lines = [
        {"messages": [{"role": role, "content": said()} for role in ("user", "assistant") * rng.randint(1, 2)]}
        for _ in range(300)
    ]
    (small.folder / "talk.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (small.folder / "talk.yaml").write_text(TALK)
    small.prepare("talk.yaml")
    return small


@pytest.fixture(scope="session")
def distilled(small: Small, straight: dict[int, dict]) -> Small:
    """With an uninterrupted distillation, `kd`."""
    small.train("kd", recipe=distill_recipe(small, "kd"))
    return small
