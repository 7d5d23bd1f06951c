"""What an earlier tree wrote keeps working: its runs resume bit for bit, its checkpoints generate, merge and export.

`written/` is as `write.py` left it: formats, and the names that files give to modules and classes, are those of that
tree. Nothing here may be written anew to make a test pass: a file that cannot be read any more is what this looks for.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from continued import ADAPTER, BASE, WORKER, outcome, processor, run_program
from small_run import COMPARE
from typer.testing import CliRunner

from nemotron_h.cli.main import app

HERE = Path(__file__).parent
EXPECTED = json.loads((HERE / "expected.json").read_text())
RECIPES = {"small": "runs/small/recipe.yaml", "small_lora": f"{ADAPTER}/recipe.yaml"}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What follows from a copy of the written runs."""
    folder = tmp_path_factory.mktemp("before") / "written"
    shutil.copytree(HERE / "written", folder)
    return outcome(folder)


def assert_near(actual: Any, expected: Any) -> None:
    """Check that all numbers are within a thousandth; hexadecimal ones are numbers too."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            assert_near(actual[key], value)
    elif isinstance(expected, str):
        assert float.fromhex(actual) == pytest.approx(float.fromhex(expected), rel=1e-3)
    else:
        assert actual == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED["data"])
def test_the_same_is_read_and_exported(found: dict[str, Any], name: str) -> None:
    assert found["data"][name] == EXPECTED["data"][name]


@pytest.mark.slow
def test_runs_resume_as_they_did(found: dict[str, Any]) -> None:
    # Sums depend on the processor in their last bits: where it is another one than that of `write.py`, or torch is,
    # steps are compared within a thousandth, and what they end in not at all.
    actual, expected = found["computed"], EXPECTED["computed"]
    if processor() == EXPECTED["processor"]:
        assert actual == expected
    else:
        assert_near(actual["steps"], expected["steps"])
        names, expected_names = (
            {name: set(part) for name, part in found["tensors"].items()} for found in (actual, expected)
        )
        assert names == expected_names
        assert actual["peft"].keys() == expected["peft"].keys()


@pytest.mark.slow
def test_whole_states_are_read_by_ranks_that_hold_parts(tmp_path: Path) -> None:
    """The written run's optimizer lies there as whole tensors; ranks of today write each its part."""
    folder = tmp_path / "written"
    shutil.copytree(HERE / "written", folder)
    options = ("trainer.devices=2", "trainer.max_steps=5", "copy=copy")
    run_program(folder, str(WORKER), "runs/small/recipe.yaml", *options, ranks=2)
    said = run_program(folder, str(COMPARE), f"{BASE}/weights", "copy/weights")
    assert "same: " in said, said


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the written runs, and the working directory."""
    shutil.copytree(HERE / "written", tmp_path / "written")
    monkeypatch.chdir(tmp_path / "written")
    return tmp_path / "written"


def recipe(*arguments: str) -> str:
    """Run `nemotron-h recipe ARGUMENTS`; return what it printed."""
    return CliRunner().invoke(app, ["recipe", *arguments], catch_exceptions=False).stdout


def leaves(values: Mapping[str, Any], *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every value that is no mapping, with its keys."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, *path, key)
        else:
            yield (*path, key), value


@pytest.mark.parametrize("run", RECIPES)
def test_recipes_of_runs_load_with_every_value(folder: Path, run: str) -> None:
    recorded = yaml.safe_load((folder / RECIPES[run]).read_text())
    assert json.loads((folder / "runs" / run / "run.json").read_text())["recipe"] == recorded
    shown = dict(leaves(yaml.safe_load(recipe("show", RECIPES[run], "--plain"))))
    assert shown["log", "trackers"] == ["tensorboard"] * recorded["log"].pop("tensorboard")  # its name today
    assert {key: shown.get(key) for key, _ in leaves(recorded)} == dict(leaves(recorded))  # there may be new keys
    assert recipe("diff", RECIPES[run], f"{run}.yaml") == "the recipes are the same\n"
    assert recipe("check", RECIPES[run]).startswith("ok")


def test_the_model_of_a_checkpoint_loads_into_a_recipe(folder: Path) -> None:
    recorded = json.loads((folder / BASE / "run.json").read_text())["model"]
    shown = yaml.safe_load(recipe("show", "small.yaml", f"model={BASE}", "--plain"))["model"]
    assert shown["expect"].pop("parameters") == 6182  # the record does not count them
    del recorded["expect"]["parameters"]
    assert {key: shown["expect"][key] for key in recorded["expect"]} == recorded.pop("expect")  # there may be new keys
    assert {key: shown[key] for key in recorded} == recorded
