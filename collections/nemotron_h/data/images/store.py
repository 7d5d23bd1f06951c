"""Encoded images of a prepared source: a blob of files as they were, each once, and an index of their places.

Files beside a split's tokens: `.images`, the blob, and `.places`, `manifest.PLACES` [images] in the order of documents
and of places in them. A shard's files have the same form.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from nemotron_h.core.errors import UserError
from nemotron_h.core.files import HashedFile
from nemotron_h.data.images.read import ImageError, read_bytes, read_image
from nemotron_h.data.images.records import Picture
from nemotron_h.data.indexed import ArrayFile
from nemotron_h.data.manifest import PLACES

BLOB, INDEX = SUFFIXES = (".images", ".places")
FILES = "image_files.jsonl"  # of a source: what `Loader` noted
_AGAIN = "Run nemotron-h data verify to see what changed; restore the file or prepare the blend again, then resume."


@dataclass(frozen=True)
class Loaded:
    """An image that can be decoded: its encoded bytes, their digest, and its size in pixels, upright."""

    data: bytes
    digest: bytes
    width: int
    height: int


class Loader:
    """Reads the images of a shard's records, and notes the files that they came from.

    Args:
        files: gets a JSON line for each file: path, bytes, time and digest; null where it could not be read.
    """

    def __init__(self, files: IO[bytes]) -> None:
        self._files, self._noted = files, set()
        self._sizes: dict[bytes, tuple[int, int]] = {}  # of images that were decoded: many records may share one

    def load(self, picture: Picture) -> Loaded:
        """Return an image of a record.

        Errors:
            ImageError: naming it, where it cannot be read or decoded.
        """
        stamp, digest = _stamp(picture.path), None
        try:
            data = picture.read()
            digest = digest_of(data)
            if digest not in self._sizes:
                self._sizes[digest] = read_image(data).size
            return Loaded(data, digest, *self._sizes[digest])
        except ImageError as error:
            raise ImageError(f"image {picture.name[:200]}: {error}") from error
        finally:
            if picture.path and picture.path not in self._noted:
                self._noted.add(picture.path)
                line = json.dumps([picture.path, *(stamp or (None, None)), digest.hex() if digest else None])
                self._files.write(line.encode("utf-8", "replace") + b"\n")


class Writer:
    """Appends the images of documents to a shard's files."""

    def __init__(self, blob: IO[bytes], index: IO[bytes]) -> None:
        self._blob, self._index = blob, index
        self._begins: dict[bytes, int] = {}
        self._end = 0

    def add(self, document: int, places: Sequence[int], images: Sequence[Loaded]) -> None:
        """Add the images of a document, by their places among its tokens."""
        for place, image in zip(places, images, strict=True):
            if image.digest not in self._begins:
                self._begins[image.digest] = self._end
                self._end += self._blob.write(image.data)
            row = (document, place, self._begins[image.digest], len(image.data), image.width, image.height)
            self._index.write(np.array([(*row, image.digest)], dtype=PLACES).tobytes())


def digest_of(data: bytes) -> bytes:
    """Return 16 bytes that stand for an encoded image."""
    return hashlib.blake2b(data, digest_size=16).digest()


def join(parts: Sequence[tuple[str, np.ndarray]], target: str) -> dict[str, Any]:
    """Join the images of shards. Takes some 150 bytes of memory for each that differs from all others.

    Args:
        parts: of each shard the prefix of its files, and which of its documents stay, bool [documents].
        target: prefix of the files to write, which are flushed to disk.
    Returns:
        the keys of `SplitManifest`: images, image_bytes, sha256_images, sha256_places.
    """
    begins: dict[bytes, int] = {}
    count = documents = 0
    with HashedFile(Path(target + BLOB)) as blob, HashedFile(Path(target + INDEX)) as index:
        for prefix, stays in parts:
            rows = np.fromfile(prefix + INDEX, dtype=PLACES)
            rows = rows[stays[rows["document"]]]
            rows["document"] = documents + (np.cumsum(stays) - 1)[rows["document"]]
            documents, count = documents + int(stays.sum()), count + len(rows)
            with open(prefix + BLOB, "rb") as file:
                for row in rows:
                    digest = row["digest"].tobytes()
                    if digest not in begins:
                        file.seek(row["begin"])
                        begins[digest] = blob.size
                        blob.write(file.read(row["size"]))
                    row["begin"] = begins[digest]
            index.write(rows.tobytes())
        blob.sync()
        index.sync()
    return {"images": count, "image_bytes": blob.size, "sha256_images": blob.sha256, "sha256_places": index.sha256}


class Images:
    """The images of a split, read and checked one by one. It survives pickling into worker processes.

    Args:
        prefix: of the split's files.
    Attributes:
        places: `manifest.PLACES` [images].
    Errors:
        UserError: a file is missing.
    """

    def __init__(self, prefix: str) -> None:
        try:
            self.places = np.fromfile(prefix + INDEX, dtype=PLACES)
            self._blob = ArrayFile(prefix + BLOB, np.uint8)
        except OSError as error:
            raise UserError(str(error), "Prepare the blend again: nemotron-h data prepare") from error

    def read(self, number: int) -> Image.Image:
        """Return an image as RGB.

        Errors:
            UserError: its bytes are not those that were prepared.
        """
        row = self.places[number]
        data = self._blob.read(int(row["begin"]), int(row["begin"] + row["size"])).tobytes()
        problem = "its bytes are not those that were prepared"
        if digest_of(data) == row["digest"].tobytes():
            try:
                image = read_image(data)
                if image.size == (row["width"], row["height"]):
                    return image
                problem = f"it has {image.size} pixels, and had {row['width']} x {row['height']}: Pillow is another"
            except ImageError as error:
                problem = f"it can no longer be decoded: {error}"
        first = int(np.searchsorted(self.places["document"], row["document"]))
        place = f"image {number - first + 1} of conversation {row['document']:,}"
        raise UserError(f"{self._blob.path}: {place}, from byte {row['begin']:,} on: {problem}", _AGAIN)


def files_changed(path: Path) -> bool:
    """Return True if an image file is no longer what it was when a `Loader` noted it in this file of lines, or if the
    notes are lost.
    """
    seen: set[str] = set()
    try:
        with path.open(encoding="utf-8") as lines:
            for file, size, time, digest in map(json.loads, lines):
                if file not in seen and not _unchanged(file, size, time, digest):
                    return True
                seen.add(file)
    except (OSError, ValueError, TypeError):
        return True
    return False


def _unchanged(file: str, size: int | None, time: int | None, digest: str | None) -> bool:
    stamp = _stamp(file)
    if stamp is None or stamp[0] != size:
        return stamp is None and size is None
    try:
        return stamp[1] == time or (digest is not None and digest_of(read_bytes(file)).hex() == digest)
    except ImageError:
        return False


def _stamp(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns
