"""Tokenizer files of an exported folder: the same tokens in Hugging Face's libraries."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Library

from nemotron_h.data import tokenizer as data_tokenizer
from nemotron_h.data.tokenizer import PROBES, Tokenizer, load_tokenizer, write_meta
from nemotron_h.errors import UserError
from nemotron_h.export import tokenizer as exported


@pytest.fixture
def tiktoken(tokenizer: Path, tmp_path: Path) -> Tokenizer:
    """The small vocabulary in Tekken's format, with special tokens named as the family's."""
    ranked = load_tokenizer(tokenizer)._ranked
    folder = tmp_path / "tekken"
    folder.mkdir()
    vocab = [{"rank": r, "token_bytes": base64.b64encode(token).decode()} for r, token in enumerate(ranked)]
    config = {"pattern": data_tokenizer.PATTERN, "default_vocab_size": len(vocab) + 20}
    (folder / "tekken.json").write_text(json.dumps({"config": config, "vocab": vocab}))
    write_meta(folder, "tiktoken", file="tekken.json", num_special_tokens=20, pattern="")
    return load_tokenizer(folder)


def test_tiktoken_becomes_a_library_file(tiktoken: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert exported.write(tiktoken, out)
    library = Library.from_file(str(out / "tokenizer.json"))
    assert library.get_vocab_size() == tiktoken.vocab_size
    for text in PROBES:
        ids = library.encode(text, add_special_tokens=False).ids
        assert ids == tiktoken.text_to_ids(text)
        assert library.decode(ids, skip_special_tokens=False) == text
    assert library.encode("<SPECIAL_11>", add_special_tokens=False).ids == [11]
    # and read back, as training reads a Hugging Face folder
    assert exported.read(out, tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert all(again.text_to_ids(text) == tiktoken.text_to_ids(text) for text in PROBES)
    assert exported.token_ids(again) == exported.token_ids(tiktoken)


def test_own_files_and_template(tokenizer: Path, tmp_path: Path) -> None:
    assert exported.write(load_tokenizer(tokenizer), tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()
    assert (tmp_path / "chat_template.jinja").is_file()


def test_a_template_of_its_own_is_kept(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    exported.read(tokenizer, tmp_path / "kept")
    (tmp_path / "kept" / "chat_template.jinja").write_text("mine")
    assert not exported.write(load_tokenizer(tmp_path / "kept"), tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "mine"


def test_transformers_5_names_its_class_anew(tokenizer: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    exported.write(load_tokenizer(tokenizer), source)
    config = source / "tokenizer_config.json"
    config.write_text(config.read_text().replace("PreTrainedTokenizerFast", "TokenizersBackend"))
    exported.read(source, tmp_path / "read")
    assert load_tokenizer(tmp_path / "read").vocab_size == load_tokenizer(tokenizer).vocab_size


def test_special_name_that_is_text_too(tiktoken: Tokenizer, tmp_path: Path) -> None:
    tiktoken._ranked[260] = b"</s>"
    with pytest.raises(UserError, match="</s> names both a special and an ordinary token"):
        exported.write(tiktoken, tmp_path)


def test_sentencepiece_cannot_be_written(tmp_path: Path) -> None:
    class Pieces(Tokenizer):
        kind = "sentencepiece"

    with pytest.raises(UserError, match="of kind sentencepiece") as error:
        exported.check_exportable(Pieces(tmp_path))
    assert "--no-tokenizer" in error.value.hint
