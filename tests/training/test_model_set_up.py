"""Weights are moved into Megatron's buffers between two waits for the GPU: NeMo's stream waits for no other."""

from __future__ import annotations

import pytest
import torch
from nemo import lightning as nl

from nemotron_h.training.strategy import NemotronHStrategy


def test_streams_meet_before_and_after_weights_are_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    monkeypatch.setattr(nl.MegatronStrategy, "init_model_parallel", lambda self: done.append("move"))
    NemotronHStrategy.init_model_parallel(object.__new__(NemotronHStrategy))
    assert done == ["wait", "move", "wait"]
