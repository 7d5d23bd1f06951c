"""Verification cards: each is readable and composes, and what differs from it is said."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from pathlib import Path

import pytest

from nemotron_h.core import strict, strict_yaml
from nemotron_h.core.errors import UserError
from nemotron_h.core.progress import Step

ROOT = Path(__file__).parents[1]
CARDS = sorted((ROOT / "docs/cards").glob("*.yaml"))


@pytest.fixture(scope="module")
def card():
    """The script, which stands beside a module of its folder."""
    sys.path.insert(0, str(ROOT / "demos"))
    import card

    yield card
    sys.path.remove(str(ROOT / "demos"))


@pytest.mark.parametrize("file", CARDS, ids=lambda file: file.stem)
def test_a_card_states_what_its_command_measures(card, file: Path) -> None:
    read = strict.typed(card.Card, strict_yaml.read_config(file), str(file))
    assert read.measured.command == shlex.join(read.command())
    assert read.measured.commit
    assert read.losses
    assert min(read.losses.values()) > 0


class Recorded:
    """Runs that are there already, in place of `card.Runs`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.peak_gib = folder, 1.5

    def train(self, name: str, stop_after: int | None = None) -> Path:
        """Return the folder."""
        return self.folder / name


def test_what_differs_is_said(card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, losses in (("run", {1: 4.0, 2: 3.0}), ("resumed", {1: 4.0, 2: 3.5})):
        (tmp_path / name).mkdir()
        file = tmp_path / name / "progress.jsonl"
        for step, loss in losses.items():
            Step(step, 2, loss, 4.0, [], 1000.0, 1e-3, 0.0).append(file)
        with file.open("a") as opened:
            opened.write('{"step": 3, "lo')  # half written
        (tmp_path / name / "run.json").write_text(json.dumps({"throughput": {"seconds_per_step": 2.0}}))
    monkeypatch.setattr(card, "find_checkpoint", lambda path: path)
    monkeypatch.setattr(card, "differing", lambda one, other: ["norm.weight"])
    stated = card.Card(
        claim="It trains.",
        hardware=card.hardware(),
        recipe="nemotron_h_tiny",
        losses={"1": 4.02, "2": 3.3},
        seconds_per_step=1.0,
        memory_gib=1.5,
        resume_after=1,
    )
    differing = [line.name for line in card.compared(stated, Recorded(tmp_path)) if not line.agrees]
    assert differing == [
        "loss of step 2",
        "seconds per step",
        "steps of the resumed run with another loss",
        "tensors of its last checkpoint that differ",
    ]
    elsewhere = dataclasses.replace(stated, hardware="another machine")
    assert [line.allowed for line in card.compared(elsewhere, Recorded(tmp_path))][2:4] == [None, None]


def test_a_card_is_read_strictly(card, tmp_path: Path) -> None:
    file = tmp_path / "card.yaml"
    file.write_text("claim: It trains.\nhardware: none\nrecipe: nemotron_h_tiny\nlosess: {1: 2}\n")
    with pytest.raises(UserError, match="unknown key losess"):
        strict.typed(card.Card, strict_yaml.read_config(file), str(file))
