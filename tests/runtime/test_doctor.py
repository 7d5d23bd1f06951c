"""The lines of `nemotron-h doctor`."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from nemotron_h.cli.main import app
from nemotron_h.launch import doctor


def test_folders_with_brackets_are_shown_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = "/data/[bold]corpus[/bold]/[2024]"
    findings = [doctor.Finding("fail", "disk", f"0 GiB free in {folder}", f"free space in {folder}")]
    monkeypatch.setattr(doctor, "examine", lambda *_, **__: findings)
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert result.exit_code == 1
    assert result.output.count(folder) == 2
