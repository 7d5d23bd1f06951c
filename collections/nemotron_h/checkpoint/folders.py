"""Checkpoint folders of a run: which are finished, which are whole, which is the newest. Imports no torch.

<run>/checkpoints/step-000100/            weights/, context/, run.json, integrity.json
<run>/checkpoints/step-000100-unfinished  marks one that is being written or removed; a start removes both, unless
                                          integrity.json is there: it is written last, and removed first
<run>/checkpoints/step-000100-v1/         written by a second run of one folder; a run does not start beside it
<run>/checkpoints/aside-step-000100/      set aside by resume.resume_from_path, or by hand; nothing reads it
A step-* without integrity.json and without marker is torn: a run does not start where it is the newest.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nemotron_h.core.errors import UserError
from nemotron_h.core.files import file_sha256, read_json_object, write_json

INTEGRITY = "integrity.json"
RECORD = "run.json"
WEIGHTS = "weights"
#: all that lies in `weights`, beside *.distcp: index of tensors, what every rank has, name of the format
INDEX, COMMON, FORMAT = ".metadata", "common.pt", "metadata.json"
UNFINISHED = "-unfinished"
#: a version stands behind the step where another process wrote the same one
_STEP = re.compile(r"step-(\d+)(-v\d+)?$")


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint folder's name; -1 for other folders."""
    found = _STEP.search(checkpoint.name)
    return int(found.group(1)) if found else -1


def finished(run_dir: Path) -> list[Path]:
    """Return the checkpoints that were written to the end, newest first."""
    return _states(run_dir)[0]


def torn(run_dir: Path) -> dict[Path, str]:
    """Return folders that nothing is writing and nothing reads, newest first, and what is the matter with each."""
    return _states(run_dir)[1]


def newest(run_dir: Path) -> Path | None:
    """Return the newest finished checkpoint, or None.

    Errors:
        UserError: a torn folder is as new or newer: whoever went on from an older one would write its step again.
    """
    whole, others = _states(run_dir)
    for path, problem in others.items():
        if not whole or step_of(path) >= step_of(whole[0]):
            aside = path.with_name(f"aside-{path.name}")
            then = f"{whole[0].name} is then the newest" if whole else "no checkpoint is left then"
            raise UserError(
                f"checkpoint {path} {problem}",
                hint=f"copy it again, whole; or set it aside: mv {path} {aside} ({then})",
            )
    return whole[0] if whole else None


def unfinished(run_dir: Path) -> list[Path]:
    """Return folders whose writing or removal is under way or was interrupted; each has a marker beside it."""
    return [folder for folder in _marked(run_dir) if not (folder / INTEGRITY).is_file()]


def remove_late_marks(run_dir: Path) -> None:
    """Remove the markers of checkpoints that are whole: their process ended between the last file and the mark."""
    for folder in _marked(run_dir):
        if (folder / INTEGRITY).is_file():
            folder.with_name(f"{folder.name}{UNFINISHED}").unlink()


def _marked(run_dir: Path) -> list[Path]:
    markers = sorted((run_dir / "checkpoints").glob(f"step-*{UNFINISHED}"))
    return [marker.with_name(marker.name.removesuffix(UNFINISHED)) for marker in markers]


def _states(run_dir: Path) -> tuple[list[Path], dict[Path, str]]:
    """Return finished checkpoints and torn folders, newest first."""
    paths = sorted((run_dir / "checkpoints").glob("step-*"), key=lambda path: (step_of(path), path.name), reverse=True)
    whole, others, writing = [], {}, set(unfinished(run_dir))  # after the folders: a marker comes first and goes last
    for path in paths:
        if step_of(path) < 0 or path in writing or not path.is_dir():
            continue
        if _STEP.search(path.name).group(2):
            others[path] = f"was written by a second run of {run_dir}; nothing reads it"
        elif not (path / INTEGRITY).is_file():
            others[path] = f"has no {INTEGRITY}: it was copied in part, or files of it were removed"
        else:
            whole.append(path)
    return whole, others


def size_of(checkpoint: Path) -> int:
    """Return the bytes of a finished checkpoint."""
    return sum(size for size, _ in read_integrity(checkpoint).values())


def content(checkpoint: Path) -> list[str]:
    """Return the names of a checkpoint's files that its integrity file covers."""
    files = (p for p in checkpoint.rglob("*") if p.is_file() and p.name != INTEGRITY)
    return sorted(str(p.relative_to(checkpoint)) for p in files)


def describe(checkpoint: Path, names: Iterable[str]) -> dict[str, list]:
    """Return name -> [bytes, sha256] of files of a checkpoint."""
    paths = {name: checkpoint / name for name in names}
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        digests = pool.map(file_sha256, paths.values())
        return {
            name: [path.stat().st_size, digest] for (name, path), digest in zip(paths.items(), digests, strict=True)
        }


def write_integrity(checkpoint: Path, described: Mapping[str, list]) -> None:
    """Record size and sha256 of every file; written last, so its absence means an unfinished checkpoint."""
    write_json(checkpoint / INTEGRITY, dict(sorted(described.items())))


def read_integrity(checkpoint: Path) -> dict[str, tuple[int, str]]:
    """Return name -> (bytes, sha256) of a checkpoint's files, as `write_integrity` recorded them.

    Errors:
        UserError: the file is missing, or no such table.
    """
    recorded = read_json_object(checkpoint / INTEGRITY)
    if not recorded:
        raise UserError(f"{checkpoint / INTEGRITY} lists no files")
    for name, entry in recorded.items():
        match entry:
            case [int(), str()]:
                pass
            case _:
                raise UserError(f"{checkpoint / INTEGRITY}: {name} is {entry!r}, not its size and sha256")
    return {name: (size, digest) for name, (size, digest) in recorded.items()}


def strangers(checkpoint: Path) -> list[str]:
    """Return the names of what lies in a checkpoint's `weights` and training does not write, such as the state of
    NVIDIA ModelOpt. NeMo looks for some and loads them as programs.
    """
    files = (checkpoint / WEIGHTS).iterdir() if (checkpoint / WEIGHTS).is_dir() else ()
    return sorted(
        f"{WEIGHTS}/{path.name}"
        for path in files
        if path.is_dir() or (path.name not in (INDEX, COMMON, FORMAT) and path.suffix != ".distcp")
    )


def damage(checkpoint: Path, rank: int = 0, ranks: int = 1) -> list[str]:
    """Return what is wrong with a checkpoint, one line a file; empty where nothing is.

    Args:
        checkpoint: its folder.
        rank: of `ranks` that share the work. Each looks at the sizes of all files and reads its share of them, so
            together they read everything once, and damage shows on one rank or more.
    """
    try:
        recorded = read_integrity(checkpoint)
    except UserError as error:
        return [error.message.removeprefix(f"{checkpoint}{os.sep}")]
    problems = [f"{name} is no file that training writes" for name in strangers(checkpoint)]
    for name, (size, _) in recorded.items():
        path = checkpoint / name
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif path.stat().st_size != size:
            problems.append(f"{name}: {path.stat().st_size:,} bytes, {size:,} were written")
    if problems:
        return problems
    actual = describe(checkpoint, sorted(recorded)[rank::ranks])
    return [f"{name}: its content changed" for name, (_, digest) in actual.items() if digest != recorded[name][1]]
