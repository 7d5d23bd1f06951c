"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from nemotron_h.core.errors import UserError, naming
from nemotron_h.core.files import whole_file, write_between, write_json


def write_half(path: Path) -> None:
    with whole_file(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt


def test_a_file_is_the_old_one_or_the_whole_new_one(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": path})
    with pytest.raises(KeyboardInterrupt):
        write_half(path)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]
    write_json(path, {"a": "größer"})
    assert "größer" in path.read_text()


def fail(path: Path, error: Exception) -> None:
    with naming("the importance"), whole_file(path) as temporary:
        temporary.touch()
        raise error


def test_a_write_that_a_library_reports_in_its_own_way_names_the_file(tmp_path: Path) -> None:
    """safetensors and `torch.save` hide the operating system's error; a file object's has no path."""
    for error in (
        OSError(errno.ENOSPC, "No space left on device"),
        type("SafetensorError", (Exception,), {})("Error while serializing: I/O error: File too large (os error 27)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 70080 vs 70000\nmore"),
    ):
        path = tmp_path / "x.safetensors"
        with pytest.raises(UserError) as raised:
            fail(path, error)
        assert raised.value.message.startswith(f"the importance: {path}: ")
        assert raised.value.hint
    for bug in (RuntimeError("a bug"), ValueError("(os error x)")):
        with pytest.raises(type(bug)):
            fail(path, bug)


def test_text_between_two_lines_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<b>\n\nold\n\n<e>\nc\n<other>\n<e>\n")
    for text in ("new\n", "newer\n"):
        write_between(page, "<b>\n", "<e>\n", text)
        assert page.read_text() == f"a\n<b>\n\n{text}\n<e>\nc\n<other>\n<e>\n"
    for begin, end in (("<none>\n", "<e>\n"), ("<other>\n", "<none>\n"), ("<e>\n", "c\n")):
        with pytest.raises(UserError, match=r"has to stand there once"):
            write_between(page, begin, end, "lost")
    assert "lost" not in page.read_text()
