"""The new size of `docs/recipes.md`, made as the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nemotron_h.recipe.check import examine

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


def test_the_new_size_of_the_page_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text()
    model, recipe = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert len(recipe.splitlines()) < 15
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "hybrid_30m.yaml").write_text(model)
    (tmp_path / "hybrid_30m.yaml").write_text(recipe)
    promised = re.search(r"^    (ok  hybrid_30m: .*), \.\.\.$", text, re.MULTILINE).group(1)
    assert examine("hybrid_30m.yaml").line().startswith(promised)
