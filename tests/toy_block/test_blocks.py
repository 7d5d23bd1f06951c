"""A model with a new kind of block, one with widths of its own in some layers, one with linear layers, Falcon-H1's, and
Llama's, through all of a life: recipe, plan, training, resume, generation, slicing. The new block is two files and two
lines of registries.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), *(str(HERE.parent / name) for name in ("training", "model", "inference"))]
from megatron_on_one_rank import megatron  # noqa: E402, F401
from register import register, unregister  # noqa: E402
from save_checkpoint import save  # noqa: E402
from small_model import relative_error, small_config, small_model  # noqa: E402
from small_run import Small, assert_same, prepared  # noqa: E402

from nemotron_h.checkpoint import folders  # noqa: E402
from nemotron_h.checkpoint.definition import read_definition  # noqa: E402
from nemotron_h.checkpoint.reader import read_record  # noqa: E402
from nemotron_h.compression.child import Child  # noqa: E402
from nemotron_h.compression.slicing import write_child  # noqa: E402
from nemotron_h.core.errors import UserError  # noqa: E402
from nemotron_h.export.config import check_expressible  # noqa: E402
from nemotron_h.export.gguf_format import F32  # noqa: E402
from nemotron_h.export.gguf_model import values  # noqa: E402
from nemotron_h.inference.model import GenerationModel, load_model  # noqa: E402
from nemotron_h.planning.flops import flops_per_token  # noqa: E402
from nemotron_h.planning.plan import make_plan  # noqa: E402
from nemotron_h.recipe.compose import compose  # noqa: E402

ROTARY = "\n  position_embedding: rope\n  rope_base: 10000\n  rope_percent: 1.0"
SCALED = """
  rope_scaling_factor: 8.0
  rope_low_freq_factor: 1.0
  rope_high_freq_factor: 4.0
  rope_original_length: 16"""
#: name -> changes of the small recipe, the counts of its layers, and the parameters by hand
MODELS = {
    # norms 6 * 64; the gated layer has a third matrix of 64 x 96
    "toy": (
        [("pattern: M-M*-", "pattern: MGM*-"), ("family: nemotron_h", "family: pruned")],
        "mamba: 2, attention: 1, ffn: 1",
        163376 + 64 * 96,
    ),
    # 2 groups of keys fewer: 2 * 16 * 64 each; 32 neurons fewer: 2 * 64 each
    "overrides": (
        [("init_std: 0.1", "init_std: 0.1\n  overrides: {1: {ffn_hidden_size: 64}, 3: {num_query_groups: 1}}")],
        "mamba: 2, attention: 1, ffn: 2",
        163376 - 32 * 2 * 64 - 2 * 16 * 64,
    ),
    # two linear layers: norm and matrix
    "linear": (
        [("pattern: M-M*-", "pattern: M-ML*-L"), ("family: nemotron_h", "family: pruned")],
        "mamba: 2, attention: 1, ffn: 2, linear: 2",
        163376 + 2 * (64 + 64 * 64),
    ),
    # of two P, each: norm, projection in and out, convolution, scan, gated norm, attention; of two S; and the ends
    "falcon_h1": (
        [
            ("pattern: M-M*-", "pattern: PSPS"),
            ("family: nemotron_h", f"family: falcon_h1{ROTARY}"),
            ("init_std: 0.1", "init_std: 0.1\n  multipliers: {rule: falcon_h1}"),
        ],
        "mamba: 0, attention: 0, ffn: 0, parallel: 2, swiglu: 2",
        2 * (64 + 64 * 328 + 128 * 64 + 5 * 192 + 3 * 8 + 128 + 64 * 128 + 64 * 64 + 64 + 3 * 64 * 96)
        + (2 * 512 * 64 + 64),
    ),
    # of two *, each: norm, projections, biases, norms of heads; of two S; and the ends, of which two are one
    "llama": (
        [
            ("pattern: M-M*-", 'pattern: "*S*S"'),
            ("family: nemotron_h", f"family: llama{ROTARY}{SCALED}"),
            ("  mamba_num_heads: 8\n  mamba_head_dim: 16\n  mamba_num_groups: 2\n  mamba_state_dim: 16\n", ""),
            ("  conv_kernel: 4\n", "  qkv_bias: true\n  qk_norm: true\n  tied_embeddings: true\n"),
        ],
        "mamba: 0, attention: 2, ffn: 0, swiglu: 2",
        2 * (64 + (128 + 64) * 64 + 128 + 2 * 16 + 64 + 3 * 64 * 96) + (512 * 64 + 64),
    ),
}
WORKER = HERE / "worker.py"


@pytest.fixture(scope="module")
def toy() -> Iterator[None]:
    register()
    yield
    unregister()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, toy: None) -> Small:
    return prepared(tmp_path_factory.mktemp("blocks"))


@pytest.fixture(scope="module", params=MODELS)
def trained(small: Small, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """Recipe and last checkpoint of a run that was killed and resumed, equal to one that was not."""
    changes, layers, parameters = MODELS[request.param]
    counts = ("mamba: 2, attention: 1, ffn: 2, parameters: 163376", f"{layers}, parameters: {parameters}")
    changes = [*changes, counts]
    names = [f"{request.param}_{how}" for how in ("straight", "resumed")]
    recipes = [small.variant(name, *changes) for name in names]
    for name, recipe, kills in zip(names, recipes, ([[]], [["kill=6"], []]), strict=True):
        for options in kills:
            small.train(name, *options, check=not options, recipe=recipe, program=WORKER)
    assert_same(small, *names)
    assert small.same_tensors(*names, 12)
    return recipes[0], folders.finished(small.run_dir(names[0]))[0]


def by_hand(model: GenerationModel, ids: Tensor) -> Tensor:
    """Return the logits of [b, l] tokens, read one after the other through states."""
    states = model.new_states(*ids.shape)
    return torch.stack([model.logits(model.step(column, states)) for column in ids.T], dim=1)


def test_it_is_planned(trained: tuple[Path, Path]) -> None:
    recipe = compose(str(trained[0]))
    plan = make_plan(recipe)
    blocks = plan.definition.blocks
    assert plan.definition.parameters == recipe.model.expect.parameters
    matrices = sum(matrix.size for block in blocks for matrix in block.matrices())
    assert flops_per_token(plan.definition, 64, training=False).linear == 2 * matrices
    assert plan.largest.peak > 0


def test_it_generates(trained: tuple[Path, Path]) -> None:
    model = load_model(trained[1])
    ids = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(0))
    at_once = model.logits(model.extend(ids, model.new_states(*ids.shape)))
    assert relative_error(by_hand(model, ids), at_once) < 1e-4


#: every kind with widths of its own somewhere
WIDTHS = {
    0: {"mamba_num_heads": 4, "mamba_num_groups": 1, "mamba_state_dim": 8},
    1: {"ffn_hidden_size": 32},
    2: {"mamba_head_dim": 32, "conv_kernel": 3},
    3: {"num_attention_heads": 6, "num_query_groups": 3, "head_dim": 8},
    4: {"ffn_hidden_size": 56},
}


def test_training_and_generation_are_one_model(megatron: None, toy: None, tmp_path: Path) -> None:  # noqa: F811
    """In float32 at scale 1, with the toy block and five layers of other widths."""
    config = small_config(pattern="MGM*-M-", family="pruned", overrides=WIDTHS)
    trained = small_model(config)
    ids = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = trained(input_ids=ids)[..., :300]
    model = load_model(save(trained, tmp_path / "checkpoint"))
    assert model.definition.parameters == sum(p.numel() for p in trained.parameters()) - 2 * 84 * 48  # padding
    assert relative_error(model.logits(model.extend(ids, model.new_states(*ids.shape))), expected) < 1e-5
    assert relative_error(by_hand(model, ids), expected) < 1e-5
    by_op = model.to(torch.float64)  # other steps than float32's on the CPU
    assert relative_error(by_hand(by_op, ids), expected) < 1e-5


def test_it_is_sliced(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """Writing a child compares it with its masked parent; layers keep different numbers of neurons."""
    _, checkpoint = trained
    parent = read_definition(read_record(checkpoint), "")
    whole = Child.whole(parent)
    kept = {layer: dict(axes) for layer, axes in whole.kept.items()}
    sizes = {}
    for layer, axes in kept.items():
        if "neurons" in axes:
            sizes[layer] = len(axes["neurons"]) - 16 * (layer + 1) // 2
            axes["neurons"] = np.arange(len(axes["neurons"]))[-sizes[layer] :]
    child = write_child(checkpoint, Child(whole.layers, np.arange(0, 64, 2), kept), tmp_path / "child", "child")
    assert {layer: child.blocks[layer].ffn_hidden_size for layer in sizes} == sizes
    assert json.loads((tmp_path / "child" / "run.json").read_text())["model"]["overrides"]


def test_formats_say_what_they_cannot_hold(trained: tuple[Path, Path]) -> None:
    definition = read_definition(read_record(trained[1]), "")
    words = r"gated layers, which .*: 1$|linear layers, which .*: 3, 6$|swiglu layers, which .*: (0, 1, 2, 3|1, 3)$"
    checks = {"nemotron_h": check_expressible}
    if definition.family not in ("falcon_h1", "llama"):  # which llama.cpp has
        checks["llama.cpp"] = lambda d: values(d, seq_length=64, file_type=F32)
    for name, check in checks.items():
        with pytest.raises(UserError, match=name) as error:
            check(definition)
        assert re.search(rf"{words}|widths of their own in layers 1, 3", error.value.message)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("{9: {ffn_hidden_size: 64}}", "model.overrides.9: the model has no such layer"),
        ("{1: {head_dim: 64}}", "model.overrides.1.head_dim: a ffn layer has no such width"),
        ("{1: {ffn_hidden_size: 0}}", "model.overrides.1.ffn_hidden_size = 0"),
        ("{3: {num_query_groups: 3}}", "num_attention_heads = 4 is not a multiple of model.overrides.3"),
    ],
)
def test_overrides_that_cannot_be(small: Small, overrides: str, words: str) -> None:
    recipe = small.variant("refused", ("init_std: 0.1", f"init_std: 0.1\n  overrides: {overrides}"))
    with pytest.raises(UserError) as error:
        make_plan(compose(str(recipe)))
    assert words in str(error.value)
