"""Files: written whole or not at all, their sha256, and text from outside, read in one way everywhere.

Text is UTF-8 without a byte order mark; errors name the byte.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from nemotron_h.core.errors import UserError, writing

T = TypeVar("T")
_PIECE = 1 << 20


def file_sha256(path: str | Path) -> str:
    """Return the hex sha256 of a file's content, read in pieces."""
    with open(path, "rb") as file:
        if hasattr(hashlib, "file_digest"):  # from Python 3.11 on
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        while piece := file.read(_PIECE):
            digest.update(piece)
        return digest.hexdigest()


class HashedFile:
    """New file whose sha256 is taken of what is written, so that nobody reads it again.

    A thread that writes gives way to the others of its process: pieces are written and hashed without Python's lock.
    The disk is asked to take each piece at once: a kernel that waits for memory to fill up leaves it idle at first.

    Args:
        path: of the file; one that is there is emptied.
        advance: told the bytes of each piece that is written; what it raises ends the write.
    Attributes:
        size: bytes so far.
    """

    _PIECE = 1 << 24

    def __init__(self, path: Path, advance: Callable[[int], None] = lambda size: None) -> None:
        self.size, self._sent, self._digest, self._advance = 0, 0, hashlib.sha256(), advance
        self._file = path.open("wb", buffering=0)

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, *raised: object) -> None:
        self._file.close()

    @property
    def sha256(self) -> str:
        """Return the hex sha256 of what has been written."""
        return self._digest.hexdigest()

    def write(self, data: bytes | memoryview) -> int:
        """Append all of the data."""
        left = memoryview(data).cast("B")
        size = len(left)
        while left:
            piece = left[: self._PIECE]
            piece = piece[: self._file.write(piece)]  # the last of a disk's room is less
            self._digest.update(piece)
            self.size += len(piece)
            self._advance(len(piece))
            left = left[len(piece) :]
            if self.size - self._sent >= self._PIECE and hasattr(os, "posix_fadvise"):  # Linux
                os.posix_fadvise(self._file.fileno(), self._sent, self.size - self._sent, os.POSIX_FADV_DONTNEED)
                self._sent = self.size
        return size

    def tell(self) -> int:
        """Return the position, which is the end."""
        return self.size

    def flush(self) -> None:
        """Do nothing: nothing waits."""

    def sync(self) -> None:
        """Wait until the disk has what has been written."""
        os.fsync(self._file.fileno())


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write a file so that it is either the old one or the whole new one, also after a crash.

    Yields:
        the name to write to; it becomes `path` when the block ends well, and is removed when it does not.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any, indent: int = 1) -> None:
    """Write JSON, indented, by `whole_file`."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def write_between(path: Path, begin: str, end: str, text: str) -> None:
    """Replace what stands between a line of a text file and the next of another kind, by `whole_file`.

    Args:
        begin, end: the lines, with their line ends; `begin` stands there once.
    Errors:
        UserError: it does not, or no `end` is behind it.
    """
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    _, closing, after = rest.partition(end)
    if not closing or begin in rest:
        raise UserError(f"{path}: {begin.strip()} has to stand there once, and {end.strip()} behind it")
    with whole_file(path) as temporary:
        temporary.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


_ENCODINGS = ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16"))


def read_text(path: str | Path) -> str:
    r"""Return a file's text: `decode` of its bytes, with line ends as `\n`.

    Errors:
        UserError: the file cannot be read, or is not UTF-8.
    """
    try:
        data = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    return decode(data, str(path)).replace("\r\n", "\n").replace("\r", "\n")


def decode(data: bytes, origin: str) -> str:
    """Return UTF-8 bytes as text, without a byte order mark at their start; line ends stay as they are.

    Args:
        data: of a whole file or message; of a line of a file, only the first can begin with a mark.
        origin: the file, or what else the bytes come from, to name in an error.
    Errors:
        UserError: names the first byte that is not UTF-8 and its position (from 0).
    """
    for mark, encoding in _ENCODINGS:
        if data.startswith(mark):
            raise UserError(f"{origin}: {encoding} text, not UTF-8", f"Convert it: iconv -f {encoding} -t UTF-8")
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        start = error.start + len(data) - len(error.object)
        lines = data.count(b"\n", 0, start)
        place = f"0x{data[start]:02x}" + (f", line {lines + 1:,}" if lines else "")
        raise UserError(
            f"{origin}: byte {start:,} ({place}) is not UTF-8",
            "Save it as UTF-8; from Latin-1: iconv -f LATIN1 -t UTF-8",
        ) from error


def check_unicode(text: str, origin: str) -> str:
    r"""Return the text as it is when it can be written as UTF-8.

    Python keeps bytes of the command line and of standard input that are not UTF-8, and JSON's `\ud800`, as lone
    surrogates, which no tokenizer takes.

    Errors:
        UserError: names the first lone surrogate and its position in characters (from 0).
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        shown = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"lone surrogate U+{code:04X}"
        raise UserError(f"{origin}: {shown} at character {error.start:,} is not UTF-8", "Give UTF-8 text.") from error
    return text


def parse_json(data: bytes | str, origin: str) -> Any:
    """Return parsed JSON; bytes are decoded as by `decode`.

    Errors:
        UserError: not UTF-8, not JSON, or nested deeper than Python reads.
    """
    try:
        return json.loads(decode(data, origin) if isinstance(data, bytes) else data)
    except ValueError as error:
        raise UserError(f"{origin} is not JSON: {error}") from error
    except RecursionError as error:
        raise UserError(f"{origin}: the JSON is nested too deep to read") from error


def read_json(path: str | Path) -> Any:
    """Return a file's parsed JSON.

    Errors:
        UserError: as `read_text` and `parse_json`.
    """
    return parse_json(read_text(path), str(path))


def read_json_object(path: str | Path) -> dict[str, Any]:
    """Return a file's JSON object.

    Errors:
        UserError: as `read_json`, or the file holds another value than an object.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return content


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows as CSV, a column for every key."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def parsed_lines(file: Path, parse: Callable[[bytes], T]) -> tuple[list[T], list[int]]:
    """Return what `parse` makes of each line of a file, in order, and the numbers of the lines that it refuses; both
    empty where there is no file. A process that was killed, or a full disk, leaves half a line.

    Args:
        parse: raises ValueError for a line that is none.
    """
    parsed, refused = [], []
    with suppress(FileNotFoundError), file.open("rb") as opened:
        for number, line in enumerate(opened, 1):
            try:
                parsed.append(parse(line))
            except ValueError:
                refused.append(number)
    return parsed, refused
