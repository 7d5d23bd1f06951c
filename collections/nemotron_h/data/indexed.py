"""Megatron's indexed token format (`.bin` + `.idx`), written as a stream and read in windows.

Megatron-core reads these files. Its own writer is not used because it keeps Python lists of every document and takes
seconds to import; the tests hold this writer to byte equality with it. Layout of the index: magic, version (u64),
type code (u8), sequences (u64), document marks (u64), then lengths (i32), byte offsets (i64) and document marks
(i64). One sequence is one document here.

Read, the tokens of a source are one stream: document after document, closed to a circle, so that a window which runs
over the end goes on at the start.
"""

from __future__ import annotations

import hashlib
import os
import struct
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from nemotron_h.core.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}
_CHUNK = 1 << 20
OPEN_FILES = 256  # at a time: a blend may have a thousand sources, and the usual limit is 1,024 descriptors per process
_AGAIN = "Run nemotron-h data verify to see what changed; restore the file or prepare the blend again, then resume."


def token_dtype(vocab_size: int) -> np.dtype:
    """Return Megatron's smallest token type that holds every id: uint16 up to 65,535 ids, else int32."""
    return np.dtype(np.uint16 if vocab_size <= 65_535 else np.int32)


@dataclass
class IndexHeader:
    """The head of an `.idx` file: token type, number of sequences (documents) and the size the file must have in
    bytes.
    """

    dtype: np.dtype
    sequences: int
    marks: int

    @property
    def file_size(self) -> int:
        """Return the bytes of a complete index."""
        return _HEADER.size + self.sequences * 12 + self.marks * 8


def read_index_header(path: str | Path) -> IndexHeader:
    """Read the head of an `.idx` file.

    Errors:
        ValueError: when it is not one.
    """
    with open(path, "rb") as file:
        head = file.read(_HEADER.size)
    names = {code: name for name, code in _CODES.items()}
    if len(head) < _HEADER.size or head[:9] != _MAGIC or head[17] not in names:
        raise ValueError(f"{path} is not an index of Megatron's indexed format, or it is damaged")
    _, version, code, sequences, marks = _HEADER.unpack(head)
    if version != 1:
        raise ValueError(f"{path}: index version {version}, only 1 is known")
    return IndexHeader(np.dtype(names[code]), sequences, marks)


def read_lengths(path: str | Path) -> np.ndarray:
    """Return the lengths in tokens of all sequences of an `.idx` file, int32 [sequences].

    Errors:
        ValueError: it is no index, or shorter than it says.
    """
    header = read_index_header(path)
    lengths = np.fromfile(path, dtype=np.int32, count=header.sequences, offset=_HEADER.size)
    if len(lengths) != header.sequences:
        raise ValueError(f"{path} is truncated: {len(lengths):,} of {header.sequences:,} lengths")
    return lengths


class ArrayFile:
    """A file of numbers of one type, read by range. It survives pickling into worker processes.

    It is read, not mapped: where a mapped file is truncated under a run, the run ends by SIGBUS without a message.

    Args:
        path: of the file.
        dtype: of its numbers.
        offset: bytes before the first.

    Attributes:
        size: numbers from the offset to the end of the file, as it was found.

    Errors:
        OSError: the file is not there.
    """

    def __init__(self, path: str, dtype: np.dtype | type, offset: int = 0) -> None:
        state = os.stat(path)
        self.path, self.dtype, self.offset = path, np.dtype(dtype), offset
        self.size = (state.st_size - offset) // self.dtype.itemsize
        self._modified = state.st_mtime_ns

    def read(self, begin: int, end: int) -> np.ndarray:
        """Return the numbers from `begin` up to `end`, [end - begin], not to be written to.

        Errors:
            UserError: the file has become shorter, or cannot be read.
        """
        width = self.dtype.itemsize
        try:
            file = _opened(self.path, self._modified)
            data = os.pread(file.fileno(), (end - begin) * width, self.offset + begin * width)
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror}", _AGAIN) from error
        count = len(data) // width
        if count == end - begin:
            return np.frombuffer(data, self.dtype)
        if count and end - begin > _CHUNK:  # a read gives 2 GiB at most
            first = np.frombuffer(data, self.dtype, count)
            return np.concatenate([first, self.read(begin + count, end)])
        size = os.fstat(file.fileno()).st_size
        raise UserError(f"{self.path} ends at byte {size:,}: it was truncated since it was opened", _AGAIN)


@lru_cache(maxsize=OPEN_FILES)
def _opened(path: str, modified: int) -> BinaryIO:
    return open(path, "rb", buffering=0)  # closed when it leaves the cache


def index_is_plain(path: str | Path) -> bool:
    """Return True if offsets and marks of an `.idx` file say: one sequence per document, in order, without gaps."""
    header, lengths = read_index_header(path), read_lengths(path)
    if header.marks != header.sequences + 1:
        return False
    start = _HEADER.size + header.sequences * 4
    offsets = np.memmap(path, dtype=np.int64, mode="r", offset=start, shape=(header.sequences,))
    marks = np.memmap(path, dtype=np.int64, mode="r", offset=start + header.sequences * 8, shape=(header.marks,))
    position = 0
    for first in range(0, header.sequences, _CHUNK):
        part = np.cumsum(lengths[first : first + _CHUNK], dtype=np.int64) * header.dtype.itemsize + position
        expected = np.concatenate(([position], part[:-1]))
        if not np.array_equal(offsets[first : first + _CHUNK], expected):
            return False
        if not np.array_equal(marks[first : first + len(part)], np.arange(first, first + len(part))):
            return False
        position = int(part[-1])
    return int(marks[-1]) == header.sequences


def write_index(path: str | Path, lengths: np.ndarray, dtype: np.dtype) -> str:
    """Write an `.idx` file for documents that lie one after the other, and flush it to disk.

    Args:
        path: of the file.
        lengths: tokens per document, int32 [documents].
        dtype: token type of the `.bin` file.

    Returns:
        sha256 of the file.
    """
    digest = hashlib.sha256()
    with open(path, "wb") as file:

        def put(data: bytes) -> None:
            digest.update(data)
            file.write(data)

        put(_HEADER.pack(_MAGIC, 1, _CODES[dtype.name], len(lengths), len(lengths) + 1))
        for first in range(0, len(lengths), _CHUNK):
            put(np.ascontiguousarray(lengths[first : first + _CHUNK], dtype="<i4").tobytes())
        position = 0
        for first in range(0, len(lengths), _CHUNK):
            ends = np.cumsum(lengths[first : first + _CHUNK], dtype=np.int64) * dtype.itemsize + position
            put(np.concatenate(([position], ends[:-1])).astype("<i8").tobytes())
            position = int(ends[-1])
        for first in range(0, len(lengths) + 1, _CHUNK):
            put(np.arange(first, min(first + _CHUNK, len(lengths) + 1), dtype="<i8").tobytes())
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


_BLOCK = 1024  # offsets that are read at a time


class TokenStream:
    """The tokens of one `.bin/.idx` pair.

    Args:
        prefix: path without `.bin`.
        vocab_size: tokens have ids below this; None: they are not checked.

    Attributes:
        tokens: their number.

    Errors:
        UserError: a file is missing, no index, or empty.
    """

    def __init__(self, prefix: str, vocab_size: int | None = None) -> None:
        self.prefix, self.vocab_size = prefix, vocab_size
        again = "Prepare the blend again: nemotron-h data prepare"
        try:
            header = read_index_header(prefix + ".idx")
            self._ids = ArrayFile(prefix + ".bin", header.dtype)
            self._offsets = ArrayFile(
                prefix + ".idx", np.int64, header.file_size - 8 * (header.sequences + header.marks)
            )
        except (OSError, ValueError) as error:
            raise UserError(str(error), again) from error
        self._documents, self._itemsize = header.sequences, header.dtype.itemsize
        self._unsigned = np.dtype(f"u{self._itemsize}")
        self.tokens = self._ids.size
        if not self.tokens:
            raise UserError(f"{prefix}.bin is empty", again)

    def read(self, start: int, count: int) -> np.ndarray:
        """Return `count` tokens from position `start` of the circle on, int64 [count].

        Errors:
            UserError: a file has become shorter, or an id is beyond the vocabulary.
        """
        parts = [self._ids.read(a, b) for a, b in self._pieces(start, count)]
        ids = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if self.vocab_size is not None:
            unsigned = ids.view(self._unsigned)  # a negative id is a huge one
            if len(ids) and int(unsigned.max()) >= self.vocab_size:
                place = int(np.argmax(unsigned >= self.vocab_size))
                raise UserError(
                    f"{self.prefix}.bin: token {(start + place) % self.tokens:,} has the id {ids[place]:,}, the "
                    f"tokenizer has {self.vocab_size:,} ids",
                    "It is not the file that was prepared: nemotron-h data verify tells more. Prepare the blend again.",
                )
        return ids.astype(np.int64)

    def document_starts(self, start: int, count: int) -> np.ndarray:
        """Return where documents begin among the `count` tokens from `start` on: ascending places in the window."""
        places, done = [], 0
        for a, b in self._pieces(start, count):
            places += [offsets // self._itemsize - a + done for offsets in self._between(a, b)]
            done += b - a
        return np.unique(np.concatenate(places))  # an empty document begins where the next one does

    def _between(self, a: int, b: int) -> Iterator[np.ndarray]:
        """Yield the byte offsets of the documents that begin at tokens from a up to b, int64, block by block."""
        first = bisect_left(
            range(self._documents), a * self._itemsize, key=lambda n: int(self._offsets.read(n, n + 1)[0])
        )
        while True:
            block = self._offsets.read(first, min(first + _BLOCK, self._documents))
            inside = int(np.searchsorted(block, b * self._itemsize))
            yield block[:inside]
            first += inside
            if inside < _BLOCK:
                return

    def _pieces(self, start: int, count: int) -> list[tuple[int, int]]:
        """Return the ranges of the stream that make up a range of the circle."""
        pieces = []
        while count:
            start %= self.tokens
            end = min(start + count, self.tokens)
            pieces.append((start, end))
            count, start = count - (end - start), end
        return pieces


def document_numbers(starts: np.ndarray, length: int) -> np.ndarray:
    """Return the number of the document that each place of a window belongs to, from 0: int32 [length].

    Args:
        starts: places where documents begin.
        length: of the window.
    """
    begins = np.zeros(length, dtype=np.int32)
    begins[starts[(starts > 0) & (starts < length)]] = 1
    return np.cumsum(begins, dtype=np.int32)
