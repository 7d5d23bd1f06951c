"""From files to documents: finding a source's files, cutting them into shards, and reading the documents of a shard.

The split depends on the files alone, never on the number of workers, so the prepared bytes do not either.
"""

from __future__ import annotations

import ast
import hashlib
import html.parser
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nemotron_h.core.errors import UserError
from nemotron_h.core.files import decode, parse_json
from nemotron_h.core.units import parse_count
from nemotron_h.data.blend import Source
from nemotron_h.data.chat_keys import CAPTION, PREFERENCE
from nemotron_h.data.images.archives import samples
from nemotron_h.data.images.records import Locate, Picture, among, beside, read_illustrated
from nemotron_h.data.messages import IMAGE, ChatError, Conversation, Turn, read_conversation, text_of
from nemotron_h.data.pairs import Pair, read_pair
from nemotron_h.data.prepare.inputs import DAMAGE, Input, compression, open_input

MIN_SHARD_BYTES, MAX_SHARD_BYTES, SHARDS_PER_SOURCE = 1 << 20, 64 << 20, 64
SAMPLES_PER_SHARD = 32  # ours: so many long samples have enough conversations to choose from
_BLOCK = 1 << 22
_MIN_DOCSTRING = 200  # characters; shorter ones are signatures in words. Ours
_EXCERPT = 160  # characters of a bad record that the quarantine keeps


@dataclass(frozen=True)
class Scan:
    """Statistics of one pass over a file.

    Args:
        size: bytes.
        sha256: of the content.
        cuts: (byte offset, number of the line that begins there, from 1), where a line-based file may be split; the
            first is (0, 1).
    """

    size: int
    sha256: str
    cuts: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Piece:
    """A part of a shard: a whole file (`end` is None), a byte range of whole lines, or a range of Parquet row
    groups.
    """

    input: Input
    begin: int = 0
    end: int | None = None
    line: int = 1


@dataclass(frozen=True)
class Document:
    """A text, or a conversation or pair of them with the text that stands for it; the place is told of these alone."""

    text: str
    conversation: Conversation | None = None
    file: str = ""
    position: str = ""
    pair: Pair | None = None
    held_out: bool | None = None  # None: its hash decides

    def turns(self) -> tuple[Turn, ...]:
        """Return the turns of its conversation, or of both of its pair, each once."""
        if self.pair is not None:
            return (*self.pair.chosen, self.pair.rejected[-1])
        return self.conversation or ()

    def parts(self) -> list[str]:
        """Return its text, or the texts of its turns."""
        if self.conversation is None and self.pair is None:
            return [self.text]
        texts = [text for turn in self.turns() for text in (turn.reasoning, turn.content) if text]
        pictured = any(turn.images for turn in self.turns())
        return [text.replace(IMAGE, "") for text in texts] if pictured else texts


@dataclass(frozen=True)
class Bad:
    """A record that could not be read: where it is, why, and how it begins."""

    file: str
    position: str
    reason: str
    excerpt: str = ""


def is_line_based(source: Source, path: str) -> bool:
    """Return True if the file can be split at any line end."""
    return (source.format == "jsonl" or source.split_on == "\n") and not compression(path)


def scan(path: str, line_based: bool) -> Scan:
    """Hash a file and, when it is line-based, find where it can be split (about every `MIN_SHARD_BYTES`).

    Errors:
        UserError: it is a ZIP archive.
    """
    compression(path)
    digest, offset, lines, cuts, due = hashlib.sha256(), 0, 1, [(0, 1)], MIN_SHARD_BYTES
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            begin = 0
            while line_based and due < offset + len(block):
                newline = block.find(b"\n", max(due - offset, begin))
                if newline < 0:
                    break
                lines += block.count(b"\n", begin, newline + 1)
                begin = newline + 1
                cuts.append((offset + begin, lines))
                due = offset + begin + MIN_SHARD_BYTES
            if line_based:
                lines += block.count(b"\n", begin)
            offset += len(block)
    return Scan(offset, digest.hexdigest(), tuple(cut for cut in cuts if cut[0] < offset or cut[0] == 0))


def plan_shards(source: Source, inputs: list[Input], scans: list[Scan]) -> list[list[Piece]]:
    """Split a source into shards of roughly equal size: between 1 and 64 MiB, at most about 64 of them while they stay
    below that.
    """
    total = sum(s.size for s in scans)
    target = min(MAX_SHARD_BYTES, max(MIN_SHARD_BYTES, total // SHARDS_PER_SOURCE))
    if source.extend:  # samples are made of what is in one shard
        target = min(MAX_SHARD_BYTES, max(target, SAMPLES_PER_SHARD * 4 * parse_count(source.extend.tokens)))
    shards: list[list[Piece]] = []
    pieces: list[Piece] = []
    filled = 0
    for item, found in zip(inputs, scans, strict=True):
        for piece, size in _pieces(source, item, found, target):
            pieces.append(piece)
            filled += size
            if filled >= target:
                shards.append(pieces)
                pieces, filled = [], 0
    return [*shards, pieces] if pieces else shards


def _pieces(source: Source, item: Input, found: Scan, target: int) -> Iterator[tuple[Piece, int]]:
    if source.format == "parquet":
        yield from _row_groups(item, target)
        return
    if not is_line_based(source, item.path):
        yield Piece(item), found.size
        return
    begin, line = found.cuts[0]
    for cut, cut_line in found.cuts[1:]:
        if cut - begin >= target:
            yield Piece(item, begin, cut, line), cut - begin
            begin, line = cut, cut_line
    yield Piece(item, begin, found.size, line), found.size - begin


def _row_groups(item: Input, target: int) -> Iterator[tuple[Piece, int]]:
    metadata = _parquet(item).metadata
    begin = size = 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= target or group == metadata.num_row_groups - 1:
            yield Piece(item, begin, group + 1), size
            begin, size = group + 1, 0


def _parquet(item: Input):
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(item.path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{item.path} is not a readable Parquet file: {error}") from error


def read_documents(source: Source, pieces: list[Piece]) -> Iterator[Document | Bad]:
    """Yield the documents and the unreadable records of a shard, in order."""
    for piece in pieces:
        yield from _READERS[source.format](source, piece)


def _lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    with open_input(piece.input.path) as file:
        if piece.begin:
            file.seek(piece.begin)
        position, line = piece.begin, piece.line
        while piece.end is None or position < piece.end:
            try:
                data = file.readline()
            except DAMAGE as error:
                raise UserError(f"{piece.input.path} is damaged after line {line - 1}: {error}") from error
            if not data:
                return
            yield line, data
            position += len(data)
            line += 1


def _read_jsonl(source: Source, piece: Piece) -> Iterator[Document | Bad]:
    file = piece.input.name
    for number, data in _lines(piece):
        if not data.strip():
            continue
        where = f"line {number}"
        record = _json(data, file, where)
        yield record if isinstance(record, Bad) else _from_record(source, record, piece, where)


def _read_json(source: Source, piece: Piece) -> Iterator[Document | Bad]:
    file = piece.input.name
    content = _whole_text(piece)
    records = content if isinstance(content, Bad) else _json(content, file, "whole file")
    if isinstance(records, Bad):
        yield records
        return
    if not isinstance(records, dict | list):
        yield Bad(file, "whole file", "neither an array nor an object of records", _excerpt(content))
        return
    for key, record in records.items() if isinstance(records, dict) else enumerate(records):
        yield _from_record(source, record, piece, f"record {key!r}")


def _read_parquet(source: Source, piece: Piece) -> Iterator[Document | Bad]:
    import pyarrow

    content = _parquet(piece.input)
    columns = None if source.chat else sorted({key.split(".")[0] for key in source.text_fields})
    missing = [c for c in columns or () if c not in content.schema_arrow.names]
    if missing:
        raise UserError(
            f"{piece.input.path}: no column {', '.join(missing)}",
            f"text_fields says so; the file has {', '.join(content.schema_arrow.names)}.",
        )
    for group in range(piece.begin, piece.end):
        row = 0
        try:
            for batch in content.iter_batches(batch_size=256, row_groups=[group], columns=columns):
                for record in batch.to_pylist():
                    yield _from_record(source, record, piece, f"row group {group}, row {row}")
                    row += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{piece.input.path} is damaged in row group {group}, after row {row}: {error}") from error


def _read_webdataset(source: Source, piece: Piece) -> Iterator[Document | Bad]:
    file = piece.input.name
    for sample in samples(piece.input.path):
        where = f"sample {sample.key}"
        record = {} if sample.json is None else _json(sample.json, file, where)
        text = None if sample.txt is None else _text(sample.txt, file, where)
        bad = next((part for part in (record, text) if isinstance(part, Bad)), None)
        if bad is None and source.chat == CAPTION and text is not None and isinstance(record, dict):
            record = {"caption": text.strip(), **record}
        elif bad is None and sample.json is None:
            wanted = ".json, and no .txt" if source.chat == CAPTION else ".json"
            sample.problem = sample.problem or f"no {wanted}"
        if bad is not None or sample.problem:
            yield bad or Bad(file, where, sample.problem)
            continue
        document = _conversation(source, record, file, where, among(sample.images), tuple(sample.images.values()))
        if sample.unread and isinstance(document, Document):
            first, *rest = document.conversation
            document = replace(document, conversation=(replace(first, unread=(*first.unread, *sample.unread)), *rest))
        yield document


def _read_text(source: Source, piece: Piece) -> Iterator[Document | Bad]:
    file = piece.input.name
    if source.split_on == "\n":
        for number, data in _lines(piece):
            text = _text(data, file, f"line {number}")
            yield text if isinstance(text, Bad) else Document(text.rstrip("\r\n"))
        return
    content = _whole_text(piece)
    if isinstance(content, Bad):
        yield content
        return
    if "\n" in source.split_on and "\r" not in source.split_on:
        content = content.replace("\r\n", "\n")
    parts = content.split(source.split_on) if source.split_on else [content]
    for part in parts:
        yield Document(part)


def _read_docstrings(source: Source, piece: Piece) -> Iterator[Document | Bad]:
    content = _whole_text(piece)
    if isinstance(content, Bad):
        yield content
        return
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # of deep nesting
        yield Bad(piece.input.name, "whole file", f"not Python: {error}", _excerpt(content))
        return
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    parts = []
    for node in sorted(nodes, key=lambda n: getattr(n, "lineno", 0)):
        text = ast.get_docstring(node)
        if text and len(text) >= _MIN_DOCSTRING:
            parts.append(f"{node.name}\n{text}" if hasattr(node, "name") else text)
    yield Document("\n\n".join(parts))


class _VisibleText(html.parser.HTMLParser):
    _HIDDEN = ("script", "style", "head", "nav")
    _BLOCKS = ("p", "div", "br", "li", "tr", "pre", "h1", "h2", "h3", "h4", "h5", "h6", "dt", "dd", "table", "section")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.hidden = self.verbatim = 0

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.hidden += tag in self._HIDDEN
        self.verbatim += tag == "pre"
        if tag in self._BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in self._HIDDEN and self.hidden > 0
        self.verbatim -= tag == "pre" and self.verbatim > 0
        if tag in self._BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data if self.verbatim else re.sub(r"\s+", " ", data))


def _read_html(source: Source, piece: Piece) -> Iterator[Document | Bad]:
    content = _whole_text(piece)
    if isinstance(content, Bad):
        yield content
        return
    parser = _VisibleText()
    parser.feed(content)
    parser.close()
    yield Document(re.sub(r"\n\s*\n+", "\n\n", "".join(parser.parts)).strip())


_READERS: dict[str, Callable[[Source, Piece], Iterator[Document | Bad]]] = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "parquet": _read_parquet,
    "webdataset": _read_webdataset,
    "text": _read_text,
    "python": _read_text,
    "docstrings": _read_docstrings,
    "html": _read_html,
}


def _whole_text(piece: Piece) -> str | Bad:
    path = piece.input.path
    try:
        with open_input(path) as file:
            data = file.read()
    except DAMAGE as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return _text(data, piece.input.name, "whole file")


def _text(data: bytes, file: str, place: str) -> str | Bad:
    try:
        return decode(data, file)
    except UserError as error:
        return Bad(file, place, error.message.removeprefix(f"{file}: "), _excerpt(data))


def _json(data: bytes | str, file: str, place: str) -> Any:
    try:
        return parse_json(data, file)
    except UserError as error:
        return Bad(file, place, error.message.removeprefix(file).lstrip(" :").removeprefix("is "), _excerpt(data))


def _from_record(source: Source, record: Any, piece: Piece, where: str) -> Document | Bad:
    file = piece.input.name
    if source.chat:
        locate = beside(piece.input.path, source.images) if source.has_images() else None
        return _conversation(source, record, file, where, locate)
    parts = []
    for key in source.text_fields:
        try:
            parts += _strings(_dig(record, key.split(".")))
        except KeyError:
            have = (
                f"the record has {', '.join(map(str, record))}"
                if isinstance(record, dict)
                else "the record is no object"
            )
            return Bad(file, where, f"no field {key!r}; {have}"[:300], _excerpt(str(record)))
        except TypeError as error:
            return Bad(file, where, f"field {key!r} {error}", _excerpt(str(record)))
    text = source.join.join(parts)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # a lone surrogate written as \ud800 in JSON
        return Bad(file, where, f"not UTF-8: {error.reason}")
    return Document(text)


def _conversation(
    source: Source,
    record: Any,
    file: str,
    where: str,
    locate: Locate | None = None,
    images: Sequence[Picture] = (),
) -> Document | Bad:
    turns = pair = None
    try:
        if source.chat == PREFERENCE:
            pair = read_pair(record)
            text = pair.text()
        elif locate is not None:
            turns = read_illustrated(record, source.chat, locate, source.prompts, images)
            text = text_of(turns)
        else:
            turns = read_conversation(record, source.chat)
            text = text_of(turns)
        text.encode("utf-8")
    except ChatError as error:
        return Bad(file, where, str(error), _excerpt(str(record)))
    except UnicodeEncodeError as error:
        return Bad(file, where, f"not UTF-8: {error.reason}")
    return Document(text, turns, file, where, pair)


def _dig(value: Any, keys: list[str]) -> Any:
    if isinstance(value, list):
        if keys and keys[0].isdigit():
            if int(keys[0]) >= len(value):
                raise KeyError(keys[0])
            return _dig(value[int(keys[0])], keys[1:])
        return [_dig(item, keys) for item in value]
    if not keys:
        return value
    if not isinstance(value, dict):
        raise KeyError(keys[0])
    return _dig(value[keys[0]], keys[1:])


def _strings(value: Any) -> list[str]:
    """Return a string as it is, and the strings of (nested) lists as one text, a line each."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return ["\n".join(part for item in value for part in _strings(item))]
    raise TypeError(f"is {type(value).__name__}, not text")


def _excerpt(data: str | bytes) -> str:
    return data[:_EXCERPT].decode("utf-8", "replace") if isinstance(data, bytes) else data[:_EXCERPT]
