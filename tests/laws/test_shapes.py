"""Shapes of one number of parameters are valid models; the ranker keeps the bound, and what it writes is planned."""

from __future__ import annotations

import functools
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nemotron_h.architecture.blocks.families import check_pattern, hybrid_pattern
from nemotron_h.architecture.definition import ModelDefinition, definition_from_dict
from nemotron_h.checkpoint.definition import definition_text
from nemotron_h.cli.main import app
from nemotron_h.core.errors import UserError
from nemotron_h.laws.law import law_named
from nemotron_h.laws.ranking import rank
from nemotron_h.laws.shapes import TOLERANCE, enumerate_shapes, model_named
from nemotron_h.planning.gpus import gpu
from nemotron_h.planning.latency import roofline
from nemotron_h.recipe.compose import compose, configs_dir
from nemotron_h.schema.layer_costs import Scenario


def test_patterns_follow_the_rules_and_have_the_counts() -> None:
    for ffn in range(1, 13):
        for mamba in range(1, 2 * ffn + 3):
            for attention in range(ffn + 1):
                pattern = hybrid_pattern(mamba, attention, ffn)
                check_pattern(pattern, "nemotron_h", pattern)
                assert [pattern.count(letter) for letter in "M*-"] == [mamba, attention, ffn]


@functools.cache
def enumerated(like: str, parameters: int, tensor: int) -> list[ModelDefinition]:
    return list(enumerate_shapes(model_named(like), parameters, tensor))


@pytest.mark.parametrize(
    ("like", "parameters", "tensor"),
    [("nemotron_h_1b", 10**9, 2), ("nemotron_t_8b", 4 * 10**9, 8), ("mamba2_8b", 2 * 10**9, 1)],
)
def test_shapes_have_the_parameters_and_split(like: str, parameters: int, tensor: int) -> None:
    shapes = enumerated(like, parameters, tensor)
    assert len(shapes) > 8
    assert len({(shape.hidden_size, shape.pattern) for shape in shapes}) == len(shapes)
    for shape in shapes[::9]:
        definition_from_dict(asdict(shape), shape.name).validate_tensor_parallel(tensor, shape.name)
        assert abs(shape.parameters / parameters - 1) <= TOLERANCE
        assert shape.family == model_named(like).family


def test_hybrids_differ_in_depth_and_mix() -> None:
    shapes = enumerated("nemotron_h_1b", 10**9, 2)
    assert {shape.num_layers > 60 for shape in shapes} == {True, False}
    assert {shape.count("*") > 0 for shape in shapes} == {True, False}
    assert {shape.count("M") > shape.count("-") for shape in shapes} == {True, False}


def test_a_size_that_none_has_is_an_error() -> None:
    with pytest.raises(UserError, match="no shape alike nemotron_h_8b has 1,000,000 parameters"):
        list(enumerate_shapes(model_named("nemotron_h_8b"), 10**6))
    with pytest.raises(UserError, match="family falcon_h1 are not enumerated"):
        list(enumerate_shapes(model_named("falcon_h1_tiny"), 10**7))
    with pytest.raises(UserError, match="there is no model 'nemotron_h_2b'"):
        model_named("nemotron_h_2b")


def test_a_bound_leaves_out_and_the_rest_is_in_order() -> None:
    law, _ = law_named("morph")
    like, h200 = model_named("nemotron_t_8b"), gpu("h200")

    def latency(each):
        return roofline(each, h200, Scenario(64, 8192))

    free = rank(like, 10**9, 2e10, law, latency)
    bound = sorted(each.latency.decode for each in free.shapes)[len(free.shapes) // 2]
    ranking = rank(like, 10**9, 2e10, law, latency, bound)
    assert ranking.slower == len(free.shapes) - len(ranking.shapes) > 0
    assert all(each.latency.decode <= bound for each in ranking.shapes)
    losses = [each.loss for each in ranking.shapes]
    assert losses == sorted(losses)
    with pytest.raises(UserError, match=r"has a decode below 0\.001 ms") as error:
        rank(like, 10**9, 2e10, law, latency, 1e-6)
    assert re.search(r"the fastest has \d", error.value.hint)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["shapes", *arguments])
    if result.exception:
        raise result.exception
    return result.output


def test_the_command_writes_a_model_that_is_planned(tmp_path: Path) -> None:
    file = tmp_path / "chosen.yaml"
    bound = ("--latency-below", "20ms", "--tensor", "8")
    output = run("--parameters", "4B", "--like", "nemotron_t_8b", *bound, "--write", str(file))
    assert "fitted to Transformers of OpenLM" in output
    assert "not fitted to" in output
    assert re.search(r"┃ +loss ┃", output)
    recipe = compose("nemotron_t_8b", [f"model={file}"])
    assert recipe.model.name == "chosen"
    assert abs(recipe.model.expect.parameters / 4e9 - 1) <= TOLERANCE
    assert "nemotron-h shapes --parameters 4B" in file.read_text()


def test_a_hybrid_is_ranked_by_measured_layers_and_by_shape_alone(tmp_path: Path) -> None:
    file = tmp_path / "chosen.yaml"
    output = run("--parameters", "200M", "--on", "cpu", "--latency-below", "60ms", "--top", "3", "--write", str(file))
    assert "over best" in output
    assert not re.search(r"┃ +loss ┃", output)  # of another size than its runs, the law knows the order alone
    assert "extrapolation" in output
    assert re.search(r"\d+ above the bound", output)
    assert compose("nemotron_h_1b", [f"model={file}"]).model.family == "nemotron_h"


def test_a_gpu_has_measured_layers_where_they_were_measured_so_and_else_its_peak_rates() -> None:
    for arguments, words in (
        ((), "layers measured on NVIDIA H200, bfloat16"),
        (("--batch", "2"), "h200 at its peak rates in BF16, a lower bound"),
        (("--like", "nemotron_t_8b"), "h200 at its peak rates in BF16, a lower bound"),
    ):
        assert words in " ".join(run("--parameters", "1B", "--on", "h200", *arguments).split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--latency-below", "20"), "--latency-below '20' is no time"),
        (("--parameters", "many"), "--parameters: 'many'"),
        (("--on", "h20"), "--on h20: there is no such machine"),
        (("--on", "cpu", "--batch", "3"), "cpu was not measured with batch 3"),
        (("--law", "morf"), "there is no law 'morf'"),
        (("--part", "total"), "--part = 'total'"),
        (("--write", "nowhere/x.yaml"), "--write nowhere/x.yaml"),
        (("--like", "mamba2_8b"), "there is no law of family mamba2"),
    ],
)
def test_mistakes_are_one_error(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        run("--parameters", "1B", "--like", "nemotron_t_8b", *arguments)


@pytest.mark.parametrize("name", sorted(file.stem for file in (configs_dir() / "model").glob("*.yaml")))
def test_a_definition_is_read_as_it_was_written(name: str, tmp_path: Path) -> None:
    """Values that are the schema's defaults are left out of the file; `mamba_norm: false` is none."""
    file = tmp_path / "model.yaml"
    file.write_text(definition_text(model_named(name), "A copy."))
    assert model_named(str(file)) == model_named(name)
