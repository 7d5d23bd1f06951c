"""The tokenizer of a checkpoint is told by the ids of its tokens, whatever files and kind they lie in."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from nemotron_h.core.errors import UserError
from nemotron_h.data import tokenizer as tokenizers
from nemotron_h.data.tokenizer import load_tokenizer, train_bpe, write_meta
from nemotron_h.inference.trained_tokenizer import KEYS, check_data, identity, tokenizer_for

SIZE = 280


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tokenizer of ours, the same as a Hugging Face folder and in tiktoken's form, and one of other ids."""
    root = tmp_path_factory.mktemp("tokenizers")
    paths = {name: root / name for name in ("bpe", "huggingface", "tiktoken", "as_library", "other")}
    for folder in paths.values():
        folder.mkdir()
    words = "größe 日本 wort abcd efgh " * 50
    own = train_bpe([words], SIZE, paths["bpe"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(paths["bpe"] / name, paths["huggingface"])
    (paths["huggingface"] / "chat_template.jinja").write_text("another file")
    write_meta(paths["huggingface"], "huggingface")
    ranks = [{"rank": n, "token_bytes": base64.b64encode(token).decode()} for n, token in enumerate(own._ranked)]
    (paths["tiktoken"] / "tekken.json").write_text(json.dumps(ranks))
    write_meta(paths["tiktoken"], "tiktoken", file="tekken.json", num_special_tokens=5, pattern=tokenizers.PATTERN)
    load_tokenizer(paths["tiktoken"]).write_library(paths["as_library"] / "tokenizer.json")
    (paths["as_library"] / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    write_meta(paths["as_library"], "huggingface")
    content = json.loads((paths["bpe"] / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab |= {"a": vocab["b"], "b": vocab["a"]}
    shutil.copytree(paths["huggingface"], paths["other"], dirs_exist_ok=True)
    (paths["other"] / "tokenizer.json").write_text(json.dumps(content))
    return paths


def manifest(folder: Path) -> SimpleNamespace:
    tokenizer = SimpleNamespace(sha256=load_tokenizer(folder).fingerprint())
    return SimpleNamespace(blend="words", tokenizer=tokenizer, tokenizer_path=lambda: str(folder))


def checkpoint(folder: Path, data: dict) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"data": data}))
    return folder


def test_ids_are_equal_across_files_and_kinds(folders: dict[str, Path]) -> None:
    ids = {name: load_tokenizer(folder).ids_sha256() for name, folder in folders.items()}
    assert ids["bpe"] == ids["huggingface"] != ids["other"]
    assert ids["tiktoken"] == ids["as_library"] != ids["bpe"]  # special tokens of other names


def test_data_of_a_checkpoint_s_tokenizer(folders: dict[str, Path], tmp_path: Path) -> None:
    """With the record of today; with older ones, which had the files' hash, or of an import nothing but the folder."""
    told = identity(load_tokenizer(folders["bpe"]))
    assert set(told) < set(KEYS)
    files = {"tokenizer_sha256": told["tokenizer_sha256"]}
    there, gone = {"tokenizer": str(folders["bpe"])}, {"tokenizer": str(tmp_path / "gone")}
    for data in (told, there | told, gone | told, there | files, there):
        path = checkpoint(tmp_path / "c", data)
        assert [check_data(path, manifest(folders[kind]), "init") for kind in ("bpe", "huggingface")] == ["", ""]
        with pytest.raises(
            UserError, match="init: wrong tokenizer: blend words was prepared with another one"
        ) as error:
            check_data(path, manifest(folders["other"]), "init")
        assert "CHECKPOINT/tokenizer" in error.value.hint
    path = checkpoint(tmp_path / "c", gone | files)  # only the files themselves can be told
    assert check_data(path, manifest(folders["bpe"]), "init") == ""
    with pytest.raises(UserError, match="wrong tokenizer"):
        check_data(path, manifest(folders["huggingface"]), "init")
    path = checkpoint(tmp_path / "c", {"tokenizer": None})
    assert check_data(path, manifest(folders["other"]), "init").startswith(f"init: {path} tells no tokenizer")


def test_a_tokenizer_that_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    """The model may have rows beyond the tokens; where nothing is known, so many as padding has."""
    told = {"tokenizer": str(folders["bpe"]), **identity(load_tokenizer(folders["bpe"]))}
    path, other = checkpoint(tmp_path / "c", told), folders["other"]
    for rows in (SIZE, 5000):
        assert tokenizer_for({"data": told}, path, None, rows).kind == "bpe"
        assert tokenizer_for({"data": told}, path, folders["huggingface"], rows).kind == "huggingface"
        with pytest.raises(UserError, match=r"other gives tokens other ids than .*bpe, with which .*c was trained"):
            tokenizer_for({"data": told}, path, other, rows)
    assert tokenizer_for({}, path, other, SIZE + 1000).kind == "huggingface"
    for record, rows in (({}, SIZE + 1025), ({}, SIZE - 1), ({"data": told}, SIZE - 1)):
        with pytest.raises(UserError, match=r"has 280 tokens, the model of .*c has a vocabulary of"):
            tokenizer_for(record, path, other, rows)
