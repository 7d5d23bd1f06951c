"""The interface that every kind of tokenizer has, and the small files beside it.

The class answers to the names of NeMo's `TokenizerSpec` and of Megatron's tokenizers. Imports neither.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemotron_h.core.errors import UserError
from nemotron_h.core.files import read_json

#: ours: the most rows that a vocabulary is padded by, 128 for each of 8 tensor-parallel ranks; a model with more rows
#: beyond a tokenizer's tokens is another tokenizer's, unless that is known better
MAX_PADDING = 1024
META_FILE = "nemotron_h_tokenizer.json"

PROBES = (
    "The quick brown fox jumps over 1234567.89 lazy dogs.\n\n\tTabs,  double  spaces   and\r\nline ends ",
    "def f(x: int) -> int:\n    return x ** 2  # quadrat\n\n\nif __name__ == '__main__':\n\tprint(f'{f(3)!r}')\n",
    "Größe, naïve façade, año, être, Łódź, İstanbul; Ελληνικά; Русский текст; עברית; العربية; हिन्दी; ไทย",
    "日本語のテキスト、中文文本\uff0c한국어 텍스트。\ufb01 \u212b \u00c5 \u00e9 e\u0301 ㎏ ① ™",
    "🙂 \U0001f469\U0001f3fd\u200d\U0001f680 \U0001f1e9\U0001f1ea 𐌰𐌱𐌲 E⋅da = Q, n → ∞, ∑ ≤ ∏ \u200b\u00a0\ufeff\u2028",
    " leading and trailing spaces  ",
)
"""Texts that a lossless tokenizer gives back unchanged."""


class Tokenizer:
    """The part of a tokenizer that training and preparation use. Ids are ints; no method adds BOS, EOS or padding.

    Args:
        path: the tokenizer's folder, as `save_meta` left it.

    Attributes:
        vocab_size: number of ids, special ones included.
        eod_id: the id that ends a document.
        pad_id: the id for padding; `eod_id` where the vocabulary has no other.
        bos_id: the id that begins a sequence, for models that want one; `eod_id` where there is none.
    """

    kind = ""
    vocab_size: int
    eod_id: int
    pad_id: int
    bos_id: int

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)

    # what a kind implements
    def text_to_ids(self, text: str) -> list[int]:
        """Return the token ids of a text; text that looks like a special token is encoded as ordinary text."""
        raise NotImplementedError

    def ids_to_text(self, ids: Sequence[int], remove_special_tokens: bool = False) -> str:
        """Return the text of token ids, decoded as a whole so that characters spread over tokens survive."""
        raise NotImplementedError

    def ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """Return printable token names; not for putting texts together."""
        raise NotImplementedError

    def tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int]:
        """Return the inverse of `ids_to_tokens`; a single name gives a single id.

        Errors:
            KeyError: for a name that the vocabulary lacks.
        """
        if isinstance(tokens, str):
            return self.vocab[tokens]
        return [self.vocab[token] for token in tokens]

    @property
    def vocab(self) -> dict[str, int]:
        """Return token name -> id."""
        if not hasattr(self, "_vocab"):
            names = self.ids_to_tokens(range(self.vocab_size))
            self._vocab = {name: i for i, name in reversed(list(enumerate(names)))}
        return self._vocab

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of many texts."""
        return [self.text_to_ids(text) for text in texts]

    @property
    def special_tokens(self) -> dict[str, int]:
        """Return special token -> id; no text encodes to one."""
        raise NotImplementedError

    # derived, under the names that NeMo and Megatron use
    def text_to_tokens(self, text: str) -> list[str]:
        """Return the token names of a text."""
        return self.ids_to_tokens(self.text_to_ids(text))

    def tokens_to_text(self, tokens: Sequence[str]) -> str:
        """Return the text of token names."""
        return self.ids_to_text([self.vocab[token] for token in tokens])

    def tokenize(self, text: str) -> list[int]:
        """Return `text_to_ids`, by Megatron's name."""
        return self.text_to_ids(text)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return `ids_to_text`, by Megatron's name."""
        return self.ids_to_text(ids)

    @property
    def inv_vocab(self) -> dict[int, str]:
        """Return id -> token name."""
        return dict(enumerate(self.ids_to_tokens(range(self.vocab_size))))

    @property
    def eos_id(self) -> int:
        """Return the end-of-document id under its other name."""
        return self.eod_id

    eod = property(lambda self: self.eod_id)
    eos = property(lambda self: self.eod_id)
    bos = property(lambda self: self.bos_id)
    pad = property(lambda self: self.pad_id)

    @property
    def name(self) -> str:
        """Return the class's name."""
        return type(self).__name__

    @property
    def unique_identifiers(self) -> OrderedDict:
        """Return the key of Megatron's dataset caches."""
        return OrderedDict(
            {"class": f"{type(self).__module__}.{type(self).__qualname__}", "sha256": self.fingerprint()}
        )

    def fingerprint(self) -> str:
        """Return the sha256 over the tokenizer's files: equal fingerprints give equal tokens."""
        return fingerprint(self.path)

    def token_bytes(self) -> list[bytes]:
        """Return each token's bytes, in the order of ids; names of byte-level files as the bytes they stand for."""
        return [name_bytes(name) for name in self.ids_to_tokens(range(self.vocab_size))]

    def ids_sha256(self) -> str:
        """Return the sha256 over all tokens in the order of ids: equal where each token has one id in both.

        Unlike `fingerprint` it does not depend on the files: a copy, another format, or another chat template beside
        the same vocabulary give the same hash.
        """
        if not hasattr(self, "_ids_sha256"):
            digest = hashlib.sha256()
            for token in self.token_bytes():
                digest.update(len(token).to_bytes(4, "big") + token)
            self._ids_sha256 = digest.hexdigest()
        return self._ids_sha256

    def __reduce__(self) -> tuple:
        return type(self), (self.path,)

    def is_lossless(self) -> bool:
        """Tell whether `PROBES` come back unchanged."""
        return all(self.ids_to_text(self.text_to_ids(text)) == text for text in PROBES)


def byte_characters() -> dict[int, str]:
    """Return byte -> the printable character that byte-level tokenizer files write for it (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1), *range(ord("\u00ae"), 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


_BYTES = {character: byte for byte, character in byte_characters().items()}


def name_bytes(name: str) -> bytes:
    """Return the bytes that a token's name stands for: by GPT-2's table where it covers the name, else in UTF-8."""
    try:
        return bytes(_BYTES[character] for character in name)
    except KeyError:
        return name.encode()


def write_meta(path: str | Path, kind: str, **content: Any) -> None:
    """Write the small file that says how to read a tokenizer folder."""
    text = json.dumps({"kind": kind, **content}, indent=1) + "\n"
    (Path(path) / META_FILE).write_text(text, encoding="utf-8")


def read_meta(path: str | Path) -> dict[str, Any]:
    """Read what `write_meta` wrote.

    Errors:
        UserError: when the folder is not a prepared tokenizer.
    """
    try:
        content = read_json(Path(path) / META_FILE)
    except UserError as error:
        raise UserError(f"{path} holds no prepared tokenizer: {error.message}", error.hint) from error
    if not isinstance(content, dict) or not isinstance(content.get("kind"), str):
        raise UserError(f"{path} holds no prepared tokenizer: {META_FILE} names no kind")
    return content


def fingerprint(path: str | Path) -> str:
    """Return the sha256 over names and contents of all files of a tokenizer folder."""
    digest = hashlib.sha256()
    for file in sorted(p for p in Path(path).rglob("*") if p.is_file()):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(path).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()
