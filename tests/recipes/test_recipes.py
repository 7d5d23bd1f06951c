"""Shipped recipes: small diffs, a source for every value, and the paper's steps out of the real builder."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nemotron_h.core.strict import leaves
from nemotron_h.recipe import compose
from nemotron_h.recipe.checks import definition_of
from nemotron_h.recipe.compose import known_recipes, recipes_dir
from nemotron_h.recipe.shipped import read_shipped
from nemotron_h.schema.recipe import PIPELINES, STAGES

trace = functools.cache(compose.trace)

MATTERS = ("tokens", "precision.", "data.", "optim.", "parallel.", "adapter.", "distill.", "model.")
#: not choices: names, where data lies, and counts that follow from the pattern
NO_SOURCE = (
    "model.name",
    "model.family",
    "model.expect.",
    "model.sources",
    "data.root",
    "data.workers",
    "adapter.kind",
)
#: what is there where nothing is written
LEFT_OUT = (
    *(("model.mamba_norm", True), ("model.multipliers.rule", "none"), ("parallel.expert", 1), ("parallel.context", 1)),
    *(("optim.name", "adamw"), ("optim.momentum", 0.95), ("optim.newton_schulz", "simple")),
    *(("data.phase_order", "blend"), ("data.max_tiles", 12), ("data.tiling", "closest")),
)
FAMILY = {
    *("nemotron_h_4b", "nemotron_h_8b", "nemotron_h_47b", "nemotron_h_47b_paper", "nemotron_h_56b", "nemotron_t_8b"),
    *("mamba2_8b", "mamba2_hybrid_8b", "nano_4b", "nano_9b_v2", "nano_12b_v2"),
    *("nemotron_h_tiny", "nemotron_h_100m", "nemotron_h_400m", "nemotron_h_1b"),
    *("nemotron_h_moe_tiny", "nano_30b_a3b", "nemotron_h_tiny_heads", "nemotron_t_tiny"),
    *(f"falcon_h1_{size}" for size in ("tiny", "0.5b", "1.5b", "1.5b_deep", "3b", "7b", "34b")),
    "llama_tiny",
}
#: others' models, which are imported and fine-tuned
IMPORTED = {"smollm2_135m"}


def written(file: Path) -> dict:
    """Dotted keys and values of one file, without what it is made of."""
    content = OmegaConf.to_container(OmegaConf.load(file))
    return {key: value for key, value in leaves(content) if not key.startswith("defaults")}


def test_the_whole_family_ships() -> None:
    assert {name.split("/")[0] for name in known_recipes("pretrain")} == FAMILY
    # the study's own models have another vocabulary, and nobody's conversations in it
    # and parents to compress are pretrained alone
    # so is a model to distil hybrids from
    untuned = {"mamba2_8b", "mamba2_hybrid_8b", "nemotron_h_tiny_heads", "nemotron_t_tiny", "llama_tiny"}
    assert {name.split("/")[0] for name in known_recipes("sft")} == (FAMILY - untuned) | IMPORTED
    assert {name.split("/")[0] for name in known_recipes("preference")} <= FAMILY
    assert set(STAGES) <= {compose.stage_of(name) for name in known_recipes()} <= {*STAGES, *PIPELINES}


@pytest.mark.parametrize("name", known_recipes())
def test_what_ships_is_read_as_it_composes(name: str) -> None:
    read, composed = (
        dataclasses.replace(recipe, sources={}, model=dataclasses.replace(recipe.model, sources={}))
        for recipe in (read_shipped(name), trace(name).recipe)  # composing drops sources of replaced values
    )
    assert read == composed
    assert repr(read) == repr(composed), "of the same types"


@pytest.mark.parametrize("name", known_recipes())
def test_a_leaf_is_its_changed_keys(name: str) -> None:
    file = recipes_dir() / f"{name}.yaml"
    composed = trace(name)
    assert composed.layers[-1].file == file
    leaf = written(file)
    assert len(leaf) < 25, f"{len(leaf)} keys: share them in recipes/base"
    before: dict = {}
    for layer in composed.layers[:-1]:
        prefix = f"{layer.package}." if layer.package else ""
        before |= {prefix + key: value for key, value in written(layer.file).items()}
    repeated = [key for key, value in leaf.items() if key in before and before[key] == value]
    assert not repeated, f"{name} repeats what its base says: {repeated}"


@pytest.mark.parametrize("name", known_recipes())
def test_every_value_that_matters_has_a_source(name: str) -> None:
    composed = trace(name)
    matters = (*MATTERS, *(["experts."] if composed.recipe.model.num_experts else []))
    missing = [
        key
        for key, value in leaves(dataclasses.asdict(composed.recipe))
        if f"{key}.".startswith(matters)
        and not key.startswith(NO_SOURCE)
        and value not in (None, 0, 0.0, "", [], {})  # left out
        and (key, value) not in LEFT_OUT
        and key not in composed.sources
    ]
    assert not missing
    short = {key: text for key, text in composed.sources.items() if len(text) < len("paper 1") and text != "ours"}
    assert not short


@pytest.mark.parametrize("name", known_recipes())
def test_the_model_is_the_one_of_its_name(name: str) -> None:
    recipe = trace(name).recipe
    model, of_model = name.split("/")
    assert recipe.stage == compose.stage_of(name)
    assert recipe.model.name == model or recipe.stage in PIPELINES  # a compression's model is the parent
    assert recipe.name == (model if of_model == "pretrain" else f"{model}_{of_model}")  # two runs do not meet
    assert definition_of(recipe, name).parameters == recipe.model.expect.parameters


def steps(name: str) -> tuple[int, int, list[int]]:
    """Steps, warm-up and phase switches of a recipe, read off what `nemo` would run."""
    from nemotron_h.data.blend import load_blend
    from nemotron_h.data.phases import Horizon, phase_spans
    from nemotron_h.training.stages.pretrain import build

    task = build(trace(name).recipe)
    data = task.data
    horizon = Horizon(data.horizon_tokens, data.seq_length * data.global_batch_size)
    switches = [span.first_step for span in phase_spans(load_blend(data.blend).phases, horizon)[1:]]
    return task.trainer.max_steps, task.optim.warmup_steps, switches


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nemotron_h_8b/pretrain", (2_384_186, 1_319, [1_430_511, 1_907_349, 2_323_786])),
        ("nemotron_h_56b/pretrain", (3_178_914, 3_974, [1_907_349, 2_543_132, 3_118_515])),
    ],
)
def test_steps_are_the_paper_s(name: str, expected: tuple) -> None:
    assert steps(name) == expected


def test_a_wsd_schedule_reaches_the_optimizer() -> None:
    from nemotron_h.training.stages.pretrain import build

    assert build(trace("nano_12b_v2/pretrain").recipe).optim.decay_steps == 572_205  # 3.6 T / 6,291,456
    assert build(trace("nemotron_h_8b/pretrain").recipe).optim.decay_steps is None
