"""Tokenizer files of an exported folder: the same tokens in Hugging Face's libraries."""

from __future__ import annotations

import base64
import codecs
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Library

from nemotron_h.core.errors import UserError
from nemotron_h.data import tokenizer as data_tokenizer
from nemotron_h.data.tokenizer import PROBES, Tokenizer, load_tokenizer, write_meta
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
    again = exported.copy(exported.find(out), tmp_path / "again")
    assert all(again.text_to_ids(text) == tiktoken.text_to_ids(text) for text in PROBES)
    assert exported.token_ids(again) == exported.token_ids(tiktoken)


def test_own_files_and_template(tokenizer: Path, tmp_path: Path) -> None:
    assert exported.write(load_tokenizer(tokenizer), tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()
    assert (tmp_path / "chat_template.jinja").is_file()


def test_a_template_of_its_own_is_kept(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    exported.copy(exported.find(tokenizer), tmp_path / "kept")
    (tmp_path / "kept" / "chat_template.jinja").write_text("mine")
    assert not exported.write(load_tokenizer(tmp_path / "kept"), tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "mine"


def test_what_the_model_s_config_alone_tells_goes_with_the_copy(tokenizer: Path, tmp_path: Path) -> None:
    """And a byte order mark, which transformers refuses, does not go into an export."""
    source, out = tmp_path / "source", tmp_path / "out"
    for folder in (source, out):
        folder.mkdir()
    exported.write(load_tokenizer(tokenizer), source)
    assert exported.find(out) is None
    (source / "tokenizer_config.json").write_bytes(codecs.BOM_UTF8 + b'{"tokenizer_class": "TokenizersBackend"}')
    (source / "config.json").write_text('{"eos_token_id": 0, "pad_token_id": 1}')
    copy = exported.copy(exported.find(source), tmp_path / "copy")
    assert exported.token_ids(copy) == {"eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 1}
    exported.write(copy, out)
    config = json.loads((out / "tokenizer_config.json").read_bytes())
    assert config == {"tokenizer_class": "TokenizersBackend", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
    (source / "config.json").unlink()
    (source / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>"}')
    exported.write(exported.copy(exported.find(source), tmp_path / "copy_2"), out)
    assert json.loads((out / "tokenizer_config.json").read_bytes()) == {"tokenizer_class": "TokenizersBackend"}


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
