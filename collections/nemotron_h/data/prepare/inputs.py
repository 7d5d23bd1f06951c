"""Find the files that a source means and open them: names before patterns, each real file once, by first bytes."""

from __future__ import annotations

import bz2
import fnmatch
import glob
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO

from nemotron_h.core.errors import UserError
from nemotron_h.data.blend import Blend
from nemotron_h.data.fetch_spec import HUB
from nemotron_h.data.prepare.fetch import fetch
from nemotron_h.data.prepare.hub_stream import stream

#: what a folder means, by format; where no file has such a name, and for the other formats, all of its files
_SUFFIXES = {
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "json": (".json",),
    "parquet": (".parquet", ".pq"),
    "webdataset": (".tar",),
    "python": (".py",),
    "docstrings": (".py",),
    "html": (".html", ".htm", ".xhtml"),
}
#: first bytes -> the suffix that such files have
_MAGIC = {
    b"\x1f\x8b": ".gz",
    b"BZh": ".bz2",
    b"\xfd7zXZ\x00": ".xz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"PK\x03\x04": ".zip",
}
#: what reading a damaged compressed file raises
DAMAGE = (OSError, EOFError, lzma.LZMAError, zlib.error)


@dataclass(frozen=True)
class Input:
    """A file of a source.

    Args:
        name: stable across machines where the file came out of a package; shown in the quarantine and the manifest.
        path: absolute.
    """

    name: str
    path: str


def find_inputs(blend: Blend, name: str, say: Callable[[str], None] = lambda text: None) -> list[Input]:
    """Return the files of source `name`, fetched if need be, each real file once, sorted by name.

    Args:
        say: is told of files that are left out.
    Errors:
        UserError: a path matches nothing, or a fetch fails.
    """
    source = blend.sources[name]
    if source.fetch and source.fetch.kind == HUB:
        return [Input(part, str(path)) for part, path in stream(blend, name, say)]
    if source.fetch:
        return [Input(member, str(path)) for member, path in fetch(source.fetch, say)]
    chosen: dict[str, str] = {}  # the real file -> the name by which it is read
    repeated = 0
    for written in source.paths():
        path = resolve_path(blend, written)
        if source.format == "megatron":
            return [Input(os.path.basename(path + suffix), path + suffix) for suffix in (".bin", ".idx")]
        matches = _files_of(path, source.format, say)
        if not matches:
            raise UserError(
                f"sources.{name}.path: no file matches {path} (category {source.category})",
                f"Put the data there, or edit the paths in {blend.path}: they may name files, folders and globs.",
            )
        for match in matches:
            repeated += chosen.setdefault(os.path.realpath(match), match) != match
    if repeated:
        say(f"{repeated:,} names are left out: they are links to files that are read under another name")
    return [Input(path, path) for path in sorted(chosen.values())]


def resolve_path(blend: Blend, path: str) -> str:
    """Return an absolute path; relative ones start at the folder of the blend's file."""
    return os.path.normpath(os.path.join(os.path.dirname(blend.path), os.path.expanduser(path)))


def _files_of(path: str, file_format: str, say: Callable[[str], None]) -> list[str]:
    """Return the files that a path means: a file or folder of this very name, else those that match it as a glob."""
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        return _matching(path)
    files = list(_walk(path))
    named = [f for f in files if _plain_name(f).endswith(_SUFFIXES.get(file_format, ""))]
    if named and len(named) < len(files):
        other = sorted(set(files) - set(named))
        say(f"{path}: {len(other):,} files that are not {file_format} by name are left out, such as {other[0]}")
    return named or files


def _plain_name(path: str) -> str:
    """Return a file's name in lower case, without the suffix of a compressed file."""
    name = path.lower()
    return next((name.removesuffix(s) for s in _MAGIC.values() if name.endswith(s)), name)


def _walk(folder: str, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the files below a folder, hidden ones left out. Links are followed, but not into a folder that the link
    lies in, which would have no end.
    """
    above = (*above, os.path.realpath(folder))
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        if entry.name.startswith("."):
            continue
        if entry.is_file():
            yield entry.path
        elif entry.is_dir() and os.path.realpath(entry.path) not in above:
            yield from _walk(entry.path, above)


def _matching(pattern: str) -> list[str]:
    """Return the files that match a glob; parts of it that exist under just this name are no patterns."""
    parts = pattern.split(os.sep)
    folder, first = os.sep, 1
    while first < len(parts) and os.path.lexists(os.path.join(folder, parts[first])):
        folder, first = os.path.join(folder, parts[first]), first + 1
    rest = parts[first:]
    if rest and not glob.has_magic(rest[0]):  # a missing folder, which may lie in / and must not be looked for there
        return []
    if "**" in rest and os.path.isdir(folder):  # glob follows a link to its own folder 40 times
        return [f for f in _walk(folder) if _fits(os.path.relpath(f, folder).split(os.sep), rest)]
    matches = glob.glob(os.path.join(glob.escape(folder), *rest))
    return sorted(match for match in matches if os.path.isfile(match))


def _fits(parts: list[str], pattern: list[str]) -> bool:
    """Return whether a path matches a glob, both in parts; `**` stands for any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_fits(parts[n:], pattern[1:]) for n in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def compression(path: str) -> str:
    """Return how a file is compressed, read off its first bytes: `.gz`, `.bz2`, `.xz`, `.zst`, or an empty string.

    Errors:
        UserError: it is a ZIP archive, which holds files rather than text.
    """
    with open(path, "rb") as file:
        head = file.read(6)
    suffix = next((suffix for magic, suffix in _MAGIC.items() if head.startswith(magic)), "")
    if suffix == ".zip":
        raise UserError(f"{path} is a ZIP archive", "Unpack it and name the files that it holds.")
    return suffix


def open_input(path: str) -> IO[bytes]:
    """Open a file for reading bytes, decompressed."""
    suffix = compression(path)
    if suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(path), "zstd"))
    return {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(suffix, open)(path, "rb")
