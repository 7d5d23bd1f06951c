"""The chat template that a checkpoint came with is found where its run's data lies."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from nemotron_h.data.manifest import TEMPLATE
from nemotron_h.inference.opening import recorded_template


@pytest.mark.parametrize("named", [True, False])
def test_the_template_of_the_run_s_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool) -> None:
    """Under the recipe's root, or where it names none under the default one."""
    folder = tmp_path / "sft_sample"
    folder.mkdir()
    (folder / TEMPLATE).write_text("turns")
    monkeypatch.setenv("NEMOTRON_H_DATA", str(tmp_path) if not named else "elsewhere")
    data = {"root": str(tmp_path) if named else None, "blend": "sft_sample"}
    opened = SimpleNamespace(record={"recipe": {"data": data}}, tokenizer=SimpleNamespace(path=str(tmp_path / "none")))
    assert recorded_template(opened) == str(folder / TEMPLATE)
