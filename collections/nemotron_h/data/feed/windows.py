"""Reads windows of tokens out of Megatron `.bin/.idx` files.

The tokens of a source are one stream: document after document, closed to a circle, so that a window which runs over
the end goes on at the start.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

import numpy as np

from nemotron_h.core.errors import UserError
from nemotron_h.data.indexed import ArrayFile, read_index_header

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
