"""Straight = killed and resumed, bit for bit; a checkpoint of one layout continues in another; damage is reported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_run import Small, events, record

from nemotron_h.training import checkpoints

STEPS = 12
pytestmark = pytest.mark.slow


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole."""
    script = (
        "import sys, torch; from nemotron_h.runtime import cpu; cpu.install();"
        "torch.distributed.init_process_group('gloo', init_method='tcp://127.0.0.1:0', rank=0, world_size=1);"
        "from megatron.core.dist_checkpointing import load_plain_tensors;"
        "loaded = load_plain_tensors(sys.argv[1]);"
        "torch.save({k: v for k, v in loaded.items() if torch.is_tensor(v)}, sys.argv[2])"
    )
    out = checkpoint.with_name(checkpoint.name + ".pt")
    subprocess.run([sys.executable, "-c", script, str(checkpoint / "weights"), str(out)], check=True, cwd="/")
    return torch.load(out)


def test_straight_equals_killed_and_resumed(small: Small, straight: dict[int, dict]) -> None:
    killed = small.train("resumed", "kill=6", check=False)
    assert killed.returncode < 0
    assert max(small.steps("resumed")) == 6
    again = small.train("resumed", "kill=9", check=False)
    assert "resumed at step 4" in again.stdout
    assert "changed" not in again.stdout
    out = small.train("resumed")
    assert "resumed at step 8" in out.stdout
    assert small.steps("resumed") == straight
    assert record(small.run_dir("resumed")) == record(small.run_dir("straight"))
    shown = events(small.run_dir("straight"))
    assert list(shown["val_loss"]) == [5, 11]  # the steps that validations follow, counted from 0
    assert events(small.run_dir("resumed")) == shown
    losses = [float.fromhex(straight[s]["loss"]) for s in range(1, STEPS + 1)]
    assert losses[-1] < losses[0] - 0.3
    assert sorted(i for s in straight.values() for i in s["samples"]) == list(range(STEPS * 8))
    one, two = (tensors(small.run_dir(n) / "checkpoints" / f"step-{STEPS:06d}") for n in ("straight", "resumed"))
    assert one.keys() == two.keys()
    assert any("exp_avg" in key for key in one)
    for key, value in one.items():
        assert torch.equal(value, two[key]), key


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, ("trainer.strategy.tensor_model_parallel_size=2", "trainer.strategy.sequence_parallel=True")),
        (2, ("trainer.strategy.pipeline_model_parallel_size=2",)),
        (2, ()),
    ],
    ids=["tensor and sequence", "pipeline", "data"],
)
def test_a_checkpoint_continues_in_another_layout(
    small: Small, straight: dict[int, dict], ranks: int, options: tuple[str, ...]
) -> None:
    name = "layout" + "".join(c for c in "".join(options) if c.isalpha())
    shutil.copytree(small.run_dir("straight"), small.run_dir(name))
    shutil.rmtree(small.run_dir(name) / "checkpoints" / f"step-{STEPS:06d}")
    small.train(name, *options, f"trainer.devices={ranks}", ranks=ranks)
    continued = small.steps(name)
    assert sorted(continued) == list(range(9, STEPS + 1))
    for step, record in continued.items():
        for key, tolerance in (("loss", 2e-2), ("grad_norm", 6e-2), ("lr", 1e-9)):  # bf16
            expected = float.fromhex(straight[step][key])
            assert float.fromhex(record[key]) == pytest.approx(expected, rel=tolerance), (step, key)


def test_two_ranks_share_the_reading_of_a_checkpoint(small: Small, straight: dict[int, dict]) -> None:
    shutil.copytree(small.run_dir("straight"), small.run_dir("shared"))
    written = small.run_dir("shared") / "checkpoints" / f"step-{STEPS:06d}"
    shutil.rmtree(written)
    small.train("shared", "trainer.devices=2", ranks=2)
    described = checkpoints.describe(written, checkpoints.content(written))
    assert json.loads((written / checkpoints.INTEGRITY).read_text()) == described
    assert len(described) > 4
    # a file of the second rank: the first alone would not see it
    name = next(n for n in sorted(described)[1::2] if n.endswith(".distcp"))
    content = bytearray((written / name).read_bytes())
    content[len(content) // 2] ^= 1
    (written / name).write_bytes(content)
    assert checkpoints.damage(written, 0, 2) == []
    done = small.train("shared", "trainer.devices=2", ranks=2, check=False)
    assert done.returncode != 0
    assert f"{written.name} is damaged: {name}: its content changed" in done.stderr


def test_a_declared_change_of_the_data_takes_over_at_its_step(small: Small, straight: dict[int, dict]) -> None:
    shutil.copytree(small.run_dir("straight"), small.run_dir("changed"))
    folder = small.run_dir("changed") / "checkpoints"
    shutil.rmtree(folder / f"step-{STEPS:06d}")
    small.train("changed", "data.global_batch_size=4", "resume.blend_change=from_step")
    samples = [record["samples"] for _, record in sorted(small.steps("changed").items())]
    assert samples == [list(range(64 + 4 * n, 68 + 4 * n)) for n in range(4)]
    order = json.loads((folder / f"step-{STEPS:06d}" / checkpoints.RECORD).read_text())["data"]["order"]
    assert (order["step"], order["consumed_samples"]) == (STEPS, 80)
    assert (order["origin"]["step"], order["plan"]["global_batch_size"]) == (8, 4)
    assert [record["plan"]["global_batch_size"] for record in order["history"]] == [8]


def test_damage_is_reported_and_an_older_one_is_taken_only_when_told(small: Small, straight: dict[int, dict]) -> None:
    shutil.copytree(small.run_dir("straight"), small.run_dir("damaged"))
    folder = small.run_dir("damaged") / "checkpoints"
    shard = next((folder / "step-000012" / "weights").glob("*.distcp"))
    os.truncate(shard, shard.stat().st_size - 100)
    done = small.train("damaged", "trainer.max_steps=14", check=False)
    assert done.returncode == 2
    assert "step-000012 is damaged" in done.stderr
    assert f"resume.resume_from_path={folder / 'step-000008'}" in done.stderr
    done = small.train("damaged", f"resume.resume_from_path={folder / 'step-000008'}")
    assert "resumed at step 8" in done.stdout
    assert (folder / "aside-step-000012").is_dir()


def test_a_finished_run_ends_well_and_another_model_is_an_error(small: Small, straight: dict[int, dict]) -> None:
    done = small.train("straight")
    assert "is complete: step 12 of 12" in done.stdout
    done = small.train("straight", "model.config.ffn_hidden_size=128", "trainer.max_steps=14", check=False)
    assert done.returncode == 2
    assert "ffn_hidden_size: 96 in the checkpoint, 128 now" in done.stderr
