"""Runs with frozen parts: these stay bit for bit, have no optimizer state, and change nothing of what trains."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_run import Small, assert_same, without_last

from nemotron_h.checkpoint.index import read_index
from nemotron_h.checkpoint.reader import WeightFile, find_checkpoint
from nemotron_h.core.errors import UserError

pytestmark = pytest.mark.slow

STEPS = 12
FROZEN = ["ffn", "attention", "embedding", "output"]
FREEZE = ("peak_lr: 1e-2,", f"frozen: [{', '.join(FROZEN)}], peak_lr: 1e-2,")
#: of the small recipe's layers M-M*-
TRAINED = ("decoder.layers.0.", "decoder.layers.2.")


@pytest.fixture(scope="module")
def run(small: Small) -> Small:
    """With a finished run `frozen`."""
    small.train("frozen", recipe=small.variant("frozen", FREEZE))
    return small


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All of them, in their stored dtypes."""
    file = WeightFile(checkpoint)
    tensors = {name: torch.empty(shape, dtype=file.dtypes[name]) for name, shape in file.shapes.items()}
    file.read(tensors)
    return tensors


def is_trained(name: str) -> bool:
    return any(f".{name}".find(f".{part}") >= 0 for part in TRAINED)


def test_frozen_parts_stay_and_have_no_states(run: Small) -> None:
    first, last = (weights(run.run_dir("frozen") / f"checkpoints/step-{step:06d}") for step in (8, STEPS))
    assert {name for name in first if not torch.equal(first[name], last[name])} == set(filter(is_trained, first))
    keys = read_index(run.run_dir("frozen") / f"checkpoints/step-{STEPS:06d}/weights").state_dict_metadata
    states = [key for key in keys if key.startswith("optimizer.state.")]
    assert states
    assert all(is_trained(key.split(".", 3)[3]) for key in states), states


def test_what_trains_gets_the_gradients_of_a_run_that_trains_all(small: Small) -> None:
    step = (("tokens: 6144 # 12 steps", "tokens: 1024"), ("warmup_tokens: 1024", "warmup_tokens: 512"))
    once = (*step, ("every_steps: 4", "every_steps: 1"), ("peak_lr: 1e-2,", "clip_grad: 0, peak_lr: 1e-2,"))
    found = {}
    for name, frozen in (("all_train", ""), ("some_train", f"frozen: [{', '.join(FROZEN)}], ")):
        small.train(name, recipe=small.variant(name, *once[:-1], (once[-1][0], f"{frozen}{once[-1][1]}")))
        found[name] = weights(small.run_dir(name) / "checkpoints/step-000001")
    different = {name for name, each in found["all_train"].items() if not torch.equal(each, found["some_train"][name])}
    assert different == {name for name in found["all_train"] if not is_trained(name)}


def test_straight_equals_resumed(run: Small) -> None:
    recipe = run.variant("frozen_killed", FREEZE)
    run.train("frozen_killed", "kill=6", recipe=recipe, check=False)
    assert "resumed at step 4" in run.train("frozen_killed", recipe=recipe).stdout
    assert_same(run, "frozen_killed", "frozen")
    assert run.same_tensors("frozen", "frozen_killed", STEPS)


def test_two_ranks_continue_it(run: Small) -> None:
    layouts = {
        "tensor": ("trainer.strategy.tensor_model_parallel_size=2", "trainer.strategy.sequence_parallel=True"),
        "data": (),
    }
    for layout, options in layouts.items():
        name = f"frozen_{layout}"
        without_last(run, "frozen", name)
        run.train(name, *options, "trainer.devices=2", ranks=2, recipe=run.variant(name, FREEZE))
        for step, record in run.steps(name).items():
            expected = float.fromhex(run.steps("frozen")[step]["loss"])
            assert float.fromhex(record["loss"]) == pytest.approx(expected, rel=1e-3), (layout, step)


def test_other_parts_are_refused_at_a_resume(run: Small) -> None:
    from nemotron_h.training.resume import ResumeRun

    checkpoint = find_checkpoint(run.run_dir("frozen"))
    for frozen in ([], ["ffn"]):
        with pytest.raises(UserError, match=r"was trained with optim.frozen = \['ffn', ") as caught:
            ResumeRun._check_frozen(checkpoint, SimpleNamespace(config=SimpleNamespace(frozen=frozen)), "elsewhere")
        assert f"init.checkpoint={checkpoint}" in str(caught.value)
    ResumeRun._check_frozen(checkpoint, SimpleNamespace(config=SimpleNamespace(frozen=FROZEN[::-1])), "")
