"""An output folder or file that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemotron_h.core.errors import UserError

#: ours: small files, and what a file system needs beyond the bytes of its files
_SPARE = 64 << 20


def check_new(out: Path) -> None:
    """Check that an output can be made there, before any work.

    Errors:
        UserError: `out` exists, or its parent is no folder.
    """
    out = out.absolute()
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists already", hint="name another OUT; nothing was written")
    if not out.parent.is_dir():
        raise UserError(f"there is no folder {out.parent}", hint=f"create it: mkdir -p {out.parent}")


def check_room(out: Path, needed: int) -> None:
    """Check that the disk has room for an output of `needed` bytes.

    Errors:
        UserError: tells what is free.
    """
    parent = out.absolute().parent
    free = shutil.disk_usage(parent).free
    if free < needed + _SPARE:
        raise UserError(
            f"{parent} has {free / 1e9:,.1f} GB free, {(needed + _SPARE) / 1e9:,.1f} GB are needed",
            hint="free space, or name an OUT on another disk",
        )


@contextmanager
def new_folder(out: Path, needed: int) -> Iterator[Path]:
    """Yield a temporary folder beside `out` that takes its name when the block ends well, and is removed when it does
    not.

    Args:
        out: must not exist.
        needed: bytes that will be written.
    Errors:
        UserError: `out` exists, its parent is no folder or cannot be written, or the disk has too little space.
    """
    with _unfinished(out, needed) as temporary:
        temporary.mkdir()
        yield temporary


@contextmanager
def new_file(out: Path, needed: int) -> Iterator[Path]:
    """Yield the name of a file to write, which becomes `out` as a folder of `new_folder` does."""
    with _unfinished(out, needed) as temporary:
        yield temporary


@contextmanager
def _unfinished(out: Path, needed: int) -> Iterator[Path]:
    out = out.absolute()
    check_new(out)
    check_room(out, needed)
    temporary = out.with_name(f".{out.name}.unfinished-{os.getpid()}")
    try:
        yield temporary
        temporary.rename(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}", hint="nothing was left behind") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
