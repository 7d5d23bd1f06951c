"""Definitions and plans of models that read images: counts by hand, what does not train, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nemotron_h.architecture.adapters import trained_parameters
from nemotron_h.architecture.frozen import frozen_parameters
from nemotron_h.architecture.gemms import encoder_gemms, fold
from nemotron_h.cli.main import app
from nemotron_h.core.errors import UserError
from nemotron_h.planning.flops import flops_per_token
from nemotron_h.planning.inference import Serving, inference_memory
from nemotron_h.planning.plan import make_plan
from nemotron_h.recipe.checks import definition_of
from nemotron_h.recipe.compose import Composed, changed, compose, configs_dir, read_encoder, trace
from nemotron_h.schema.recipe import RecipeConfig

TINY = ("nemotron_h_tiny/sft", "vision=internvit_tiny")


@pytest.fixture(scope="module")
def composed() -> Composed:
    return trace(TINY[0], [TINY[1]])


@pytest.fixture(scope="module")
def text() -> RecipeConfig:
    """The same without an encoder."""
    return compose(TINY[0])


def test_the_paper_s_projectors_and_tokens_and_the_precision_of_its_matmuls() -> None:
    """Of both models, whose encoder is one (paper 4): as wide as the language model's FFN, 256 tokens of a tile."""
    for name, inner, hidden in (("nemotron_h_8b", 21504, 4096), ("nemotron_h_56b", 32768, 8192)):
        recipe = compose(f"{name}/pretrain", ["vision=internvit_300m", "precision=fp8_current_scaling"])
        definition = definition_of(recipe, name)
        encoder = definition.encoder
        assert encoder.tokens_per_tile == 256
        assert encoder.parameters == 304_012_288
        assert encoder.projector.parameters == 4096 + inner * (4096 + hidden)
        assert trained_parameters(recipe.adapter, definition) == definition.parameters + definition.vision_parameters
        memory = inference_memory(definition, Serving(1))
        assert memory.weights == 2 * (definition.parameters + definition.vision_parameters)
        groups = fold(encoder_gemms(definition, recipe.precision, 2, tiles=3))
        assert [(g.gemm.name, g.gemm.dtype, g.gemm.why, len(g.layers)) for g in groups] == [
            *((name, "BF16", "vision", 24) for name in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")),
            *((name, "BF16", "projector", 1) for name in ("linear_fc1", "linear_fc2")),
        ]
        up = groups[-2].gemm
        assert (up.m, up.n, up.k) == (256 * 3, inner // 2, 4096)


def test_a_tile_s_operations(composed: Composed, text: RecipeConfig) -> None:
    """Of the tiny encoder by hand: 64 patches and a class token of width 128, 16 image tokens."""
    definition = definition_of(composed.recipe, "")
    assert definition.vision == read_encoder("internvit_tiny")
    begun = replace(definition, vision=replace(definition.vision, name="another", init_std=0.5, layer_scale=0.5))
    assert not definition.differences(begun, "in the checkpoint", "now")
    cut = replace(definition, vision=replace(definition.vision, patch_size=8))
    assert definition.differences(cut, "in the checkpoint", "now")
    layer = 2 * (4 * 128 * 128 + 2 * 128 * 512) + 4 * 128 * 65  # a position's matrices, and all pairs of positions
    forward = {"vision": 4 * 65 * layer + 64 * 2 * 48 * 128, "projector": 16 * 2 * 1344 * (512 + 256)}
    assert definition.encoder.flops_per_tile(training=False) == forward
    flops = definition.encoder.flops_per_tile
    assert flops() == {part: 3 * n for part, n in forward.items()}
    assert flops(frozen=("vision",)) == {"vision": forward["vision"], "projector": 2 * forward["projector"]}
    assert flops(frozen=("vision", "projector")) == forward
    assert flops(frozen=("projector",)) == {"vision": 3 * forward["vision"], "projector": 2 * forward["projector"]}
    seen, unseen = (flops_per_token(definition, 512, tiles=tiles) for tiles in (8, 0))
    assert seen.vision == 8 * 3 * forward["vision"] / 512
    assert seen.total - unseen.total == pytest.approx(seen.vision + seen.projector)
    assert unseen.total == flops_per_token(definition_of(text, ""), 512).total


def test_what_does_not_train_needs_less(composed: Composed, text: RecipeConfig) -> None:
    """Projector alone (the paper's stage 1) and all (stage 2)."""
    plans = {
        frozen: make_plan(changed(composed.recipe, {"optim.frozen": [each for each in frozen.split(",") if each]}, ""))
        for frozen in ("", "vision", "vision,language", "vision,projector")
    }
    definition = plans[""].definition
    vision, projector = definition.encoder.parameters, definition.encoder.projector.parameters
    assert plans["vision,language"].trained == projector
    assert plans[""].trained - plans["vision"].trained == vision
    assert frozen_parameters(definition, ["language"]) == definition.parameters
    kept = {name: plan.stages[0].activations for name, plan in plans.items()}
    assert kept[""]["vision"] > 0
    assert not kept["vision"].get("vision")
    assert kept["vision"]["projector"] == kept[""]["projector"] > 0
    assert not kept["vision,projector"].get("projector")
    recomputed = make_plan(changed(composed.recipe, {"recompute.vision": "layer"}, "")).stages[0].activations
    assert recomputed["vision"] < kept[""]["vision"] / 3
    peaks = [plans[name].largest.peak for name in ("", "vision", "vision,language")]
    assert peaks == sorted(peaks, reverse=True)
    states = plans[""].stages[0]
    assert states.weights - make_plan(text).stages[0].weights == 2 * (vision + projector)


def test_context_parallel_ranks_share_the_tiles(composed: Composed, text: RecipeConfig) -> None:
    """Each keeps what the backward of its tiles takes; their tokens go to the other rank, and gradients come back."""
    split = {"parallel.context": 2, "parallel.devices": 2, "data.micro_batch_size": 1}
    one = make_plan(changed(composed.recipe, {"data.micro_batch_size": 1}, ""))
    two, plain = (make_plan(changed(recipe, split, "")) for recipe in (composed.recipe, text))
    tiles = one.definition.encoder.tiles(composed.recipe.data.seq_length)
    share = -(-tiles // 2)
    kept = [plan.stages[0].activations for plan in (one, two)]
    for part in ("vision", "projector"):
        assert kept[1][part] * tiles == kept[0][part] * share
    tokens = share * one.definition.encoder.tokens_per_tile
    sent = 2 * tokens * one.definition.hidden_size * 2  # there and back, in bfloat16
    assert two.exchanged - plain.exchanged == sent * two.layout.micro_batches


def test_the_command_tells_it(composed: Composed) -> None:
    words = ["plan", *TINY]
    told = CliRunner().invoke(app, words, catch_exceptions=False).stdout
    assert "808,832 in the image encoder internvit_tiny, 1,032,704 in the projector: 13,168,288 together" in told
    assert "a tile of 32 x 32 is 16 tokens and" in told
    plan = make_plan(composed.recipe)
    assert plan.gemms[0].gemm.kind == "vision_attention"
    vision = plan.as_dict()["vision"]
    assert vision.pop("flops_per_tile").keys() == {"vision", "projector"}
    assert vision == {
        "encoder": "internvit_tiny",
        "parameters": 808_832,
        "projector_parameters": 1_032_704,
        "tokens_per_tile": 16,
        "tiles_per_sequence": 32,
    }


def test_its_values_have_sources(composed: Composed) -> None:
    keys = [key for key in composed.origins if key.startswith(("model.vision.", "model.projector."))]
    assert len(keys) == 15
    assert all(key in composed.sources for key in keys)
    assert str(composed.origins["model.vision.hidden_size"].file).endswith("configs/vision/internvit_tiny.yaml")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.vision.image_size": 30}, "image_size = 30 is not a multiple of twice model.vision.patch_size = 4"),
        ({"model.vision.num_attention_heads": 5}, "hidden_size = 128 is not a multiple of model.vision.num_attention"),
        ({"model.vision.norm": "batchnorm"}, "model.vision.norm = 'batchnorm'"),
        ({"model.vision.hidden_size": 0}, "model.vision.hidden_size = 0 is below 1"),
        ({"model.vision.widht": 3}, "unknown key model.vision.widht"),
        ({"parallel.tensor": 8, "parallel.devices": 8}, "parallel.tensor = 8 does not divide"),
        ({"optim.frozen": ["visio"]}, "has no 'visio'"),
        ({"optim.frozen": ["language", "ffn"]}, "ffn is part of language"),
        ({"optim.frozen": ["vision", "projector", "language"]}, "leaves nothing to train of nemotron_h_tiny"),
        (
            {"optim.frozen": ["vision", "language"], "parallel.pipeline": 2, "parallel.devices": 2},
            "leaves nothing to train of pipeline stage 1 of 2",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused(changes: dict, words: str, composed: Composed) -> None:
    with pytest.raises(UserError) as error:
        changed(composed.recipe, changes, "here")
    assert words in str(error.value)


def test_refused_by_the_parts_of_a_recipe(text: RecipeConfig) -> None:
    for changes, words in (
        ({"recompute.vision": "layer"}, "recompute.vision = 'layer' is unused"),
        ({"optim.frozen": ["projector"]}, "has no 'projector'"),
        ({"model.projector.ffn_hidden_size": 8}, "model.projector has no use"),
    ):
        with pytest.raises(UserError) as error:
            changed(text, changes, "here")
        assert words in str(error.value)
    with pytest.raises(UserError, match=r"stage distill: model nemotron_h_tiny has model\.vision \(internvit_tiny\)"):
        compose("nemotron_h_tiny/distill", ["vision=internvit_tiny"])
    with pytest.raises(UserError, match="vision: 1,007,360 counted, 808,832 expected"):
        compose(TINY[0], [TINY[1], "model.vision.num_layers=5"])
    with pytest.raises(UserError, match=r"(?s)vision = 'internvit_tin'.*Did you mean internvit_tiny"):
        compose(TINY[0], ["vision=internvit_tin"])


def test_an_encoder_is_added_to_a_model_of_a_file_too(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text((configs_dir() / "model" / "nemotron_h_tiny.yaml").read_text().replace("nemotron_h_tiny", "mine"))
    for changes in ([f"model={file}", TINY[1]], [TINY[1], f"model={file}"]):
        model = compose(TINY[0], changes).model
        assert (model.name, model.vision, model.expect.vision) == ("mine", read_encoder("internvit_tiny"), 808_832)
