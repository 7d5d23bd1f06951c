"""Reads windows of tokens out of Megatron `.bin/.idx` files.

The tokens of a source are one stream: document after document, closed to a circle, so that a window which runs over
the end goes on at the start. Files are memory-mapped when they are first read, a bounded number at a time (a mapping
holds a file descriptor, and a blend may have a thousand sources), and survive pickling into worker processes.
"""

from __future__ import annotations

import os
from functools import lru_cache

import numpy as np

from nemotron_h.data.indexed import read_index_header
from nemotron_h.errors import UserError

OPEN_FILES = 128  # each of `.bin` and `.idx`; the usual limit is 1,024 descriptors per process


@lru_cache(maxsize=OPEN_FILES)
def _map_tokens(path: str, dtype: np.dtype, modified: int) -> np.ndarray:
    return np.memmap(path, dtype=dtype, mode="r")


@lru_cache(maxsize=OPEN_FILES)
def _map_offsets(path: str, position: int, count: int, modified: int) -> np.ndarray:
    return np.memmap(path, dtype=np.int64, mode="r", offset=position, shape=(count,))


class TokenStream:
    """The tokens of one `.bin/.idx` pair.

    Args:
        prefix: path without `.bin`.

    Attributes:
        tokens: their number.

    Raises:
        UserError: a file is missing, no index, or empty.
    """

    def __init__(self, prefix: str) -> None:
        self.bin_path, self.idx_path = prefix + ".bin", prefix + ".idx"
        try:
            state, self._idx_modified = os.stat(self.bin_path), os.stat(self.idx_path).st_mtime_ns
            self._header = read_index_header(self.idx_path)
        except (OSError, ValueError) as error:
            raise UserError(str(error), "Prepare the blend again: nemotron-h data prepare") from error
        self._bin_modified = state.st_mtime_ns
        self.tokens = state.st_size // self._header.dtype.itemsize
        if not self.tokens:
            raise UserError(f"{self.bin_path} is empty", "Prepare the blend again: nemotron-h data prepare")

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from position `start` of the circle on, int64 [count]."""
        stream = _map_tokens(self.bin_path, self._header.dtype, self._bin_modified)
        parts = [stream[a:b] for a, b in self._pieces(start, count)]
        return np.concatenate(parts).astype(np.int64)

    def document_starts(self, start: int, count: int) -> np.ndarray:
        """Where documents begin among the `count` tokens from `start` on: ascending places in the window."""
        offsets = _map_offsets(
            self.idx_path,
            self._header.file_size - 8 * (self._header.sequences + self._header.marks),
            self._header.sequences,
            self._idx_modified,
        )
        places, done = [], 0
        for a, b in self._pieces(start, count):
            low, high = np.searchsorted(offsets, np.array([a, b]) * self._header.dtype.itemsize)
            places.append(offsets[low:high] // self._header.dtype.itemsize - a + done)
            done += b - a
        return np.unique(np.concatenate(places))  # an empty document begins where the next one does

    def _pieces(self, start: int, count: int) -> list[tuple[int, int]]:
        """The ranges of the stream that make up a range of the circle."""
        pieces = []
        while count:
            start %= self.tokens
            end = min(start + count, self.tokens)
            pieces.append((start, end))
            count, start = count - (end - start), end
        return pieces


def document_numbers(starts: np.ndarray, length: int) -> np.ndarray:
    """The number of the document that each place of a window belongs to, from 0: int32 [length].

    Args:
        starts: places where documents begin.
        length: of the window.
    """
    begins = np.zeros(length, dtype=np.int32)
    begins[starts[(starts > 0) & (starts < length)]] = 1
    return np.cumsum(begins, dtype=np.int32)
