"""A command that a recipe names runs only where the command line allows it."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from nemotron_h.cli.main import app
from nemotron_h.core.errors import UserError


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ((), True),
        (("tokens=2M", "--stage", "importance"), True),
        (("--allow-evaluate",), False),
        (("minipuzzle.evaluate=other {checkpoint}",), False),
        (("minipuzzle.evaluate=null",), False),
        (("--status",), False),
    ],
)
def test_minipuzzle_runs_no_command_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], refused: bool
) -> None:
    monkeypatch.chdir(tmp_path)  # where nothing is prepared, which is said after this
    recipe = tmp_path / "own.yaml"
    recipe.write_text(
        "defaults: [/nemotron_h_tiny/minipuzzle, _self_]\nname: own\nminipuzzle: {evaluate: 'touch ran {checkpoint}'}\n"
    )
    found = CliRunner().invoke(app, ["minipuzzle", str(recipe), *options])
    assert isinstance(found.exception, UserError)
    assert ("minipuzzle.evaluate is a command" in found.exception.message) == refused, found.exception.message
    if refused:
        assert "touch ran {checkpoint}" in found.exception.message
        assert "--allow-evaluate" in found.exception.hint
    if not options:
        checked = CliRunner().invoke(app, ["recipe", "check", str(recipe)])
        assert "the command of minipuzzle.evaluate, run with --allow-evaluate: touch ran" in checked.output
    assert not (tmp_path / "ran").exists()
