"""A new size outside of the package: one model file and one recipe of under 15 lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemotron_h.core.errors import UserError
from nemotron_h.recipe.compose import compose, trace

MODEL = """\
name: mine_1b
family: nemotron_h
pattern: M-M-M-M*-M-M-M-M-M*-M-M-M-
hidden_size: 2048
ffn_hidden_size: 10752
num_attention_heads: 16
num_query_groups: 8
head_dim: 128
mamba_num_heads: 64
mamba_head_dim: 64
mamba_num_groups: 8
mamba_state_dim: 128
conv_kernel: 4
vocab_size: 131072
expect: { mamba: 12, attention: 2, ffn: 12, parameters: 1444888832 }
"""
RECIPE = """\
# @package _global_
defaults:
  - /base/relative
  - /model: mine_1b
  - _self_
name: mine_1b
tokens: 2T
optim:
  peak_lr: 1e-3
  final_lr: 1e-5
  warmup_tokens: 5B
parallel: { nodes: 96, tensor: 1, sequence: false }
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The recipe's file, with `model/` beside it."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine_1b.yaml").write_text(MODEL)
    file = tmp_path / "mine_1b.yaml"
    file.write_text(RECIPE)
    return file


def test_it_is_under_fifteen_lines_and_composes(recipe: Path) -> None:
    assert len(RECIPE.splitlines()) < 15
    composed = trace(str(recipe))
    assert composed.recipe.model.hidden_size == 2048
    assert composed.recipe.data.global_batch_size == 768
    assert [layer.file for layer in composed.layers][-2:] == [recipe.parent / "model" / "mine_1b.yaml", recipe]
    # what the file sets without saying where from has no source; what it takes from the base keeps the base's
    assert "optim.peak_lr" not in composed.sources
    assert composed.sources["data.seq_length"].startswith("ours: not published for this model")


def test_it_builds(recipe: Path) -> None:
    from nemotron_h.training.stages.pretrain import build

    task = build(compose(str(recipe)))
    assert task.model.config.hidden_size == 2048
    assert task.trainer.max_steps == 317_891  # 2 T / (8,192 x 768)
    assert task.optim.warmup_steps == 795


def test_a_wrong_count_in_its_model_file_is_named(recipe: Path) -> None:
    file = recipe.parent / "model" / "mine_1b.yaml"
    file.write_text(MODEL.replace("mamba: 12", "mamba: 13"))
    with pytest.raises(UserError) as caught:
        compose(str(recipe))
    assert str(recipe) in str(caught.value)
    assert "mamba: 12 counted, 13 expected" in str(caught.value)
