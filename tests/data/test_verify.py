"""Damage to prepared data is found: at training start where it is cheap, by `verify` in any case."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from nemotron_h.cli.data import app
from nemotron_h.core.errors import UserError
from nemotron_h.data.indexed import read_lengths, write_index
from nemotron_h.data.manifest import check_manifest
from nemotron_h.data.prepare.verify import verify


@pytest.fixture
def prepared(corpus):
    corpus.prepare()
    return corpus


def check(corpus) -> None:
    check_manifest(corpus.root, corpus.blend())


def full(corpus) -> None:
    with open(os.devnull, "w", encoding="utf-8") as null:
        verify(corpus.blend(), corpus.root, Console(file=null))


def test_untouched_data_passes_both(prepared):
    check(prepared)
    full(prepared)


def test_moved_data_passes_both(prepared):
    shutil.move(prepared.root, prepared.folder / "moved")
    prepared.root = prepared.folder / "moved"
    check(prepared)
    full(prepared)


def truncate(folder: Path) -> None:
    with open(folder / "web/train.bin", "r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 2)


def lose_the_index(folder: Path) -> None:
    (folder / "web/train.idx").unlink()


def swap_splits(folder: Path) -> None:
    for suffix in (".bin", ".idx"):
        os.rename(folder / f"web/train{suffix}", folder / "x")
        os.rename(folder / f"more/train{suffix}", folder / f"web/train{suffix}")
        os.rename(folder / "x", folder / f"more/train{suffix}")


def reorder(folder: Path) -> None:
    """The same documents in another order, with a matching index: sizes and counts stay as they were."""
    lengths = np.array(read_lengths(folder / "web/train.idx"))
    tokens = np.fromfile(folder / "web/train.bin", dtype=np.uint16)
    parts = np.split(tokens, np.cumsum(lengths)[:-1])
    order = np.random.default_rng(0).permutation(len(parts))
    np.concatenate([parts[n] for n in order]).tofile(folder / "web/train.bin")
    write_index(folder / "web/train.idx", lengths[order], np.dtype(np.uint16))


def other_documents_of_the_same_size(folder: Path) -> None:
    path = folder / "web/train.bin"
    tokens = np.fromfile(path, dtype=np.uint16)
    tokens[tokens != 0] = 7
    tokens.tofile(path)


def damage_the_index_header(folder: Path) -> None:
    with open(folder / "web/train.idx", "r+b") as file:
        file.write(b"garbage")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"web/train.bin is truncated: [\d,]+ bytes, [\d,]+ expected"),
        (lose_the_index, "web/train.idx is missing"),
        (swap_splits, "web/train.idx: .* documents, the manifest says"),
        (reorder, "web/train.bin/.idx are not the files that were prepared"),
        (other_documents_of_the_same_size, "web/train.bin/.idx are not the files that were prepared"),
        (damage_the_index_header, "web/train.idx is not an index"),
        (lambda folder: (folder / "manifest.json").unlink(), "blend 'local' is not prepared"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "manifest.json is damaged"),
    ],
)
def test_damage_is_found_at_training_start(prepared, damage, message):
    damage(prepared.prepared)
    with pytest.raises(UserError, match=message) as error:
        check(prepared)
    assert "nemotron-h data prepare" in error.value.hint
    if (prepared.prepared / "manifest.json").exists() and "manifest" not in message:
        prepared.prepare()  # repairs it
        full(prepared)


def test_one_changed_byte_is_found_by_verify(prepared):
    path = prepared.prepared / "web/train.bin"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1  # between the blocks that the quick check reads
    path.write_bytes(data)
    check(prepared)
    with pytest.raises(UserError, match=r"web, train: the content of train.bin changed"):
        full(prepared)


def test_another_tokenizer_is_found_by_verify(prepared):
    path = prepared.prepared / "tokenizer" / "tokenizer_config.json"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(UserError, match="not the tokenizer that made the data"):
        full(prepared)


def test_tokens_that_are_wrong_although_hashes_agree(prepared):
    """As if preparation itself had written them."""
    folder = prepared.prepared
    tokens = np.fromfile(folder / "more/train.bin", dtype=np.uint16)
    tokens[int(read_lengths(folder / "more/train.idx")[0]) - 1] = 5
    tokens.tofile(folder / "more/train.bin")
    from nemotron_h.core.files import file_sha256
    from nemotron_h.data.manifest import load_manifest, probe

    manifest = load_manifest(prepared.root, "local")
    entry = manifest.sources["more"].splits["train"]
    entry.sha256_bin, entry.probe = file_sha256(folder / "more/train.bin"), probe(str(folder / "more/train"))
    manifest.save()
    with pytest.raises(UserError, match="more, train: a document does not end with EOD"):
        full(prepared)


def test_settings_edited_since(prepared):
    prepared.content["sources"]["web"]["validation"] = 0.5
    with pytest.raises(UserError, match=r"sources\.web was edited after it was prepared"):
        check(prepared)
    prepared.content["sources"]["web"]["validation"] = 0.05
    prepared.content["tokenizer"]["vocab_size"] = 390
    with pytest.raises(UserError, match=r"prepared with another tokenizer .bpe of 400; the blend says bpe of 390"):
        check(prepared)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["tokenizer"].update(eod_id=7), r"manifest\.json: tokenizer\.eod_id is 7, the tokenizer's 0"),
        (lambda m: m["tokenizer"].update(vocab_size=401), "prepared with another tokenizer"),
        (lambda m: m["sources"]["web"]["splits"].clear(), r"sources\.web\.splits: train is missing"),
        (lambda m: m["sources"]["web"]["splits"].update(test=m["sources"]["web"]["splits"]["train"]), "splits: test"),
        (
            lambda m: m["sources"]["web"]["splits"]["train"].update(tokens="many"),
            r"splits\.train\.tokens is 'many'",
        ),
    ],
)
def test_a_manifest_that_was_edited(prepared, change, message):
    path = prepared.prepared / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=rf"{message}|is damaged: its content is not what was written"):
        full(prepared)
    del manifest["sha256"]  # as those of before
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=message):
        full(prepared)


def test_no_value_of_a_manifest_changes_unseen(prepared):
    path = prepared.prepared / "manifest.json"
    text = path.read_text()
    split = json.loads(text)["sources"]["web"]["splits"]["train"]
    for value in (split["sha256_bin"], split["sha256_idx"], json.loads(text)["sha256"]):
        path.write_text(text.replace(value, value[:-1] + ("0" if value[-1] != "0" else "1")))
        with pytest.raises(UserError, match="is damaged: its content is not what was written"):
            check(prepared)
    path.write_text(text)
    check(prepared)


def test_source_added_since(prepared):
    prepared.content["sources"]["new"] = dict(prepared.content["sources"]["web"])
    with pytest.raises(UserError, match="sources new are not prepared"):
        check(prepared)


def test_command_line(corpus):
    runner = CliRunner()
    options = ["--blend", str(corpus.write()), "--root", str(corpus.root)]
    result = runner.invoke(app, ["prepare", *options, "--workers", "1"])
    assert result.exit_code == 0, result.output
    assert "training tokens in 4 sources" in result.output
    result = runner.invoke(app, ["verify", *options])
    assert result.exit_code == 0, result.output
    assert "web, train: ok" in result.output
    assert json.loads((corpus.prepared / "manifest.json").read_text())["blend"] == "local"


def test_a_manifest_of_other_types_is_damaged_not_a_traceback(prepared):
    file = prepared.prepared / "manifest.json"
    written = file.read_text(encoding="utf-8")
    content = json.loads(written)

    def changed(*path: str, value: object) -> str:
        copy = json.loads(written)
        at = copy
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
        return json.dumps(copy)

    for text, words in (
        (changed("sources", "web", "splits", "train", "tokens", value="many"), "sources.web.splits.train.tokens"),
        (changed("sources", "web", "splits", "train", "documents", value=True), "sources.web.splits.train.documents"),
        (changed("sources", value=[]), "is damaged"),
        (changed("sources", "web", "splits", value={}), "sources.web.splits: train is missing"),
        (changed("sources", "web", value=None), "is damaged"),
        (changed("tokenizer", value={}), "missing"),
        (changed("blend_hash", value=None), "blend_hash"),
        (json.dumps([content]), "is damaged"),
        ("[" * 100_000, "nested too deep"),
        (written[:99], "not JSON"),
    ):
        file.write_text(text, encoding="utf-8")
        for command in (check, full):
            with pytest.raises(UserError) as caught:
                command(prepared)
            assert words in caught.value.message
            assert str(file) in caught.value.message
    # what preparation keeps for itself is made anew
    for name in ("web/source.json", ".scans.json", ".tokenizer.json", "manifest.json"):
        (prepared.prepared / name).write_text("[" * 100_000, encoding="utf-8")
    prepared.prepare()
    full(prepared)
