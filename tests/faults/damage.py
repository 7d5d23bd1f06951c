"""Damage to files of a run that was left in its middle: checkpoints, data, records."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from small_run import Small, without_last
from stages import Stage

from nemotron_h.checkpoint import folders
from nemotron_h.core.locks import LOCK

#: of a pipeline, in order
PARTS = ("importance", "candidates", "score", "short-distil", "select", "distil", "export")


def begin_from(small: Small, stage: Stage, straight: str, name: str, kind: str, rng: random.Random) -> None:
    """Copy an undisturbed run's folder, finished or as if it had been left in its middle."""
    source, copy = stage.folder(small, straight), stage.folder(small, name)
    whole = rng.random() < 0.5 and not (stage.trains and kind.endswith("_data"))  # a finished run reads no data
    if stage.trains and not whole:
        without_last(small, straight, name)
        return
    shutil.copytree(source, copy)
    if stage.recipe is None and not whole:
        for file in ("manifest.json", rng.choice(("low", "high")) + "/source.json"):
            (copy / file).unlink()
    elif not stage.trains and not whole:
        for part in PARTS[rng.randrange(len(PARTS)) :]:
            (copy / part / "stage.json").unlink()


def files(small: Small, stage: Stage, name: str, kind: str) -> tuple[Path, list[Path]]:
    """Return the folder in which a kind of damage is done, and its files that have some content."""
    root = stage.folder(small, name)
    if kind.endswith("_data") and stage.recipe is not None:
        root = small.folder / "data" / stage.blend
    elif kind in ("torn", "flipped") and stage.trains:
        root = folders.finished(root)[0]
    some = [path for path in sorted(root.rglob("*")) if path.is_file() and path.stat().st_size and path.name != LOCK]
    if kind.endswith("_record"):
        some = [path for path in some if not _of_checkpoint(path.relative_to(root))]
    elif kind in ("torn", "flipped") and not stage.trains:
        some = [path for path in some if _of_checkpoint(path.relative_to(root))]
    return root, some


def _of_checkpoint(path: Path) -> bool:
    return "checkpoints" in path.parts or "weights" in path.parts


@contextlib.contextmanager
def restored(folder: Path | None) -> Iterator[None]:
    """Put a folder back as it was at the end of the block; None is no folder."""
    if folder is None:
        yield
        return
    kept = folder.with_name(f"{folder.name}.kept")
    shutil.copytree(folder, kept)
    try:
        yield
    finally:
        shutil.rmtree(folder)
        kept.rename(folder)


def damage(file: Path, kind: str, rng: random.Random) -> str:
    """Truncate a file or flip a bit of it; return how."""
    size = file.stat().st_size
    if kind.startswith("torn"):
        left = rng.randrange(size)
        os.truncate(file, left)
        return f"{left} of {size} bytes left"
    at, bit = rng.randrange(size), rng.randrange(8)
    content = bytearray(file.read_bytes())
    content[at] ^= 1 << bit
    file.write_bytes(content)
    return f"bit {bit} of byte {at} flipped"
