"""Checkpoint folders of a run: which are finished, which are whole, which is the newest. Imports no torch.

<run>/checkpoints/step-000100/            weights/, context/, run.json, integrity.json
<run>/checkpoints/step-000100-unfinished  marks one that is being written
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

INTEGRITY = "integrity.json"
RECORD = "run.json"
_STEP = re.compile(r"step-(\d+)$")


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint folder's name; -1 for other folders."""
    found = _STEP.search(checkpoint.name)
    return int(found.group(1)) if found else -1


def finished(run_dir: Path) -> list[Path]:
    """Checkpoints that were written to the end, newest first."""
    folder = run_dir / "checkpoints"
    found = [p for p in folder.glob("step-*") if p.is_dir() and step_of(p) >= 0]
    complete = [p for p in found if not p.with_name(p.name + "-unfinished").exists() and (p / INTEGRITY).is_file()]
    return sorted(complete, key=step_of, reverse=True)


def sha256(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file) -> str:
    digest = hashlib.sha256()
    while piece := file.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()


def describe(checkpoint: Path, files: Iterable[Path]) -> dict[str, list]:
    """Name -> [bytes, sha256] of files of a checkpoint."""
    paths = list(files)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        digests = list(pool.map(sha256, paths))
    return {
        str(path.relative_to(checkpoint)): [path.stat().st_size, digest]
        for path, digest in zip(paths, digests, strict=True)
    }


def content(checkpoint: Path) -> list[Path]:
    """Every file of a checkpoint that integrity covers."""
    return sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != INTEGRITY)


def write_integrity(checkpoint: Path) -> None:
    """Record size and sha256 of every file; written last, so its absence means an unfinished checkpoint."""
    described = describe(checkpoint, content(checkpoint))
    temporary = checkpoint / (INTEGRITY + ".tmp")
    temporary.write_text(json.dumps(described, indent=1, sort_keys=True))
    temporary.replace(checkpoint / INTEGRITY)


def damage(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint, one line a file; empty when it is whole."""
    try:
        recorded = json.loads((checkpoint / INTEGRITY).read_text())
    except (OSError, ValueError) as error:
        return [f"{INTEGRITY}: {error}"]
    problems = []
    for name, (size, _) in recorded.items():
        path = checkpoint / name
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif path.stat().st_size != size:
            problems.append(f"{name}: {path.stat().st_size:,} bytes, {size:,} were written")
    if problems:
        return problems
    actual = describe(checkpoint, [checkpoint / name for name in recorded])
    return [f"{name}: its content changed" for name in recorded if actual[name][1] != recorded[name][1]]
