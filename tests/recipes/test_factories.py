"""Every recipe as `nemo llm pretrain|finetune --factory NAME`: it resolves, overrides and dry-runs without GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from nemotron_h.recipe.compose import compose, factory_of, known_recipes
from nemotron_h.schema.recipe import DistillSchema, PairLossSchema

NAMES = [name.split("/")[0] for name in known_recipes("pretrain")]
TUNED = known_recipes("sft")


@pytest.fixture(scope="module")
def parsed():
    """Parse a factory and settings as the command does; NeMo has factories of its own, some of the same name."""
    import nemo_run as run
    from nemo.collections import llm
    from nemo_run.cli.cli_parser import parse_cli_args, parse_factory

    from nemotron_h.launch import factories  # noqa: F401 - what the entry point loads

    def parse(name: str, *settings: str, command: str = "pretrain") -> run.Partial:
        entry = getattr(llm, command)
        return parse_cli_args(entry, list(settings), parse_factory(entry, "factory", run.Partial, name))

    return parse


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_factory_resolves_and_overrides(parsed, name: str) -> None:
    from nemotron_h.model.module import NemotronHConfig

    task = parsed(
        name,
        "trainer.max_steps=20",
        "optim.peak_lr=1e-3",
        "trainer.strategy.tensor_model_parallel_size=1",
        "data.seed=7",
        "model.config.init_seed=3",
    )
    assert task.model.config.__fn_or_cls__ is NemotronHConfig
    assert task.model.config.definition_name == name
    assert (task.trainer.max_steps, task.optim.peak_lr, task.data.seed) == (20, pytest.approx(1e-3), 7)
    assert task.trainer.strategy.tensor_model_parallel_size == 1
    assert task.model.config.init_seed == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", TUNED)
def test_a_fine_tuning_factory_is_of_the_same_model(parsed, name: str) -> None:
    from nemo.collections import llm

    from nemotron_h.data.blend import IMAGES, load_blend
    from nemotron_h.data.feed.image_module import ImageConversationDataModule
    from nemotron_h.data.feed.sft_module import ConversationDataModule
    from nemotron_h.training.callbacks.adapter_table import AdapterTable

    tuned = parsed(factory_of(name), "resume.init_checkpoint=there", "data.too_long=drop", command="finetune")
    model = name.split("/")[0]
    pretrained = f"{model}/pretrain" in known_recipes()  # a model that is imported is not
    base = parsed(model if pretrained else "llama_tiny")
    seen = load_blend(tuned.data.blend).holds() == IMAGES
    reader = ImageConversationDataModule if seen else ConversationDataModule
    assert (tuned.__fn_or_cls__, tuned.data.__fn_or_cls__) == (llm.finetune, reader)
    assert (tuned.resume.init_checkpoint, tuned.data.too_long, tuned.tokenizer) == ("there", "drop", "data")
    assert tuned.model.config.calculate_per_token_loss is True
    if pretrained:
        assert tuned.model.config.hybrid_override_pattern == base.model.config.hybrid_override_pattern
    shared = [c.__fn_or_cls__ for c in tuned.trainer.callbacks if c.__fn_or_cls__ is not AdapterTable]
    assert shared == [c.__fn_or_cls__ for c in base.trainer.callbacks]
    assert (shared == [c.__fn_or_cls__ for c in tuned.trainer.callbacks]) == (tuned.model.config.adapter is None)
    assert tuned.log.explicit_log_dir != base.log.explicit_log_dir


@pytest.mark.slow
@pytest.mark.parametrize("name", known_recipes("preference"))
def test_a_preference_factory_is_of_the_same_model_and_has_a_name_of_its_own(parsed, name: str) -> None:
    from nemotron_h.data.feed.preference_module import PreferenceDataModule
    from nemotron_h.training.stages.preference.stage import PreferenceModel, PreferenceResume

    assert factory_of(name) not in {*NAMES, *map(factory_of, TUNED)}
    task = parsed(factory_of(name), "model.config.beta=0.5", "resume.init_checkpoint=there", command="finetune")
    base = parsed(name.split("/")[0])
    assert (task.model.__fn_or_cls__, task.data.__fn_or_cls__) == (PreferenceModel, PreferenceDataModule)
    assert (task.model.config.beta, task.model.config.loss) == (0.5, compose(name).preference.loss)
    assert (task.resume.__fn_or_cls__, task.resume.init_checkpoint) == (PreferenceResume, "there")
    assert task.model.config.calculate_per_token_loss is True
    assert task.model.config.hybrid_override_pattern == base.model.config.hybrid_override_pattern


@pytest.mark.slow
@pytest.mark.parametrize("part", [DistillSchema, PairLossSchema])
def test_no_key_of_a_stage_is_a_field_of_megatron_s(parsed, part: type) -> None:
    """A stage's configuration has the fields of both: one name would be two values."""
    from nemotron_h.model.module import NemotronHConfig

    assert not {each.name for each in fields(part)} & {each.name for each in fields(NemotronHConfig)}


@pytest.mark.slow
def test_a_variant_has_a_name_of_its_own(parsed) -> None:
    from nemotron_h.training.callbacks.adapter_table import AdapterTable

    lora = parsed("nemotron_h_tiny_sft_lora", "model.config.adapter.rank=4", command="finetune")
    assert (lora.model.config.adapter.kind, lora.model.config.adapter.rank) == ("lora", 4)
    assert lora.trainer.callbacks[0].__fn_or_cls__ is AdapterTable
    assert lora.log.explicit_log_dir == "runs/nemotron_h_tiny_sft_lora"
    assert parsed("nemotron_h_tiny", command="finetune").model.config.adapter is None


@pytest.mark.slow
def test_a_recipe_file_of_another_stage_names_its_command(parsed, tmp_path: Path) -> None:
    from nemotron_h.core.errors import UserError
    from nemotron_h.schema.recipe import factory_of_file

    file = tmp_path / "a, b (1) [2] 50%.yaml"
    file.write_text("# @package _global_\ndefaults: [/nemotron_h_tiny/sft, _self_]\nname: mine\n")
    assert parsed(factory_of_file(file), command="finetune").log.explicit_log_dir == "runs/mine"
    with pytest.raises(UserError, match="nemo llm finetune"):
        parsed(factory_of_file(file))


@pytest.mark.slow
def test_the_command_dry_runs(tmp_path: Path) -> None:
    nemo = Path(sys.executable).with_name("nemo")
    done = subprocess.run(
        [nemo, "llm", "pretrain", "--factory", "nemotron_h_56b", "--dryrun", "--yes", "optim.peak_lr=3e-4"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "nemotron_h_56b" in done.stdout
    assert "0.0003" in done.stdout
    assert not list(tmp_path.glob("runs/*")), "a dry run wrote a run"
