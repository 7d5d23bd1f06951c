"""Environments of other tools: made once, found again, and a clear end when they cannot be made."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemotron_h.core.errors import UserError
from nemotron_h.platform import environments


def test_made_once_and_anew_for_other_pins(tmp_path: Path) -> None:
    pins, folder, said = tmp_path / "pins.txt", tmp_path / "environment", []
    pins.write_text("# nothing\n")
    assert environments.ready(folder, pins) is None
    python = environments.make(folder, pins, said.append)
    assert python.is_file()
    assert environments.make(folder, pins, said.append) == python == environments.ready(folder, pins)
    assert len(said) == 1
    pins.write_text("# other\n")
    assert environments.ready(folder, pins) is None


def test_packages_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / "pins.txt").write_text("absent==1\n")
    with pytest.raises(UserError, match="cannot install absent==1 into "):
        environments.make(tmp_path / "environment", tmp_path / "pins.txt")
    assert not (tmp_path / "environment").exists()
