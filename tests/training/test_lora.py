"""LoRA and DoRA runs: adapters alone are trained and kept, they resume bit for bit and in another layout, and merge."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_run import TUNING_STEPS, Small, sft_recipe, without_last

from nemotron_h.checkpoint.adapters import open_weights
from nemotron_h.checkpoint.reader import WeightFile, find_checkpoint
from nemotron_h.core.errors import UserError
from nemotron_h.export import merge
from nemotron_h.schema.recipe import AdapterSchema

pytestmark = pytest.mark.slow

ADAPTER = """
adapter:
  kind: dora
  rank: 4
  alpha: 8
  dropout: 0.1
  targets: [in_proj, out_proj, linear_qkv, linear_proj, linear_fc1, linear_fc2]
"""


def lora_recipe(small: Small, name: str) -> Path:
    """The fine-tuning of `sft_recipe` with DoRA, and dropout."""
    path = sft_recipe(small, name)
    path.write_text(path.read_text() + ADAPTER)
    return path


@pytest.fixture(scope="module")
def run(talk: Small) -> Small:
    """With a finished run `lora`."""
    done = talk.train("lora", recipe=lora_recipe(talk, "lora"))
    assert f"weights from {talk.run_dir('straight')}/checkpoints/step-000012" in done.stdout
    for row in ("mamba      in_proj", "mamba      out_proj", "attention  linear_qkv", "ffn        linear_fc2"):
        assert row in done.stdout
    assert "dora, rank 4, alpha 8: trains 9,808 parameters beside 163,376 frozen ones (6.00%)" in done.stdout
    return talk


def tensors_of(file: WeightFile) -> dict[str, torch.Tensor]:
    """All of them, in their stored dtypes."""
    found = {name: torch.empty(shape, dtype=file.dtypes[name]) for name, shape in file.shapes.items()}
    file.read(found)
    return found


def test_straight_equals_resumed(run: Small) -> None:
    without_last(run, "lora", "lora_resumed")
    out = run.train("lora_resumed", recipe=lora_recipe(run, "lora_resumed"))
    assert "resumed at step 3" in out.stdout
    straight = run.steps("lora")
    assert run.steps("lora_resumed") == {step: straight[step] for step in range(4, TUNING_STEPS + 1)}
    assert float.fromhex(straight[TUNING_STEPS]["loss"]) < float.fromhex(straight[1]["loss"])
    one, two = (tensors_of(open_weights(find_checkpoint(run.run_dir(n)))) for n in ("lora", "lora_resumed"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_checkpoint_is_small_and_merges_into_a_whole_one(run: Small, tmp_path: Path) -> None:
    checkpoint, base = find_checkpoint(run.run_dir("lora")), find_checkpoint(run.run_dir("straight"))
    record = json.loads((checkpoint / "run.json").read_text())
    assert (record["adapter"]["kind"], record["adapter"]["base"]["checkpoint"]) == ("dora", str(base))
    sizes = [sum(file.stat().st_size for file in (c / "weights").glob("*.distcp")) for c in (checkpoint, base)]
    assert sizes[0] < sizes[1] / 4
    merge.write(merge.plan(checkpoint), tmp_path / "merged")
    before, after = tensors_of(WeightFile(base)), tensors_of(WeightFile(tmp_path / "merged"))
    changed = {
        name.partition(".weight")[0].rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])
    }
    assert changed == {"in_proj", "out_proj", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}
    assert before.keys() == after.keys()


def test_a_checkpoint_continues_on_two_tensor_parallel_ranks(run: Small) -> None:
    name = "lora_tp2"
    without_last(run, "lora", name)
    layout = ("trainer.strategy.tensor_model_parallel_size=2", "trainer.strategy.sequence_parallel=True")
    # dropout draws on every rank for itself
    options = (*layout, "trainer.devices=2", "model.config.adapter.dropout=0")
    said = run.train(name, *options, ranks=2, recipe=lora_recipe(run, name)).stdout
    assert "  adapter.dropout: 0.1 -> 0" in said
    for step, record in run.steps(name).items():
        assert step > 3
        expected = float.fromhex(run.steps("lora")[step]["loss"])
        assert float.fromhex(record["loss"]) == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rank": 8}, "rank: 4 in the checkpoint, 8 now"),
        ({"kind": "lora"}, "kind: dora in the checkpoint, lora now"),
        ({"targets": ["in_proj"]}, "targets: .* in the checkpoint, "),
        (None, "kind: dora in the checkpoint, none now"),
    ],
)
def test_another_adapter_is_refused(run: Small, changes: dict | None, expected: str) -> None:
    from nemotron_h.training.resume import ResumeRun

    checkpoint = find_checkpoint(run.run_dir("lora"))
    recorded = json.loads((checkpoint / "run.json").read_text())["adapter"]
    same = {key: recorded[key] for key in ("kind", "rank", "alpha", "targets")}
    adapter = None if changes is None else AdapterSchema(**{**same, **changes})
    with pytest.raises(UserError, match=f"of another adapter: .*{expected}"):
        ResumeRun._check_adapter(checkpoint, SimpleNamespace(config=SimpleNamespace(adapter=adapter)), "")
    ResumeRun._check_adapter(checkpoint, SimpleNamespace(config=SimpleNamespace(adapter=AdapterSchema(**same))), "")


def test_an_adapter_alone_is_no_initial_checkpoint(run: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemotron_h.training.resume import ResumeRun

    monkeypatch.setattr(ResumeRun, "_check_model", staticmethod(lambda *_: None))  # is of the same model
    resume = ResumeRun()
    resume._rank, resume._ranks = 0, 1
    with pytest.raises(UserError, match="holds an adapter alone") as caught:
        resume._start_from(find_checkpoint(run.run_dir("lora")), None, None)
    assert "nemotron-h merge-adapter" in str(caught.value)
