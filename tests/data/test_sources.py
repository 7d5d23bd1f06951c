"""Reading: every format, shards that do not change what is read, and bad records named with their place."""

from __future__ import annotations

import gzip
import json
import zipfile

import pyarrow as pa
import pyarrow.parquet
import pytest
from local_corpus import sentences, write_jsonl

from nemotron_h.core.errors import UserError
from nemotron_h.data.blend import Source
from nemotron_h.data.prepare import sources as reading


def read(source: Source, *paths) -> list:
    inputs = [reading.Input(p.name, str(p)) for p in paths]
    scans = [reading.scan(i.path, reading.is_line_based(source, i.path)) for i in inputs]
    shards = reading.plan_shards(source, inputs, scans)
    return [item for pieces in shards for item in reading.read_documents(source, pieces)]


def texts(items: list) -> list[str]:
    return [item.text for item in items]


def test_jsonl_plain_and_compressed(tmp_path):
    expected = sentences(1, 50)
    write_jsonl(tmp_path / "a.jsonl", expected)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    plain = (tmp_path / "a.jsonl").read_bytes()
    with pa.CompressedOutputStream(str(tmp_path / "c.jsonl.zst"), "zstd") as file:
        file.write(plain)
    frame = (tmp_path / "c.jsonl.zst").read_bytes()
    (tmp_path / "d.txt").write_bytes(frame + frame)  # two frames, and a name that does not tell
    (tmp_path / "e.gz").write_bytes(plain)
    source = Source(format="jsonl")
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "e.gz"):
        assert texts(read(source, tmp_path / name)) == expected
    assert texts(read(source, tmp_path / "d.txt")) == expected * 2


def test_an_archive_of_files_is_refused_by_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.jsonl", "w") as file:
        file.writestr("a.jsonl", '{"text": "x"}')
    with pytest.raises(UserError, match=r"a.jsonl is a ZIP archive(.|\n)*Unpack it"):
        read(Source(format="jsonl"), tmp_path / "a.jsonl")


MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("source", "content", "expected"),
    [
        (Source(format="jsonl"), b'{"text": "a"}\r\n{"text": "b"}', ["a", "b"]),
        (Source(format="json"), b'[{"text": "a"}]', ["a"]),
        (Source(format="text"), b"a\r\nb", ["a\r\nb"]),
        (Source(format="text", split_on="\n"), b"a\r\nb\r\n", ["a", "b"]),
        (Source(format="text", split_on="\n\n"), b"a\r\n\r\nb\r\nc", ["a", "b\nc"]),
        (Source(format="python"), b"x = 1\n", ["x = 1\n"]),
        (Source(format="html"), b"<p>a</p>", ["a"]),
    ],
    ids=lambda value: getattr(value, "format", None),
)
def test_a_byte_order_mark_and_foreign_line_ends_are_no_text(tmp_path, source, content, expected):
    for mark in (b"", MARK):
        (tmp_path / "a").write_bytes(mark + content)
        assert texts(read(source, tmp_path / "a")) == expected


@pytest.mark.parametrize("end", ["\n", ""])
@pytest.mark.parametrize("shard_bytes", [1, 700, 10_000, 1 << 20])
def test_the_cut_changes_nothing(tmp_path, monkeypatch, shard_bytes, end):
    monkeypatch.setattr(reading, "MIN_SHARD_BYTES", shard_bytes)
    monkeypatch.setattr(reading, "_BLOCK", 512)
    expected = sentences(2, 300)
    lines = [json.dumps({"text": t}) for t in expected]
    lines[123] = "{broken"
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + end, encoding="utf-8")
    items = read(Source(format="jsonl"), tmp_path / "a.jsonl")
    assert texts([i for i in items if isinstance(i, reading.Document)]) == expected[:123] + expected[124:]
    [bad] = [i for i in items if isinstance(i, reading.Bad)]
    assert (bad.file, bad.position, bad.excerpt.strip()) == ("a.jsonl", "line 124", "{broken")


def test_nested_fields_and_lists(tmp_path):
    record = {"q": {"title": "T"}, "messages": [[{"text": "a"}, {"text": "b"}], [{"text": "c"}]]}
    (tmp_path / "a.json").write_text(json.dumps({"key": record}), encoding="utf-8")
    source = Source(format="json", text_fields=["q.title", "messages.text"], join=" | ")
    assert texts(read(source, tmp_path / "a.json")) == ["T | a\nb\nc"]
    first = Source(format="json", text_fields=["messages.1.0.text"])
    assert texts(read(first, tmp_path / "a.json")) == ["c"]


def test_parquet_by_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MIN_SHARD_BYTES", 1000)
    expected = [*sentences(3, 500), None, "last"]
    pa.parquet.write_table(pa.table({"body": expected, "n": range(502)}), tmp_path / "a.parquet", row_group_size=60)
    items = read(Source(format="parquet", text_fields=["body"]), tmp_path / "a.parquet")
    assert texts([i for i in items if isinstance(i, reading.Document)]) == [t for t in expected if t is not None]
    [bad] = [i for i in items if isinstance(i, reading.Bad)]
    assert bad.position == "row group 8, row 20"
    with pytest.raises(UserError, match=r"no column text(.|\n)*the file has body, n"):
        read(Source(format="parquet"), tmp_path / "a.parquet")


def test_text_whole_and_split(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\n---\n\nthree", encoding="utf-8")
    assert texts(read(Source(format="text"), tmp_path / "a.txt")) == ["one\ntwo\n\n---\n\nthree"]
    assert texts(read(Source(format="text", split_on="\n\n---\n\n"), tmp_path / "a.txt")) == ["one\ntwo", "three"]
    assert texts(read(Source(format="text", split_on="\n"), tmp_path / "a.txt")) == [
        "one",
        "two",
        "",
        "---",
        "",
        "three",
    ]


def test_docstrings_and_html(tmp_path):
    long = "Explain at length." * 20
    (tmp_path / "m.py").write_text(
        f'"""{long}"""\n\n\ndef f():\n    """{long}f"""\n\n\ndef g():\n    """short"""\n', encoding="utf-8"
    )
    assert texts(read(Source(format="docstrings"), tmp_path / "m.py")) == [f"{long}\n\nf\n{long}f"]
    page = "<html><head></head><body><h1>A &amp; B</h1><p>two\n words</p><script>no()</script><pre>x\n  y</pre>"
    (tmp_path / "p.html").write_text(page, encoding="utf-8")
    assert texts(read(Source(format="html"), tmp_path / "p.html")) == ["A & B\n\ntwo words\n\nx\n  y"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut', "not JSON"),
        (b'{"text": "\xff"}', "byte 10 (0xff) is not UTF-8"),
        (b'{"txt": "x"}', "no field 'text'; the record has txt"),
        (b'{"text": 3}', "field 'text' is int, not text"),
        (b'{"text": null}', "field 'text' is NoneType, not text"),
        (b'["text"]', "no field 'text'; the record is"),
        (rb'{"text": "\ud800"}', "not UTF-8: surrogates not allowed"),
        (b"[" * 100_000, "nested too deep"),
    ],
)
def test_bad_records_are_named(tmp_path, line, reason):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "also good"}\n')
    good, bad, also_good = read(Source(format="jsonl"), tmp_path / "a.jsonl")
    assert (good.text, also_good.text) == ("good", "also good")
    assert bad.position == "line 2"
    assert reason in bad.reason


def test_a_whole_file_that_cannot_be_read_is_one_bad_record(tmp_path):
    for name, content, reason in (
        ("deep.json", b"[" * 100_000, "nested too deep"),
        ("wide.json", '[{"text": "x"}]'.encode("utf-16"), "UTF-16 text, not UTF-8"),
        ("old.json", '["é"]'.encode("latin-1"), "byte 2 (0xe9) is not UTF-8"),
    ):
        (tmp_path / name).write_bytes(content)
        [bad] = read(Source(format="json"), tmp_path / name)
        assert (bad.file, bad.position) == (name, "whole file")
        assert reason in bad.reason


def test_a_damaged_archive_stops(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", sentences(4, 2000))
    data = gzip.compress((tmp_path / "a.jsonl").read_bytes())
    (tmp_path / "a.jsonl.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"a.jsonl.gz is damaged after line \d+"):
        read(Source(format="jsonl"), tmp_path / "a.jsonl.gz")
