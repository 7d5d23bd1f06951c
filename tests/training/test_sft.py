"""Fine-tuning starts from the weights of a pretraining run, and resumes bit for bit as that does."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_run import TUNING_STEPS, Small, assert_same, drawn, sft_recipe

from nemotron_h.core.errors import UserError
from nemotron_h.report.run import read_run

pytestmark = pytest.mark.slow


def test_straight_equals_killed_and_resumed(talk: Small) -> None:
    done = talk.train("sft", recipe=sft_recipe(talk, "sft"))
    assert f"weights from {talk.run_dir('straight')}/checkpoints/step-000012" in done.stdout
    written = json.loads((talk.run_dir("sft") / "run.json").read_text())
    assert written["recipe"]["init"]["checkpoint"] == str(talk.run_dir("straight"))
    assert written["data"]["conversations"]["talk"]["used"] > 250

    killed = talk.train("sft_resumed", "kill=4", check=False, recipe=sft_recipe(talk, "sft_resumed"))
    assert killed.returncode < 0
    out = talk.train("sft_resumed", recipe=sft_recipe(talk, "sft_resumed"))
    assert "resumed at step 3" in out.stdout
    assert_same(talk, "sft_resumed", "sft")  # a validation was due at the step of the checkpoint
    path = sft_recipe(talk, "sft_resumed")
    path.write_text(path.read_text().replace(str(talk.run_dir("straight")), str(talk.run_dir("other"))))
    done = talk.train("sft_resumed", "trainer.max_steps=8", recipe=path, check=False)
    assert done.returncode == 2
    assert f"init.checkpoint: {talk.run_dir('straight')} in the checkpoint, {talk.run_dir('other')} now" in done.stderr
    assert read_run(talk.run_dir("sft_resumed")).starts == [0, 3]
    assert "loss per token, nats" in drawn(talk.run_dir("sft"))
    samples = [i for s in talk.steps("sft").values() for i in s["samples"]]
    assert sorted(samples) == list(range(TUNING_STEPS * 8))

    # the optimizer's own copy of the weights was loaded too: from random ones the second step would fall back
    losses = [float.fromhex(talk.steps("sft")[s]["loss"]) for s in range(1, TUNING_STEPS + 1)]
    assert max(losses) < math.log(512) - 0.2
    assert losses[-1] < losses[0]
    saved = weights_of(talk.run_dir("straight"))
    start = torch.load(talk.folder / "sft" / "start.pt")
    found = 0
    for name, weight in saved.items():
        same = [value for key, value in start.items() if key.endswith("." + name)]
        if same:
            assert torch.equal(same[0].float(), weight.float()), name
            found += 1
    assert found >= 10


def test_two_ranks_that_split_windows_are_one(talk: Small) -> None:
    """Conversations lie across both ranks, and the ranks have different numbers of tokens to learn."""
    fp32 = "trainer.plugins.name=fp32", "trainer.max_steps=3"
    layout = "trainer.devices=2", "trainer.strategy.context_parallel_size=2"
    talk.train("sft_one", *fp32, recipe=sft_recipe(talk, "sft_one"))
    talk.train("sft_context", *fp32, *layout, ranks=2, recipe=sft_recipe(talk, "sft_context"))
    one, two = talk.steps("sft_one"), talk.steps("sft_context")
    assert [step["samples"] for step in two.values()] == [step["samples"] for step in one.values()]
    for step in (1, 2, 3):
        for key in ("loss", "grad_norm"):
            assert float.fromhex(two[step][key]) == pytest.approx(float.fromhex(one[step][key]), rel=1e-4), (step, key)
    record = json.loads((talk.run_dir("sft_context") / "run.json").read_text())
    assert record["layout"]["context"] == 2
    alone = json.loads((talk.run_dir("sft_one") / "run.json").read_text())
    assert record["metrics"]["val_loss"] == pytest.approx(alone["metrics"]["val_loss"], rel=1e-4)


def weights_of(run_dir: Path) -> dict[str, torch.Tensor]:
    """The tensors of a run's newest checkpoint, read without megatron-core."""
    from nemotron_h.checkpoint.reader import WeightFile, find_checkpoint

    file = WeightFile(find_checkpoint(run_dir))
    found = {name: torch.empty(shape) for name, shape in file.shapes.items()}
    file.read(found)
    return found


def test_data_of_another_tokenizer_is_refused(talk: Small, tmp_path: Path) -> None:
    from nemotron_h.checkpoint.reader import find_checkpoint
    from nemotron_h.data.tokenizer import train_bpe
    from nemotron_h.training.resume import CheckTokenizer

    checkpoint = find_checkpoint(talk.run_dir("straight"))
    record = json.loads((checkpoint / "run.json").read_text())["data"]["tokenizer_sha256"]
    other = train_bpe(["other words than those " * 50], 265, tmp_path)
    manifest = SimpleNamespace(
        blend="talk", tokenizer=SimpleNamespace(sha256=record), tokenizer_path=lambda: other.path
    )
    trainer = SimpleNamespace(datamodule=SimpleNamespace(manifest=manifest))
    check = CheckTokenizer(checkpoint)
    check.setup(trainer, None, "fit")
    manifest.tokenizer.sha256 = other.fingerprint()
    with pytest.raises(UserError, match="wrong tokenizer: blend talk"):
        check.setup(trainer, None, "fit")
