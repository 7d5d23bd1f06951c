"""The chat template that a checkpoint came with is found where its run's data or its tokenizer has it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from nemotron_h.core.errors import UserError
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
    assert recorded_template(opened.tokenizer, opened.record) == "turns"


def test_the_template_of_the_tokenizer(tmp_path: Path) -> None:
    """In either of its places, and the default of several."""
    opened = SimpleNamespace(record={}, tokenizer=SimpleNamespace(path=str(tmp_path)))
    assert recorded_template(opened.tokenizer, opened.record) is None
    config = tmp_path / "tokenizer_config.json"
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "turns"}]
    for template, expected in (("own", "own"), (several, "turns"), (several[:1], "tools"), (None, None)):
        config.write_text(json.dumps({"chat_template": template}))
        assert recorded_template(opened.tokenizer, opened.record) == expected
    for template in (5, [5], [{"name": "default"}]):
        config.write_text(json.dumps({"chat_template": template}))
        with pytest.raises(UserError, match=r"tokenizer_config\.json: chat_template is .*, not text"):
            recorded_template(opened.tokenizer, opened.record)
    (tmp_path / TEMPLATE).write_bytes(b"\xef\xbb\xbffile\r\n")
    assert recorded_template(opened.tokenizer, opened.record) == "file\n"
