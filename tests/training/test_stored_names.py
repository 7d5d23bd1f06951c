"""Checkpoints that a GPU's layers named are resumed on a CPU as its own, and teach; the other way is the same code."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from small_run import DISTILL_STEPS, Small, distill_recipe, without_last

from nemotron_h.checkpoint import folders
from nemotron_h.checkpoint.definition import read_definition
from nemotron_h.checkpoint.index import read_index
from nemotron_h.checkpoint.reader import read_record
from nemotron_h.inference.model import load_model
from nemotron_h.model.stored_names import ask_for, other_names, reading

pytestmark = pytest.mark.slow


def name_as_on_a_gpu(checkpoint: Path) -> None:
    """Rename norms, and the optimizer's states of them, as Transformer Engine's layers have them."""
    definition = read_definition(read_record(checkpoint), "")
    fused = {plain: other for plain, other in other_names(definition).items() if other.endswith("layer_norm_weight")}
    assert len(fused) == definition.num_layers
    index = read_index(checkpoint / "weights")

    def renamed(name: str) -> str:
        at = name.find("decoder.")
        return name[:at] + fused.get(name[at:], name[at:]) if at >= 0 else name

    before = set(index.state_dict_metadata)
    index.state_dict_metadata = {renamed(name): value for name, value in index.state_dict_metadata.items()}
    index.mcore_data = {renamed(name): value for name, value in index.mcore_data.items()}
    index.storage_data = {replace(key, fqn=renamed(key.fqn)): value for key, value in index.storage_data.items()}
    assert len(before - set(index.state_dict_metadata)) % definition.num_layers == 0 < len(before)
    (checkpoint / "weights" / folders.INDEX).write_bytes(pickle.dumps(index))
    folders.write_integrity(checkpoint, folders.describe(checkpoint, folders.content(checkpoint)))


def test_a_run_goes_on_from_a_checkpoint_of_other_layers(small: Small, straight: dict[int, dict]) -> None:
    without_last(small, "straight", "moved")
    name_as_on_a_gpu(folders.newest(small.run_dir("moved")))
    assert "resumed at step 8" in small.train("moved").stdout
    assert small.steps("moved") == {step: straight[step] for step in range(9, 13)}
    assert small.same_tensors("straight", "moved", 12)


def test_a_teacher_and_a_generation_read_it(distilled: Small) -> None:
    without_last(distilled, "straight", "teacher")
    checkpoint = folders.newest(distilled.run_dir("teacher"))
    plain = load_model(checkpoint)
    name_as_on_a_gpu(checkpoint)
    for layer, other in zip(plain.layers, load_model(checkpoint).layers, strict=True):
        assert layer.norm.equal(other.norm)
    was = distilled.run_dir("straight") / "checkpoints/step-000008"
    for name, teacher in (("kd_plain", was), ("kd_moved", checkpoint)):
        changes = (f"teacher: {distilled.run_dir('straight')}", f"teacher: {teacher}")
        distilled.train(name, recipe=distill_recipe(distilled, name, changes))
    assert len(distilled.steps("kd_plain")) == DISTILL_STEPS
    assert distilled.steps("kd_plain") == distilled.steps("kd_moved")


def test_names_are_asked_for_as_they_are_stored(small: Small, straight: dict[int, dict]) -> None:
    """In either direction; a checkpoint that has both, as an import, gives the layer its own."""
    checkpoint = folders.newest(small.run_dir("straight"))
    names = other_names(read_definition(read_record(checkpoint), ""))
    plain, fused = "decoder.layers.0.norm.weight", "decoder.layers.0.mixer.in_proj.layer_norm_weight"
    assert (names[plain], names[fused]) == (fused, plain)
    for own, stored, expected in (
        (fused, {plain}, plain),
        (plain, {fused}, fused),
        (plain, {plain, fused}, plain),
        (plain, {"another"}, plain),
    ):
        tensor = ShardedTensor.from_rank_offsets(f"module.{own}", torch.zeros(4))
        ask_for({"a": tensor}, {f"module.{name}" for name in stored}, names)
        assert tensor.key == f"module.{expected}"
    model = SimpleNamespace(stored=())
    with reading({f"module.{plain}"}, [SimpleNamespace(modules=lambda: [model])]):
        assert f"module.{plain}" in model.stored
    assert model.stored == ()
