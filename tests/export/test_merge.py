"""A checkpoint of an adapter: what reads it computes what the adapted model does, and so does its merged checkpoint."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from adapted_model import KINDS, adapted_config, adapted_model, adapter, randomize_adapters
from safetensors.torch import load_file
from save_checkpoint import finish, save
from small_model import pure_config, relative_error, small_model, tokens
from test_hf_round_trip import export, read_all, theirs
from typer.testing import CliRunner

from nemotron_h.checkpoint import folders
from nemotron_h.checkpoint.adapters import describe_base, open_weights
from nemotron_h.checkpoint.reader import WeightFile, find_checkpoint
from nemotron_h.cli.main import app
from nemotron_h.core.errors import UserError
from nemotron_h.export import hf_reader, merge, peft_writer
from nemotron_h.inference.model import load_model

pytestmark = pytest.mark.usefixtures("megatron")
ROUTED = ["experts.linear_fc1", "experts.linear_fc2"]
TARGETS = ["in_proj", "linear_qkv", "linear_proj", "linear_fc2"]


def save_adapter(model, folder: Path, base: Path) -> Path:
    """As a run's checkpoint callback does."""
    from nemotron_h.model import adapters

    with adapters.only("adapter", [model]):
        save(model, folder)
    record = json.loads((folder / folders.RECORD).read_text())
    record["adapter"] = {**dataclasses.asdict(model.config.adapter), "base": describe_base(base)}
    (folder / folders.RECORD).write_text(json.dumps(record))
    finish(folder)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, megatron: None, tmp_path_factory: pytest.TempPathFactory):
    """An adapted model at scale 1, and the checkpoints of its base and its adapters."""
    folder = tmp_path_factory.mktemp(request.param)
    model, base = adapted_model(adapted_config(request.param, targets=TARGETS))
    randomize_adapters(model)
    base_checkpoint = save(base, folder / "base")
    return model, base_checkpoint, save_adapter(model, folder / "adapter", base_checkpoint)


def logits_of(checkpoint: Path, ids: torch.Tensor) -> torch.Tensor:
    model = load_model(checkpoint)
    return model.logits(model.extend(ids, model.new_states(*ids.shape)))


def trained_logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids)[..., : model.config.vocab_size]


def test_the_checkpoint_holds_adapters_alone(pair) -> None:
    _, base, adapter = pair
    sizes = [sum(f.stat().st_size for f in (folder / "weights").glob("*.distcp")) for folder in (base, adapter)]
    assert sizes[1] < sizes[0] / 2
    with pytest.raises(UserError, match="damaged"):
        WeightFile(adapter)
    assert open_weights(adapter).shapes == WeightFile(base).shapes


def test_generation_merged_and_exported_are_the_adapted_model(pair, tmp_path: Path) -> None:
    model, base, adapter = pair
    ids = tokens(2, 50)
    expected = trained_logits(model, ids)
    assert relative_error(logits_of(base, ids), expected) > 0.1
    assert relative_error(logits_of(adapter, ids), expected) < 1e-4
    merge.write(merge.plan(adapter), tmp_path / "merged")
    assert relative_error(logits_of(tmp_path / "merged", ids), expected) < 1e-4
    for checkpoint in (adapter, tmp_path / "merged"):
        folder = export(checkpoint, tmp_path / f"{checkpoint.name}_hf")
        hf_reader.write(hf_reader.examine(folder), tmp_path / f"{checkpoint.name}_back")
        assert relative_error(logits_of(tmp_path / f"{checkpoint.name}_back", ids), expected) < 1e-4
    a, b = theirs(tmp_path / "adapter_hf"), theirs(tmp_path / "merged_hf")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_merge_changes_the_targets_alone(pair, tmp_path: Path) -> None:
    _, base, adapter = pair
    result = CliRunner().invoke(app, ["merge-adapter", str(adapter), str(tmp_path / "merged")])
    assert result.exit_code == 0, result.output
    before, after = read_all(base), read_all(tmp_path / "merged")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.partition(".weight")[0].rpartition(".")[2] in TARGETS}
    assert f"{len(changed)} of {len(before)} tensors changed" in result.output
    assert folders.damage(tmp_path / "merged") == []
    record = json.loads((tmp_path / "merged" / folders.RECORD).read_text())
    assert "adapter" not in record
    assert record["merged"]["base"]["checkpoint"] == str(base)


def adapted_experts(kind: str, targets: list[str], folder: Path):
    """A model with experts and adapters, and their checkpoint."""
    model = pure_config("E", adapter=adapter(kind, targets=targets)).configure_model(None)
    base = small_model(pure_config("E"))
    model.load_state_dict(base.state_dict())
    randomize_adapters(model)
    return model, save_adapter(model, folder / "adapter", save(base, folder / "base"))


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_routed_experts(megatron, kind: str, tmp_path: Path) -> None:
    """A stack of all experts is merged at once, read as it is or written, and exported expert by expert."""
    model, adapted = adapted_experts(kind, ROUTED, tmp_path)
    shapes = WeightFile(adapted, last=".adapter.a").shapes
    assert shapes["decoder.layers.1.mlp.experts.experts.linear_fc2.adapter.b"] == (6, 48, 4)
    assert len(shapes) == 3 * 2 * (2 if kind == "lora" else 3)
    ids = tokens(2, 50)
    expected = trained_logits(model, ids)
    assert relative_error(logits_of(tmp_path / "base", ids), expected) > 0.1
    merge.write(merge.plan(adapted), tmp_path / "merged")
    for checkpoint in (adapted, tmp_path / "merged"):
        assert relative_error(logits_of(checkpoint, ids), expected) < 1e-4
        folder = export(checkpoint, tmp_path / f"{checkpoint.name}_hf")
        hf_reader.write(hf_reader.examine(folder), tmp_path / f"{checkpoint.name}_back")
        assert relative_error(logits_of(tmp_path / f"{checkpoint.name}_back", ids), expected) < 1e-4
    before, after = read_all(tmp_path / "base"), read_all(tmp_path / "merged")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".mlp.experts.experts." in name}


def test_adapters_of_shared_experts(megatron, tmp_path: Path) -> None:
    shared = ["in_proj", "shared_experts.linear_fc1", "shared_experts.linear_fc2"]
    model, adapted = adapted_experts("lora", shared, tmp_path)
    ids = tokens(2, 50)
    expected = trained_logits(model, ids)
    assert relative_error(logits_of(tmp_path / "base", ids), expected) > 0.1
    merge.write(merge.plan(adapted), tmp_path / "merged")
    for checkpoint in (adapted, tmp_path / "merged"):
        assert relative_error(logits_of(checkpoint, ids), expected) < 1e-4
    plan = peft_writer.plan(adapted)
    assert plan.config["target_modules"] == ["in_proj", "up_proj", "down_proj"]
    peft_writer.write(plan, tmp_path / "peft")
    module = "base_model.model.model.layers.1.mixer.shared_experts.up_proj"
    assert f"{module}.lora_A.weight" in load_file(tmp_path / "peft" / "adapter_model.safetensors")


def test_training_loads_a_merged_checkpoint(pair, tmp_path: Path) -> None:
    from megatron.core import dist_checkpointing
    from small_model import small_config

    model, _, adapter = pair
    merge.write(merge.plan(adapter), tmp_path / "merged")
    other = small_config(2).configure_model(None)
    state = dist_checkpointing.load(other.sharded_state_dict(prefix="module."), str(tmp_path / "merged" / "weights"))
    other.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    ids = tokens(1, 40)
    assert relative_error(trained_logits(other, ids), trained_logits(model, ids)) < 1e-4


def test_an_adapter_s_weights_come_back(pair) -> None:
    """Base first, then the adapters, as a resumed run reads them; DoRA's lengths are the trained ones."""
    from megatron.core import dist_checkpointing

    from nemotron_h.model import adapters

    model, base, adapter = pair
    again = adapted_config(model.config.adapter.kind, targets=TARGETS).configure_model(None)
    for part, checkpoint in (("base", base), ("adapter", adapter)):
        with adapters.only(part, [again]):
            state = again.sharded_state_dict(prefix="module.")
        state = dist_checkpointing.load(state, str(checkpoint / "weights"))
        again.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    expected = dict(model.named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in again.named_parameters())


def test_a_base_that_is_gone_moved_or_another(pair, tmp_path: Path) -> None:
    _, base, adapter = pair
    moved = tmp_path / "moved"
    shutil.copytree(base, moved)
    record = json.loads((adapter / folders.RECORD).read_text())
    copy = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    record["adapter"]["base"]["checkpoint"] = str(tmp_path / "gone")
    (copy / folders.RECORD).write_text(json.dumps(record))
    finish(copy)
    with pytest.raises(UserError, match=r"was trained on .*gone, which is not there any more"):
        merge.plan(copy)
    assert merge.plan(copy, moved).weights.base == moved
    (moved / "note").write_text("another")
    finish(moved)
    with pytest.raises(UserError, match=r"moved is another checkpoint"):
        merge.plan(copy, moved)
    with pytest.raises(UserError, match="holds no adapter"):
        merge.plan(find_checkpoint(base))
