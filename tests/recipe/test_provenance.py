"""Where values come from: the line that won the merge, and only the sources that speak of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemotron_h.core.errors import UserError
from nemotron_h.core.strict_yaml import flat_lines
from nemotron_h.recipe.compose import compose, recipes_dir, trace

OWN = """\
# @package _global_
defaults:
  - /nemotron_h_tiny/pretrain
  - _self_
name: own
optim:
  peak_lr: 2e-3
  beta2: 0.98
log: {every_steps: 5}
sources:
  optim.beta2: "ours: tried"
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.yaml"
    path.write_text(OWN)
    return path


def line_of(file: Path, text: str) -> int:
    """The number of the first line that begins with a text, indentation aside."""
    return next(n for n, line in enumerate(file.read_text().splitlines(), 1) if line.strip().startswith(text))


def test_every_value_names_the_line_that_won(own: Path) -> None:
    composed = trace(str(own), ["data.seed=5"])
    at = {key: (origin.file, origin.line) for key, origin in composed.origins.items()}
    assert at["name"] == (own, 5)
    assert (at["optim.peak_lr"], at["optim.beta2"]) == ((own, 7), (own, 8))
    assert at["log.every_steps"] == (own, 9)
    tiny = recipes_dir() / "nemotron_h_tiny" / "pretrain.yaml"
    assert at["tokens"] == (tiny, line_of(tiny, "tokens:"))
    base = recipes_dir() / "base" / "pretrain.yaml"
    assert at["optim.beta1"] == (base, line_of(base, "beta1:"))
    assert at["model.pattern"][0].name == "nemotron_h_tiny.yaml"
    assert at["data.seed"] == (None, None)
    assert composed.origins["data.seed"].rank == len(composed.layers)
    assert "data.document_reset" not in composed.origins  # the schema's default


def test_an_exchanged_part_comes_from_its_own_file(own: Path) -> None:
    composed = trace(str(own), ["model=nemotron_h_100m", "data.blend=sample"])
    assert composed.origins["model.pattern"].file.name == "nemotron_h_100m.yaml"
    assert composed.recipe.model.name == "nemotron_h_100m"


def test_a_source_does_not_outlive_its_value(own: Path) -> None:
    shipped = compose("nemotron_h_tiny")
    assert shipped.sources["optim.beta1"] == shipped.sources["optim.beta2"] == "paper 2.4"
    assert "optim.peak_lr" in shipped.sources
    mine = trace(str(own), ["optim.beta1=0.8", "model.norm_epsilon=1e-6"])
    assert mine.recipe.sources["optim.beta2"] == "ours: tried"
    for replaced in ("optim.beta1", "optim.peak_lr"):
        assert replaced not in mine.sources
        assert replaced not in mine.recipe.sources
    assert "norm_epsilon" in shipped.model.sources
    assert "norm_epsilon" not in mine.recipe.model.sources


def test_lines_of_merge_keys_flow_mappings_and_dotted_names() -> None:
    text = "a: &a\n  x: 1\n  y: {z: 2}\nb:\n  <<: *a\n  x: 3\nsources:\n  a.x: here\nc: {}\nd: [1,\n 2]\n"
    lines = {"a.x": 2, "a.y.z": 3, "b.y.z": 3, "b.x": 6, "sources.a.x": 8, "c": 9, "d": 10}
    assert dict(flat_lines(text, "a.yaml")) == lines
    assert list(flat_lines("# nothing\n", "a.yaml")) == []


def test_a_yml_file_and_an_unknown_source_are_errors(tmp_path: Path, own: Path) -> None:
    other = own.rename(tmp_path / "own.yml")
    with pytest.raises(UserError, match=r"rename it to .*own\.yaml"):
        compose(str(other))
    other.rename(own)
    own.write_text(OWN.replace("optim.beta2:", "optim.bta2:"))
    with pytest.raises(UserError, match=r"(?s)optim\.bta2.*optim\.beta2"):
        compose(str(own))
