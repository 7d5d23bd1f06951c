"""The files that a path means: names before patterns, each real file once, and archives by their first bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemotron_h.core.errors import UserError
from nemotron_h.data.blend import Blend, Source
from nemotron_h.data.prepare.inputs import find_inputs


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def chosen(folder: Path, path: str, file_format: str = "jsonl", said: list[str] | None = None) -> list[str]:
    """The files of a source, relative to the folder."""
    blend = Blend(path=str(folder / "b.yaml"), sources={"s": Source(format=file_format, path=path)})
    say = (lambda text: None) if said is None else said.append
    return [str(Path(i.path).relative_to(folder)) for i in find_inputs(blend, "s", say)]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("[2024] corpus", ["[2024] corpus/deep/b.jsonl", "[2024] corpus/part[1].jsonl", "[2024] corpus/part1.jsonl"]),
        ("[2024] corpus/part[1].jsonl", ["[2024] corpus/part[1].jsonl"]),
        ("[2024] corpus/part[0-9].jsonl", ["[2024] corpus/part1.jsonl"]),
        ("[2024] corpus/*.jsonl", ["[2024] corpus/part[1].jsonl", "[2024] corpus/part1.jsonl"]),
        ("**/*.jsonl", ["[2024] corpus/deep/b.jsonl", "[2024] corpus/part[1].jsonl", "[2024] corpus/part1.jsonl"]),
        ("**/deep/**", ["[2024] corpus/deep/b.jsonl"]),
        ("[!a]*/**/b.*", ["[2024] corpus/deep/b.jsonl"]),
    ],
)
def test_a_name_is_a_name_and_only_the_rest_is_a_pattern(tmp_path, path, expected):
    folder = tmp_path / "run [a]*"
    put(folder, "[2024] corpus/part[1].jsonl", "[2024] corpus/part1.jsonl", "[2024] corpus/deep/b.jsonl")
    put(folder, "[2024] corpus/._a.jsonl", ".cache/b.jsonl")
    assert chosen(folder, path) == sorted(expected)


@pytest.mark.parametrize("path", ["in", "in/**/*.jsonl", "in/**"])
def test_links_give_each_file_once_and_have_an_end(tmp_path, path):
    put(tmp_path, "in/v1/a.jsonl", "elsewhere/b.jsonl")
    for link, target in {
        "latest": ".",
        "again": "../in",
        "v1/up": "..",
        "current": "v1",
        "far": "../elsewhere",
    }.items():
        (tmp_path / "in" / link).symlink_to(target)
    said: list[str] = []
    files = chosen(tmp_path, path, said=said)
    assert sorted((tmp_path / f).resolve().name for f in files) == ["a.jsonl", "b.jsonl"]
    assert any("links to files that are read under another name" in text for text in said)


@pytest.mark.parametrize(
    ("file_format", "names", "expected"),
    [
        ("parquet", ["README.md", "data/a.parquet", "_SUCCESS"], ["data/a.parquet"]),
        ("jsonl", ["a.jsonl.zst", "b.JSON", "dataset_info.txt"], ["a.jsonl.zst", "b.JSON"]),
        ("python", ["m.py", "m.pyc"], ["m.py"]),
        ("jsonl", ["part-00000", "part-00001"], ["part-00000", "part-00001"]),
        ("text", ["a.txt", "b"], ["a.txt", "b"]),
    ],
)
def test_a_folder_means_the_files_that_its_format_names(tmp_path, file_format, names, expected):
    put(tmp_path / "in", *names)
    said: list[str] = []
    assert chosen(tmp_path, "in", file_format, said) == [f"in/{name}" for name in expected]
    left_out = [name for name in names if name not in expected]
    assert any(f"{len(left_out)} files that are not {file_format}" in text for text in said) == bool(left_out)


def test_a_path_without_files_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in ("empty", "no[thing", "nothing/**/*.jsonl"):
        with pytest.raises(UserError, match="no file matches"):
            chosen(tmp_path, path)


def test_a_missing_folder_is_not_looked_for_in_all_others(tmp_path, monkeypatch):
    def walk(folder: str) -> None:
        raise AssertionError(f"all of {folder} is read")

    monkeypatch.setattr("nemotron_h.data.prepare.inputs._walk", walk)
    with pytest.raises(UserError, match="no file matches"):
        chosen(tmp_path, "/path/to/corpus/web_crawl/**/*.jsonl")
