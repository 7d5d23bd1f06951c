"""Files: written whole or not at all, and their sha256."""

from __future__ import annotations

import hashlib
import json
import os
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


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that the file is either the old one or the whole new one, also after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
