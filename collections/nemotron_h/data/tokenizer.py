"""One small tokenizer interface over own BPE, Hugging Face folders, tiktoken (Tekken) vocabularies and SentencePiece
models.

The classes answer to the names of NeMo's `TokenizerSpec` and of Megatron's tokenizers; `nemo_tokenizer` registers
them with NeMo. Importing this module imports neither: the data tools start in half a second, NeMo takes many.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nemotron_h.errors import UserError

META_FILE = "nemotron_h_tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
CHAT_TOKENS = ("<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>")
"""The family's chat markers: system, turn and message boundaries of its instruct models."""

# The family's pre-tokenizer (Tekken's, which NeMo calls PATTERN_TIKTOKEN and Megatron `v2`): words by case and
# script, single digits.
_WORD, _UPPER, _LOWER = r"[^\r\n\p{L}\p{N}]?", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
PATTERN = "|".join(
    (
        f"{_WORD}{_UPPER}*{_LOWER}+",
        f"{_WORD}{_UPPER}+{_LOWER}*",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

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
    """What training and preparation ask of a tokenizer. Ids are plain ints; no method adds BOS, EOS or padding.

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
        """Token ids of a text; text that looks like a special token is encoded as ordinary text."""
        raise NotImplementedError

    def ids_to_text(self, ids: Sequence[int], remove_special_tokens: bool = False) -> str:
        """The text of token ids, decoded as a whole so that characters spread over tokens survive."""
        raise NotImplementedError

    def ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """Printable token names; not for putting texts together."""
        raise NotImplementedError

    def tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int]:
        """The inverse of `ids_to_tokens`; a single name gives a single id.

        Raises:
            KeyError: for a name that the vocabulary lacks.
        """
        if isinstance(tokens, str):
            return self.vocab[tokens]
        return [self.vocab[token] for token in tokens]

    @property
    def vocab(self) -> dict[str, int]:
        """Token name -> id."""
        if not hasattr(self, "_vocab"):
            names = self.ids_to_tokens(range(self.vocab_size))
            self._vocab = {name: i for i, name in reversed(list(enumerate(names)))}
        return self._vocab

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of many texts."""
        return [self.text_to_ids(text) for text in texts]

    # derived, under the names that NeMo and Megatron use
    def text_to_tokens(self, text: str) -> list[str]:
        """Token names of a text."""
        return self.ids_to_tokens(self.text_to_ids(text))

    def tokens_to_text(self, tokens: Sequence[str]) -> str:
        """The text of token names."""
        return self.ids_to_text([self.vocab[token] for token in tokens])

    def tokenize(self, text: str) -> list[int]:
        """Megatron's name for `text_to_ids`."""
        return self.text_to_ids(text)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Megatron's name for `ids_to_text`."""
        return self.ids_to_text(ids)

    @property
    def inv_vocab(self) -> dict[int, str]:
        """Id -> token name."""
        return dict(enumerate(self.ids_to_tokens(range(self.vocab_size))))

    @property
    def eos_id(self) -> int:
        """The end-of-document id under its other name."""
        return self.eod_id

    eod = property(lambda self: self.eod_id)
    eos = property(lambda self: self.eod_id)
    bos = property(lambda self: self.bos_id)
    pad = property(lambda self: self.pad_id)

    @property
    def name(self) -> str:
        """The class's name."""
        return type(self).__name__

    @property
    def unique_identifiers(self) -> OrderedDict:
        """What Megatron's dataset caches key on."""
        return OrderedDict(
            {"class": f"{type(self).__module__}.{type(self).__qualname__}", "sha256": self.fingerprint()}
        )

    def fingerprint(self) -> str:
        """sha256 over the tokenizer's files: equal fingerprints give equal tokens."""
        return fingerprint(self.path)

    def __reduce__(self) -> tuple:
        return type(self), (self.path,)

    def is_lossless(self) -> bool:
        """Whether `PROBES` come back unchanged."""
        return all(self.ids_to_text(self.text_to_ids(text)) == text for text in PROBES)


class BPETokenizer(Tokenizer):
    """A `tokenizer.json` of the tokenizers library: our own byte-level BPE."""

    kind = "bpe"

    def __init__(self, path: str | Path) -> None:
        import tokenizers

        super().__init__(path)
        self._tokenizer = tokenizers.Tokenizer.from_file(str(Path(path) / "tokenizer.json"))
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.eod_id = self._special(END_OF_TEXT, None)
        self.pad_id = self._special(PAD, self.eod_id)
        self.bos_id = self.eod_id

    def _special(self, token: str, default: int | None) -> int:
        found = self._tokenizer.token_to_id(token)
        if found is None and default is None:
            raise UserError(f"{self.path}/tokenizer.json has no token {token}, which ends documents")
        return default if found is None else found

    def text_to_ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def ids_to_text(self, ids: Sequence[int], remove_special_tokens: bool = False) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=remove_special_tokens)

    def ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [self._tokenizer.id_to_token(int(i)) or f"<unused_{i}>" for i in ids]


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face folder, read locally by transformers' AutoTokenizer."""

    kind = "huggingface"

    def __init__(self, path: str | Path) -> None:
        from transformers import AutoTokenizer

        super().__init__(path)
        self._tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        if self._tokenizer.eos_token_id is None:
            raise UserError(
                f"{path}: the tokenizer names no eos_token, which ends documents", "Set it in tokenizer_config.json."
            )
        self._fast = self._tokenizer.backend_tokenizer if self._tokenizer.is_fast else None
        if self._fast is not None:
            self._fast.no_padding()
            self._fast.no_truncation()
            self._fast.encode_special_tokens = True
        self.vocab_size = len(self._tokenizer)
        self.eod_id = self._tokenizer.eos_token_id
        self.pad_id = self.eod_id if self._tokenizer.pad_token_id is None else self._tokenizer.pad_token_id
        self.bos_id = self.eod_id if self._tokenizer.bos_token_id is None else self._tokenizer.bos_token_id

    def text_to_ids(self, text: str) -> list[int]:
        if self._fast is not None:
            return self._fast.encode(text, add_special_tokens=False).ids
        return self._tokenizer.convert_tokens_to_ids(self._tokenizer.tokenize(text, split_special_tokens=True))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        if self._fast is None:
            return super().encode_batch(texts)
        return [e.ids for e in self._fast.encode_batch_fast(texts, add_special_tokens=False)]

    def ids_to_text(self, ids: Sequence[int], remove_special_tokens: bool = False) -> str:
        return self._tokenizer.decode(
            [int(i) for i in ids], skip_special_tokens=remove_special_tokens, clean_up_tokenization_spaces=False
        )

    def ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [
            t or f"<unused_{i}>" for i, t in zip(ids, self._tokenizer.convert_ids_to_tokens(list(ids)), strict=True)
        ]


class TiktokenTokenizer(Tokenizer):
    """A tiktoken vocabulary in JSON: Tekken's file, or the bare list of ranks that NeMo and Megatron read.

    The first `num_special_tokens` ids are special; rank r has id r + num_special_tokens. Names of special tokens:
    `<unk>`, `<s>`, `</s>`, then `<SPECIAL_3>`, ... as the family names them.
    """

    kind = "tiktoken"

    def __init__(self, path: str | Path) -> None:
        import tiktoken

        super().__init__(path)
        meta = read_meta(path)
        self._special = meta["num_special_tokens"]
        with open(Path(path) / meta["file"], encoding="utf-8") as file:
            content = json.load(file)
        config = content.get("config", {}) if isinstance(content, dict) else {}
        entries = content["vocab"] if isinstance(content, dict) else content
        self.vocab_size = config.get("default_vocab_size", len(entries))
        self._ranks = [base64.b64decode(e["token_bytes"]) for e in entries[: self.vocab_size - self._special]]
        self._encoding = tiktoken.Encoding(
            name=Path(meta["file"]).stem,
            pat_str=meta["pattern"] or config.get("pattern") or PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(self._ranks)},
            special_tokens={},
        )
        self.vocab_size = len(self._ranks) + self._special
        self.bos_id, self.eod_id, self.pad_id = 1, 2, 2

    def _name(self, i: int) -> str:
        return ("<unk>", "<s>", "</s>")[i] if i < 3 else f"<SPECIAL_{i}>"

    def text_to_ids(self, text: str) -> list[int]:
        return [rank + self._special for rank in self._encoding.encode_ordinary(text)]

    def ids_to_text(self, ids: Sequence[int], remove_special_tokens: bool = False) -> str:
        data = bytearray()
        for i in map(int, ids):
            if i >= self._special:
                data += self._ranks[i - self._special]
            elif not remove_special_tokens:
                data += self._name(i).encode()
        return data.decode("utf-8", errors="replace")

    def ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        # Byte tokens that are no text on their own are named by their bytes, so that names stay distinct.
        return [
            self._name(i) if i < self._special else _printable(self._ranks[i - self._special]) for i in map(int, ids)
        ]


def _printable(token: bytes) -> str:
    try:
        return token.decode("utf-8")
    except UnicodeDecodeError:
        return "".join(f"<0x{byte:02X}>" for byte in token)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model`. Whether it is lossless depends on its normaliser and byte fallback: see
    `is_lossless`.
    """

    kind = "sentencepiece"

    def __init__(self, path: str | Path) -> None:
        import sentencepiece

        super().__init__(path)
        self._model = sentencepiece.SentencePieceProcessor(model_file=str(Path(path) / read_meta(path)["file"]))
        self.vocab_size = self._model.vocab_size()
        self.eod_id = self._model.eos_id()
        if self.eod_id < 0:
            raise UserError(f"{path}: the SentencePiece model has no end-of-sentence id, which ends documents")
        self.pad_id = self._model.pad_id() if self._model.pad_id() >= 0 else self.eod_id
        self.bos_id = self._model.bos_id() if self._model.bos_id() >= 0 else self.eod_id

    def text_to_ids(self, text: str) -> list[int]:
        return self._model.encode(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._model.encode(texts, num_threads=1)

    def ids_to_text(self, ids: Sequence[int], remove_special_tokens: bool = False) -> str:
        parts: list[str] = []
        ordinary: list[int] = []
        for i in map(int, ids):
            if self._model.is_control(i):
                if not remove_special_tokens:
                    parts += [self._model.decode(ordinary), self._model.id_to_piece(i)]
                    ordinary = []
            else:
                ordinary.append(i)
        return "".join([*parts, self._model.decode(ordinary)])

    def ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [self._model.id_to_piece(int(i)) for i in ids]


_KINDS = {cls.kind: cls for cls in (BPETokenizer, HuggingFaceTokenizer, TiktokenTokenizer, SentencePieceTokenizer)}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a prepared folder.

    Raises:
        UserError: when the folder holds none, or it cannot be read.
    """
    kind = read_meta(path)["kind"]
    try:
        return _KINDS[kind](path)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise UserError(f"{path}: cannot load the {kind} tokenizer: {error}") from error


def nemo_tokenizer(path: str | Path) -> Tokenizer:
    """`load_tokenizer`, known to NeMo as one of its own `TokenizerSpec`s."""
    from nemo.collections.common.tokenizers.tokenizer_spec import TokenizerSpec

    TokenizerSpec.register(Tokenizer)
    return load_tokenizer(path)


def write_meta(path: str | Path, kind: str, **content: Any) -> None:
    """Write the small file that says how to read a tokenizer folder."""
    text = json.dumps({"kind": kind, **content}, indent=1) + "\n"
    (Path(path) / META_FILE).write_text(text, encoding="utf-8")


def read_meta(path: str | Path) -> dict[str, Any]:
    """Read what `write_meta` wrote.

    Raises:
        UserError: when the folder is not a prepared tokenizer.
    """
    try:
        return json.loads((Path(path) / META_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} holds no prepared tokenizer ({META_FILE}): {error}") from error


def fingerprint(path: str | Path) -> str:
    """sha256 over names and contents of all files of a tokenizer folder."""
    digest = hashlib.sha256()
    for file in sorted(p for p in Path(path).rglob("*") if p.is_file()):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(path).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def train_bpe(texts: Iterable[str] | Iterator[str], vocab_size: int, path: str | Path) -> BPETokenizer:
    """Train a byte-level BPE and save it, also as a folder that Hugging Face's AutoTokenizer reads.

    The family's pre-tokenizer, no normaliser, all 256 bytes in the vocabulary: any text survives. The same texts in
    the same order give the same file.

    Args:
        texts: the documents to learn from.
        vocab_size: number of ids, special tokens included.
        path: folder to write; exists.

    Raises:
        UserError: when the texts do not suffice for the size.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Library

    special = [END_OF_TEXT, PAD, *CHAT_TOKENS]
    if vocab_size < 256 + len(special):
        raise UserError(f"tokenizer.vocab_size: {vocab_size} is below 256 bytes + {len(special)} special tokens")
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    if library.get_vocab_size() < vocab_size:
        raise UserError(
            f"tokenizer.vocab_size: the text to train on gives only {library.get_vocab_size()} of {vocab_size} tokens",
            "Lower vocab_size, raise train_bytes, or name more sources in train_on.",
        )
    library.save(str(Path(path) / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "pad_token": PAD}
    config |= {"clean_up_tokenization_spaces": False, "additional_special_tokens": list(CHAT_TOKENS)}
    (Path(path) / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    write_meta(path, "bpe")
    return BPETokenizer(path)
