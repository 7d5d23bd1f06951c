"""A small tokenizer interface over own BPE, Hugging Face folders, tiktoken (Tekken) vocabularies and SentencePiece
models.

The classes answer to the names of NeMo's `TokenizerSpec` and of Megatron's tokenizers; `nemo_tokenizer` registers
them with NeMo. Importing this module imports neither: the data tools start in half a second, NeMo takes many.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nemotron_h.core.errors import UserError
from nemotron_h.core.files import read_json
from nemotron_h.data.hf_tokenizer import HuggingFaceTokenizer
from nemotron_h.data.tokenizer_base import (
    MAX_PADDING,
    META_FILE,
    PROBES,
    Tokenizer,
    byte_characters,
    fingerprint,
    name_bytes,
    read_meta,
    write_meta,
)

__all__ = [
    "MAX_PADDING",
    "META_FILE",
    "PROBES",
    "BPETokenizer",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "TiktokenTokenizer",
    "Tokenizer",
    "fingerprint",
    "load_tokenizer",
    "nemo_tokenizer",
    "read_meta",
    "spec_of",
    "train_bpe",
    "write_meta",
]

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


class _RankTokenizer(Tokenizer):
    """Byte-level BPE over a ranked list of byte strings, run by tiktoken (about eight times as fast as the tokenizers
    library).

    The special tokens come first: `special[i]` has id i, and rank r has id r + len(special).
    """

    def _start(self, special: list[str], ranked: list[bytes], pattern: str) -> None:
        import tiktoken

        # tiktoken panics at the first text that needs a missing byte
        if lacking := 256 - len({token for token in ranked if len(token) == 1}):
            raise UserError(f"{self.path}: the vocabulary lacks {lacking} of the 256 bytes", "Restore the file.")
        if twice := len(ranked) - len(set(ranked)):
            raise UserError(f"{self.path}: {twice} tokens of the vocabulary are there twice", "Restore the file.")
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

    def token_bytes(self) -> list[bytes]:
        return [*map(name_bytes, self._special), *self._ranked]

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

        Errors:
            UserError: a special token's name is also that of an ordinary token; the file cannot hold both.
        """
        from tokenizers import AddedToken, models
        from tokenizers import Tokenizer as Library

        character = byte_characters()
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
    """Split a long text, because tiktoken's regular expression overflows on runs of about a million characters.

    The family's pattern never joins a line end with a letter or digit after it, so cutting there changes no token.
    Only a stretch without such a place is split anywhere.
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
        vocab = read_json(Path(path) / "tokenizer.json")["model"]["vocab"]
        names = sorted(vocab, key=vocab.get)
        if names[: len(SPECIAL_TOKENS)] != list(SPECIAL_TOKENS) or [*map(vocab.get, names)] != [*range(len(names))]:
            raise UserError(
                f"{path}/tokenizer.json is not a tokenizer trained here", "Use kind: huggingface for others."
            )
        ranked = [name_bytes(name) for name in names[len(SPECIAL_TOKENS) :]]
        self._start(list(SPECIAL_TOKENS), ranked, PATTERN)
        self.eod_id = self.bos_id = SPECIAL_TOKENS.index(END_OF_TEXT)
        self.pad_id = SPECIAL_TOKENS.index(PAD)


class TiktokenTokenizer(_RankTokenizer):
    """A tiktoken vocabulary in JSON: Tekken's file, or the bare list of ranks that NeMo and Megatron read.

    The first `num_special_tokens` ids are special: `<unk>`, `<s>`, `</s>`, then `<SPECIAL_3>`, ... as the family
    names them.
    """

    kind = "tiktoken"

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        meta = read_meta(path)
        content = read_json(_beside(path, meta))
        config = content.get("config", {}) if isinstance(content, dict) else {}
        entries = content["vocab"] if isinstance(content, dict) else content
        number = meta["num_special_tokens"]
        special = ["<unk>", "<s>", "</s>", *(f"<SPECIAL_{i}>" for i in range(3, number))]
        # Tekken lists more ranks than its vocabulary has; so does NeMo's form of it, whose size is 131,072 with 1,000
        # special tokens.
        size = config.get("default_vocab_size", min(len(entries) + number, FAMILY_VOCAB_SIZE))
        if size <= number:
            raise UserError(f"{path}: {size:,} tokens with {number:,} special ones", "Lower num_special_tokens.")
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
        self._model = sentencepiece.SentencePieceProcessor(model_file=str(_beside(path, read_meta(path))))
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


def _beside(path: str | Path, meta: dict[str, Any]) -> Path:
    """Return the file of a prepared folder that its meta names."""
    name = meta["file"]
    if Path(name).name != name:
        raise UserError(f"{path}/{META_FILE}: file is {name}, which is not a name in this folder")
    return Path(path) / name


_KINDS = {cls.kind: cls for cls in (BPETokenizer, HuggingFaceTokenizer, TiktokenTokenizer, SentencePieceTokenizer)}


def load_tokenizer(path: str | Path, kind: str | None = None) -> Tokenizer:
    """Return the tokenizer of a folder.

    Args:
        path: the folder.
        kind: of the tokenizer; None reads it from a prepared folder.

    Errors:
        UserError: when the folder holds none, or it cannot be read or used.
    """
    kind = kind or read_meta(path)["kind"]
    if kind not in _KINDS:
        raise UserError(f"{path}/{META_FILE}: kind {kind} is unknown", f"Known: {', '.join(_KINDS)}.")
    try:
        tokenizer = _KINDS[kind](path)
        if not tokenizer.text_to_ids(PROBES[0]):  # some damaged files only fail here
            raise UserError(f"{path}: the {kind} tokenizer has no tokens for text", "Restore its files.")
    except UserError:
        raise
    except BaseException as error:  # the libraries raise what they like, and Rust's panics are no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = error if isinstance(error, OSError | ValueError | RuntimeError) else repr(error)
        raise UserError(f"{path}: cannot load the {kind} tokenizer: {reason}", "Restore its files.") from error
    return tokenizer


def spec_of(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the `tokenizer` of a blend that is to be prepared with this one.

    Errors:
        UserError: its folder is no prepared tokenizer.
    """
    meta = read_meta(tokenizer.path)
    path = (Path(tokenizer.path) / meta.get("file", "")).resolve()
    options = {key: meta[key] for key in ("num_special_tokens", "pattern") if key in meta}
    return {"kind": meta["kind"], "path": str(path), **options}


def token_of(tokenizer: Tokenizer | None) -> Callable[[int], str]:
    """Return what gives the text of a token by its id: empty without a tokenizer, and for rows of padding."""

    def token(number: int) -> str:
        return tokenizer.ids_to_text([number]) if tokenizer and number < tokenizer.vocab_size else ""

    return token


def nemo_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer as `load_tokenizer` does, known to NeMo as one of its own `TokenizerSpec`s."""
    from nemo.collections.common.tokenizers.tokenizer_spec import TokenizerSpec

    TokenizerSpec.register(Tokenizer)
    return load_tokenizer(path)


def train_bpe(texts: Iterable[str] | Iterator[str], vocab_size: int, path: str | Path) -> BPETokenizer:
    """Train a byte-level BPE and save it, also as a folder that Hugging Face's AutoTokenizer reads.

    The family's pre-tokenizer, no normaliser, all 256 bytes in the vocabulary: any text survives. The same texts in
    the same order give the same file.

    Args:
        texts: the documents to learn from.
        vocab_size: number of ids, special tokens included.
        path: folder to write; exists.

    Errors:
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
    """Set the tokenizers library's steps around merges: split by the pattern, write bytes as characters."""
    from tokenizers import Regex, decoders, pre_tokenizers

    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    as_characters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([split, as_characters])
    library.decoder = decoders.ByteLevel()


def _all_merges(vocab: dict[str, int], special: Sequence[str]) -> list[tuple[str, str]]:
    """Return all splits of every token into two, by rank: tiktoken merges any of them, so the saved file must too."""
    merges, skipped = [], set(special)
    for token in sorted(vocab, key=vocab.get):
        if token not in skipped:
            pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
            merges += sorted(
                (p for p in pairs if p[0] in vocab and p[1] in vocab), key=lambda p: (vocab[p[0]], vocab[p[1]])
            )
    return merges
