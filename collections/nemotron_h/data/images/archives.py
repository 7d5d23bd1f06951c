"""Samples of a WebDataset's tar archive: members that follow each other and share their name up to its first dot."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field

from nemotron_h.core.errors import UserError
from nemotron_h.data.images.read import MOST_BYTES
from nemotron_h.data.images.records import Picture
from nemotron_h.data.prepare.inputs import DAMAGE, open_input

_IMAGES = ("avif", "bmp", "gif", "jp2", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp")


@dataclass
class Sample:
    """A sample of an archive.

    Args:
        key: its members' name up to the first dot.
        json, txt: the content of such members; None where it has none.
        images: name of a member -> the image.
        unread: suffixes of members that are neither.
        problem: why it cannot be used; empty: it can.
    """

    key: str
    json: bytes | None = None
    txt: bytes | None = None
    images: dict[str, Picture] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    problem: str = ""

    def add(self, name: str, data: bytes | None) -> None:
        """Add a member; data that is None is too large."""
        suffix = name.rpartition(".")[2].lower()
        if suffix in ("json", "txt") and data is not None:
            if getattr(self, suffix) is not None:
                self.problem = f"two .{suffix}"
            setattr(self, suffix, data)
        elif suffix in _IMAGES and data is not None:
            self.images[name] = Picture(name, data=data)
        elif data is None and suffix in ("json", "txt", *_IMAGES):
            self.problem = f"{name} is over {MOST_BYTES >> 20} MiB"
        else:
            self.unread = (*self.unread, f".{suffix}")


def samples(path: str) -> Iterator[Sample]:
    """Yield the samples of an archive, compressed or not, one in memory at a time.

    Errors:
        UserError: the file is no archive, or damaged.
    """
    sample, name = None, ""
    try:
        with open_input(path) as file, tarfile.open(fileobj=file, mode="r|") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                name = member.name.removeprefix("./")
                folder, base = os.path.split(name)
                key = os.path.join(folder, base.partition(".")[0])
                if sample is None or key != sample.key:
                    if sample:
                        yield sample
                    sample = Sample(key)
                small = member.size <= MOST_BYTES
                sample.add(name, archive.extractfile(member).read() if small else None)
    except (*DAMAGE, tarfile.TarError) as error:
        raise UserError(f"{path} is no tar archive, or damaged after {name or 'its start'}: {error}") from error
    if sample:
        yield sample
