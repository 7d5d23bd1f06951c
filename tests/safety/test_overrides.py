"""A recipe's `overrides` are data: what names code is refused when the recipe is composed, without torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from code_in_values import OF_THE_TASK, REFUSED, TEXTS, probe
from typer.testing import CliRunner

from nemotron_h.cli.main import app
from nemotron_h.core.errors import UserError
from nemotron_h.recipe.compose import compose
from nemotron_h.recipe.overrides import check_overrides

RECIPE = "defaults: [/nemotron_h_tiny/pretrain, _self_]\nname: own\noverrides: {}\n"


def recipe(folder: Path, *settings: str) -> Path:
    path = folder / "own.yaml"
    path.write_text(RECIPE.format(json.dumps(settings)))
    return path


@pytest.mark.parametrize("setting", REFUSED)
def test_code_is_refused(setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    marker, names = probe(tmp_path, "probe_of_recipes")
    with pytest.raises(UserError, match=r"own\.yaml: overrides: .*: .* is code, and the values of a file are data"):
        check_overrides(["trainer.max_steps=3", setting.format(**names)], "own.yaml")
    assert not marker.exists()


def test_every_command_that_composes_refuses_it(tmp_path: Path) -> None:
    path = recipe(tmp_path, REFUSED[0].format(marker=tmp_path / "ran"))
    for command in ("show", "check"):
        found = CliRunner().invoke(app, ["recipe", command, str(path)])
        assert isinstance(found.exception, UserError)
        assert "os.system(...) is code" in found.exception.message
    assert not (tmp_path / "ran").exists()


def test_data_is_not(tmp_path: Path) -> None:
    settings = [
        *(setting.format(probe="a", marker="b") for setting in (*OF_THE_TASK, *TEXTS)),
        "trainer.max_steps=20",
        "optim.peak_lr*=2",
        "data.root='runs (1)/a(2)'",
        "data.root=Configs/Partials",
        "log.tensorboard=null",
        "a.b=[1, 2.5, 'x', {'y': None}]",
    ]
    check_overrides(settings, "own.yaml")
    settings.remove("optim.peak_lr=a.value")  # a text, which the recipe's key does not take
    of_recipe = ("optim.peak_lr", "data.root", "log.tensorboard")
    composed = compose(str(recipe(tmp_path, *settings)))
    assert composed.overrides == [setting for setting in settings if not setting.startswith(of_recipe)]
    values = composed.optim.peak_lr, composed.data.root, composed.log.trackers
    assert values == (pytest.approx(6e-3), "Configs/Partials", [])


@pytest.mark.parametrize("setting", ["trainer.max_steps", "=5", "a b=5", "trainer.max_steps="])
def test_what_is_no_setting(setting: str) -> None:
    with pytest.raises(UserError, match=r"own\.yaml: overrides: .* is not a setting"):
        check_overrides([setting], "own.yaml")


def test_check_says_what_is_left_to_the_run(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["recipe", "check", str(recipe(tmp_path, "trainer.max_steps=20", "data=mock"))])
    assert found.exit_code == 0
    assert (
        "keys and types of overrides, which nemo ... --dryrun checks: trainer.max_steps=20, data=mock" in found.output
    )
