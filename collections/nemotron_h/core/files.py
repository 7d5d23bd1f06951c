"""Files: written whole or not at all, and their sha256."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write a file so that it is either the old one or the whole new one, also after a crash.

    Yields:
        the name to write to; it becomes `path` when the block ends well, and is removed when it does not.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
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
