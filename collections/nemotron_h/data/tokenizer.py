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
SPECIAL_TOKENS = (END_OF_TEXT, PAD, *CHAT_TOKENS)  # of our own BPE, ids 0 to 4

# The family's pre-tokenizer (Tekken's, which NeMo calls PATTERN_TIKTOKEN and Megatron `v2`): words by case and
# script, single digits.
_WORD, _UPPER, _LOWER = r"[^\r\n\p{L}\p{N}]?", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SEGMENT_CHARACTERS = 100_000  # ours
FAMILY_VOCAB_SIZE = 131_072
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

    @property
    def special_tokens(self) -> dict[str, int]:
        """Names of the special tokens, which no text encodes to, and their ids."""
        raise NotImplementedError

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


class _RankTokenizer(Tokenizer):
    """Byte-level BPE over a ranked list of byte strings, run by tiktoken (about eight times as fast as the tokenizers
    library).

    The special tokens come first: `special[i]` has id i, and rank r has id r + len(special).
    """

    def _start(self, special: list[str], ranked: list[bytes], pattern: str) -> None:
        import tiktoken

        self._special, self._ranked, self._pattern = special, ranked, pattern
        self._encoding = tiktoken.Encoding(
            name=self.kind,
            pat_str=pattern,
            mergeable_ranks={token: rank + len(special) for rank, token in enumerate(ranked)},
            special_tokens={},
        )
        self.vocab_size = len(special) + len(ranked)

    @property
    def special_tokens(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self._special)}

    def text_to_ids(self, text: str) -> list[int]:
        if len(text) <= _SEGMENT_CHARACTERS:
            return self._encoding.encode_ordinary(text)
        return [i for segment in _segments(text) for i in self._encoding.encode_ordinary(segment)]

    def ids_to_text(self, ids: Sequence[int], remove_special_tokens: bool = False) -> str:
        data = bytearray()
        for i in map(int, ids):
            if i >= len(self._special):
                data += self._ranked[i - len(self._special)]
            elif not remove_special_tokens:
                data += self._special[i].encode()
        return data.decode("utf-8", errors="replace")

    def write_library(self, path: Path) -> None:
        """Write the file of a tokenizers library's BPE (`tokenizer.json`) that gives the same tokens.

        Raises:
            UserError: a special token's name is also that of an ordinary token; the file cannot hold both.
        """
        from tokenizers import AddedToken, models
        from tokenizers import Tokenizer as Library

        character = _byte_characters()
        ranked = ["".join(character[byte] for byte in token) for token in self._ranked]
        if clash := sorted(set(self._special) & set(ranked)):
            raise UserError(f"{self.path}: {', '.join(clash)} names both a special and an ordinary token")
        vocab = {name: i for i, name in enumerate([*self._special, *ranked])}
        # tiktoken looks up a whole word before it merges
        library = Library(models.BPE(vocab=vocab, merges=_all_merges(vocab, self._special), ignore_merges=True))
        _set_pipeline(library, self._pattern)
        library.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in self._special])
        library.save(str(path))

    def ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        # Byte strings that are no text on their own are named by their bytes, so that names stay distinct.
        first = len(self._special)
        return [self._special[i] if i < first else _printable(self._ranked[i - first]) for i in map(int, ids)]


def _segments(text: str) -> Iterator[str]:
    """Cut a long text, because tiktoken's regular expression overflows on runs of about a million characters.

    The family's pattern never joins a line end with a letter or digit after it, so cutting there changes no token.
    Only a stretch without such a place is cut anywhere.
    """
    start = 0
    while len(text) - start > _SEGMENT_CHARACTERS:
        end = start + _SEGMENT_CHARACTERS
        cut = text.rfind("\n", start, end)
        while cut >= 0 and not text[cut + 1].isalnum():
            cut = text.rfind("\n", start, cut)
        cut = end if cut < 0 else cut + 1
        yield text[start:cut]
        start = cut
    yield text[start:]


def _printable(token: bytes) -> str:
    try:
        return token.decode("utf-8")
    except UnicodeDecodeError:
        return "".join(f"<0x{byte:02X}>" for byte in token)


class BPETokenizer(_RankTokenizer):
    """Our own byte-level BPE, as `train_bpe` saves it."""

    kind = "bpe"

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        content = json.loads((Path(path) / "tokenizer.json").read_text(encoding="utf-8"))
        names = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
        if names[: len(SPECIAL_TOKENS)] != list(SPECIAL_TOKENS):
            raise UserError(
                f"{path}/tokenizer.json is not a tokenizer trained here", "Use kind: huggingface for others."
            )
        byte_of = {character: byte for byte, character in _byte_characters().items()}
        ranked = [bytes(byte_of[c] for c in name) for name in names[len(SPECIAL_TOKENS) :]]
        self._start(list(SPECIAL_TOKENS), ranked, PATTERN)
        self.eod_id = self.bos_id = SPECIAL_TOKENS.index(END_OF_TEXT)
        self.pad_id = SPECIAL_TOKENS.index(PAD)


def _byte_characters() -> dict[int, str]:
    """Byte -> the printable character that byte-level tokenizer files write for it (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1), *range(ord("\u00ae"), 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


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

    @property
    def special_tokens(self) -> dict[str, int]:
        added = self._tokenizer.added_tokens_decoder.items()
        return {token.content: i for i, token in added if token.special}

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


class TiktokenTokenizer(_RankTokenizer):
    """A tiktoken vocabulary in JSON: Tekken's file, or the bare list of ranks that NeMo and Megatron read.

    The first `num_special_tokens` ids are special: `<unk>`, `<s>`, `</s>`, then `<SPECIAL_3>`, ... as the family
    names them.
    """

    kind = "tiktoken"

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        meta = read_meta(path)
        with open(Path(path) / meta["file"], encoding="utf-8") as file:
            content = json.load(file)
        config = content.get("config", {}) if isinstance(content, dict) else {}
        entries = content["vocab"] if isinstance(content, dict) else content
        number = meta["num_special_tokens"]
        special = ["<unk>", "<s>", "</s>", *(f"<SPECIAL_{i}>" for i in range(3, number))]
        # Tekken lists more ranks than its vocabulary has; so does NeMo's form of it, whose size is 131,072 with 1,000
        # special tokens.
        size = config.get("default_vocab_size", min(len(entries) + number, FAMILY_VOCAB_SIZE))
        ranked = [base64.b64decode(entry["token_bytes"]) for entry in entries[: size - number]]
        self._start(special, ranked, meta["pattern"] or config.get("pattern") or PATTERN)
        self.bos_id, self.eod_id, self.pad_id = 1, 2, 2


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

    @property
    def special_tokens(self) -> dict[str, int]:
        return {self._model.id_to_piece(i): i for i in range(self.vocab_size) if self._model.is_control(i)}

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
    from tokenizers import Tokenizer as Library
    from tokenizers import models, pre_tokenizers, trainers

    if vocab_size < 256 + len(SPECIAL_TOKENS):
        raise UserError(f"tokenizer.vocab_size: {vocab_size} is below 256 bytes + {len(SPECIAL_TOKENS)} special tokens")
    library = Library(models.BPE())
    _set_pipeline(library, PATTERN)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    if library.get_vocab_size() < vocab_size:
        raise UserError(
            f"tokenizer.vocab_size: the text to train on gives only {library.get_vocab_size()} of {vocab_size} tokens",
            "Lower vocab_size, raise train_bytes, or name more sources in train_on.",
        )
    vocab = library.get_vocab(with_added_tokens=True)
    library.model = models.BPE(vocab=vocab, merges=_all_merges(vocab, SPECIAL_TOKENS))
    library.save(str(Path(path) / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "pad_token": PAD}
    config |= {"clean_up_tokenization_spaces": False, "additional_special_tokens": list(CHAT_TOKENS)}
    (Path(path) / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    write_meta(path, "bpe")
    return BPETokenizer(path)


def _set_pipeline(library: Any, pattern: str) -> None:
    """What the tokenizers library does around merges: split by the pattern, write bytes as characters."""
    from tokenizers import Regex, decoders, pre_tokenizers

    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    as_characters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([split, as_characters])
    library.decoder = decoders.ByteLevel()


def _all_merges(vocab: dict[str, int], special: Sequence[str]) -> list[tuple[str, str]]:
    """Every split of every token into two tokens, by rank: tiktoken merges any of them, and so must the saved file."""
    merges, skipped = [], set(special)
    for token in sorted(vocab, key=vocab.get):
        if token not in skipped:
            pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
            merges += sorted(
                (p for p in pairs if p[0] in vocab and p[1] in vocab), key=lambda p: (vocab[p[0]], vocab[p[1]])
            )
    return merges
