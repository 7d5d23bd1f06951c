"""A model that cannot fit is refused before a weight is read."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from nemotron_h.architecture.definition import ModelDefinition, definition_from_dict
from nemotron_h.core.errors import UserError
from nemotron_h.platform import memory
from nemotron_h.recipe.compose import compose


def definition(name: str) -> ModelDefinition:
    return definition_from_dict(asdict(compose(name).model), name)


def test_what_is_there_is_less_than_all() -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < memory.available() < total


def test_the_56b_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """56,324,350,464 weights: 104.9 GiB in bfloat16."""
    d = definition("nemotron_h_56b")
    monkeypatch.setattr(memory, "available", lambda device: int(104.8 * 2**30))
    with pytest.raises(UserError, match=r"nemotron_h_56b take 104\.9 GiB in bfloat16, GPU memory of cuda has 104\.8"):
        memory.check_weights_fit(d, 2, "cuda")
    with pytest.raises(UserError, match=r"take 209\.8 GiB in float32, this machine has 104\.8 GiB free") as error:
        memory.check_weights_fit(d, 4, "cpu")
    assert "bfloat16 takes 104.9 GiB" in error.value.hint
    monkeypatch.setattr(memory, "available", lambda device: 105 * 2**30)
    memory.check_weights_fit(d, 2, "cuda")


def test_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`load_model` looks before it reads; reading layer by layer needs no room for all."""
    from nemotron_h.inference import model

    d = definition("nemotron_h_tiny")
    monkeypatch.setattr(memory, "available", lambda device: d.parameters * 4 - 1)
    monkeypatch.setattr(model, "find_checkpoint", lambda path: path)
    monkeypatch.setattr(model, "read_record", lambda path: {})
    monkeypatch.setattr(model, "read_definition", lambda record, origin: d)

    def opened(path: Path) -> None:
        raise AssertionError("it is read")

    monkeypatch.setattr(model, "open_weights", opened)
    with pytest.raises(UserError, match="the weights of nemotron_h_tiny take"):
        model.load_model(tmp_path)
    with pytest.raises(AssertionError, match="it is read"):
        model.load_model(tmp_path, lazy=True)


def test_training_that_no_split_makes_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 bytes of a trained weight, 2 of a frozen one, over all nodes: a bound that every run exceeds."""
    monkeypatch.setattr(memory, "available", lambda device="cpu": 24 * 2**30)
    memory.check_training_fits(2 * 10**9, 2 * 10**9, 1, 2, False, "model m")
    with pytest.raises(
        UserError, match=r"model m: training takes at least 74\.5 GiB on each node .*: 24\.0 GiB"
    ) as error:
        memory.check_training_fits(8 * 10**9, 0, 1, 8, False, "model m")
    assert "executor=FILE.yaml" in error.value.hint
    memory.check_training_fits(8 * 10**9, 0, 4, 8, False, "model m")
    monkeypatch.setattr(memory, "total", lambda device: 80 * 2**30)
    memory.check_training_fits(8 * 10**9, 0, 1, 1, True, "model m")
    with pytest.raises(UserError, match=r"1 GPU of this machine: 80\.0 GiB"):
        memory.check_training_fits(8 * 10**9, 8 * 10**9, 1, 1, True, "model m")
