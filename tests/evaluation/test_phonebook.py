"""`demos/phonebook.py`: rows whose answers stand in them, twins of one size, a short run, figure and table."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def demo() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "demos"))
    import phonebook

    yield phonebook
    sys.path.remove(str(ROOT / "demos"))


@pytest.mark.parametrize("lines", [1, 8, 64])
@pytest.mark.parametrize("share", [0.5, 1])
def test_answers_stand_in_their_rows(demo: ModuleType, lines: int, share: float) -> None:
    for task in demo.TASKS:
        tokens, answers = demo.rows(task, 5, lines, torch.Generator().manual_seed(3), share)
        assert tokens.shape == answers.shape
        entries = lines if task == demo.PHONEBOOK else min(demo.NEEDLES, lines)
        assert answers.sum(1).tolist() == [min(math.ceil(share * entries), demo.QUESTIONS)] * 5
        for row, answered in zip(tokens.tolist(), answers, strict=True):
            book = [row[at : at + 2] for at in range(1, 1 + 2 * lines, 2)]
            numbers = {line[0]: line[1] for line in book if line != [*demo.NOISE]}
            assert len(numbers) == entries
            assert row[1 + 2 * lines] == demo.END
            places = answered.nonzero().flatten().tolist()
            assert places[0] > 2 * lines + 1
            for place in places:
                assert row[place] == numbers[row[place - 1]]
            assert len({row[place - 1] for place in places}) == len(places)


def test_models_are_of_one_size(demo: ModuleType, megatron: None) -> None:
    several = [demo.configuration(name).definition() for name in demo.MODELS]
    sizes = [each.parameters - 2 * each.vocab_size * each.hidden_size for each in several]
    assert max(sizes) < 1.01 * min(sizes)
    assert [each.pattern for each in several] == [pattern for pattern, _ in demo.MODELS.values()]


def test_a_short_run(demo: ModuleType, megatron: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"TOKENS": 256, "TEST_ROWS": 2, "TEST_BATCH": 2, "TESTED": (4, 8)}.items():
        monkeypatch.setattr(demo, key, value)
    monkeypatch.setattr("nemotron_h.platform.cpu.install", lambda: None)  # the fixture's is undone
    assert demo.scale(7, 8) < demo.scale(1, 8) <= 1
    for seed in demo.SEEDS:
        demo.train("hybrid", seed, tmp_path / f"hybrid-{seed}.json", 8)
    first, second, _ = results = [json.loads((tmp_path / f"hybrid-{seed}.json").read_text()) for seed in demo.SEEDS]
    assert [each["step"] for each in first["history"]] == [2, 4, 8]
    assert first["grown"] == [*range(5)]  # by patience, a step each
    assert first["history"][0]["loss"] != second["history"][0]["loss"]
    results += [{**each, "model": "mamba2"} for each in results]
    rows = demo.table(results).splitlines()
    assert len(rows) == 2 + 2 * 6
    found = first["history"][-1]["found"]["needle"]
    assert rows[2 + 6] == f"| needle | hybrid | 1 | 8 | {100 * found['4']:.0f} | {100 * found['8']:.0f} |"
    demo.draw(results, tmp_path / "picture.svg")
    assert "Mamba-2 alone" in (tmp_path / "picture.svg").read_text()
