"""A cache of a teacher's logits on disk: what it was written for, how large it is, and whether a run may use it.

    FOLDER/cache.json                         `Header`: teacher, data and their order, how many tokens are kept
    FOLDER/{train,validation}-000000.safetensors  the windows of the run in its order, `shard_windows` a file
    FOLDER/recipe.yaml                        the recipe, where several processes wrote it

Files are renamed into place when they are whole. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_h.core.errors import UserError
from nemotron_h.core.files import read_json_object, write_json
from nemotron_h.data.feed.phase_plan import DataPlan, compare
from nemotron_h.planning.teacher_logits import ids_dtype, token_bytes, value_dtype

FORMAT = 2
HEADER = "cache.json"
SPLITS = ("train", "validation")
#: of the number that tells a window's text from others
TEXT_BYTES = 8
#: ours: a file is at most about so large, and at most this part of the run: what an interruption may lose
SHARD_BYTES, SHARDS = 128 << 20, 20


@dataclass(frozen=True)
class Header:
    """Teacher, data and settings that a cache was written for.

    Attributes:
        teacher: `checkpoint`, `model` and `weights` (a hash over its files), as in the record of a run.
        plan: of the data's order (`DataPlan`): blend and its hash, seed, seq_length, global_batch_size, texts, phases.
        validation: source -> sha256 of its validation text.
        document_reset: as in the recipe: whether the teacher's states started anew at documents.
        top_k: how many logits of each token are kept; None is all of them, in the order of the vocabulary.
        vocabulary: words with what pads them, which depends on tensor parallelism.
        precision: the recipe's, that the teacher ran in.
        steps: training windows are those of the first so many steps.
        validation_windows: how many.
        shard_windows: of a file; the last one may have less.
    """

    teacher: dict[str, Any]
    plan: dict[str, Any]
    validation: dict[str, str]
    document_reset: bool
    top_k: int | None
    vocabulary: int
    precision: str
    steps: int
    validation_windows: int
    shard_windows: int = 0

    @property
    def seq_length(self) -> int:
        """Return the tokens of a window."""
        return self.plan["seq_length"]

    def windows(self, split: str) -> int:
        """Return the number of windows of a split."""
        return self.validation_windows if split == "validation" else self.steps * self.plan["global_batch_size"]

    def shards(self, split: str) -> dict[int, range]:
        """Return number of a file -> the windows in it."""
        size, end = self.shard_windows, self.windows(split)
        return {n: range(n * size, min((n + 1) * size, end)) for n in range(math.ceil(end / size))}

    @property
    def window_bytes(self) -> int:
        """Return the bytes on disk of a window, without `TEXT_BYTES`."""
        return self.seq_length * token_bytes(self.top_k, self.vocabulary, self.precision)

    def sized(self) -> Header:
        """Return the header with files of whole steps."""
        batch = self.plan["global_batch_size"]
        steps = min(SHARD_BYTES // (batch * self.window_bytes), self.steps // SHARDS)
        return dataclasses.replace(self, shard_windows=max(1, steps) * batch)

    def as_dict(self) -> dict[str, Any]:
        """Return plain containers, with what follows from the values, for other readers."""
        kept = {"values": value_dtype(self.precision), "logsumexp": "float32"}
        if self.top_k is not None:
            kept["ids"] = ids_dtype(self.vocabulary)
        return {"format": FORMAT, **dataclasses.asdict(self), "dtypes": kept}


def shard_path(folder: Path, split: str, number: int) -> Path:
    """Return the path of a file of windows."""
    return folder / f"{split}-{number:06d}.safetensors"


def missing(folder: Path, header: Header) -> list[tuple[str, int]]:
    """Return the files that are not there whole: split and number."""
    found = []
    for split in SPLITS:
        for number, windows in header.shards(split).items():
            if not _is_whole(shard_path(folder, split, number), len(windows) * (header.window_bytes + TEXT_BYTES)):
                found.append((split, number))
    return found


def _is_whole(path: Path, content: int) -> bool:
    """Tell whether a safetensors file has so many bytes of tensors. Its first 8 bytes are the length of its header."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        described = int.from_bytes(file.read(8), "little")
    return path.stat().st_size == 8 + described + content


def read_header(folder: Path) -> Header:
    """Read what the cache in a folder was written for.

    Errors:
        UserError: there is none, or it is not readable.
    """
    path = folder / HEADER
    write = "write it: nemotron-h distill-cache RECIPE distill.teacher_logits=DIR"
    if not path.is_file():
        raise UserError(f"distill.teacher_logits: there is no cache in {folder}", hint=write)
    try:
        content = read_json_object(path)
        if content.pop("format") != FORMAT:
            raise ValueError("it is of another version of this project")
        content.pop("dtypes")
        return Header(**content)
    except (UserError, ValueError, TypeError, KeyError) as error:
        hint = f"remove the folder, and {write}"
        raise UserError(f"distill.teacher_logits: {path} is not readable: {error}", hint=hint) from error


def write_header(folder: Path, header: Header) -> None:
    """Write `cache.json`, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / HEADER, header.as_dict())


def differences(held: Header, wanted: Header) -> list[str]:
    """Return why a cache cannot serve a run: one line for each key, as it was -> as it is."""
    lines = []
    if wanted.teacher and held.teacher["weights"] != wanted.teacher["weights"]:
        lines.append(f"distill.teacher: {held.teacher['checkpoint']} -> {wanted.teacher['checkpoint']}")
    # a longer run may share its beginning
    steps = min(held.steps, wanted.steps)
    changed, _ = compare(DataPlan.from_dict(held.plan), DataPlan.from_dict(wanted.plan), steps)
    lines += [f"data.{line}" if line.split(":")[0] in held.plan else f"data.blend: {line}" for line in changed]
    lines += [
        f"data.blend: source {name}: other validation text"
        for name in sorted(held.validation.keys() | wanted.validation.keys())
        if held.validation.get(name) != wanted.validation.get(name)
    ]
    if held.document_reset != wanted.document_reset:
        lines.append(f"data.document_reset: {held.document_reset} -> {wanted.document_reset}")
    if held.top_k is not None and (wanted.top_k is None or wanted.top_k > held.top_k):
        lines.append(f"distill.top_k: {held.top_k} -> {wanted.top_k or 'null (all tokens)'}")
    if held.vocabulary != wanted.vocabulary:
        lines.append(f"parallel.tensor: the vocabulary is padded to {held.vocabulary:,} words -> {wanted.vocabulary:,}")
    return lines


def check_fits(folder: Path, held: Header, wanted: Header) -> None:
    """Refuse a cache of other data or another teacher.

    Errors:
        UserError: names the keys, as they were when it was written -> as they are.
    """
    lines = differences(held, wanted)
    if lines:
        raise UserError(
            f"distill.teacher_logits: the cache in {folder} was written for another run: {'; '.join(lines)}",
            hint="restore these keys, or write a cache of this run: nemotron-h distill-cache RECIPE "
            "distill.teacher_logits=ANOTHER_DIR",
        )


def check_complete(folder: Path, held: Header, wanted: Header) -> None:
    """Refuse a cache that has not all windows of a run.

    Errors:
        UserError: names how much there is.
    """
    problems = []
    for split in SPLITS:
        if held.windows(split) < wanted.windows(split):
            problems.append(f"{held.windows(split):,} of {wanted.windows(split):,} windows of {split}")
    absent = missing(folder, held)
    if absent:
        problems.append(f"{len(absent):,} files are missing or cut off, {shard_path(folder, *absent[0]).name} first")
    if problems:
        raise UserError(
            f"distill.teacher_logits: the cache in {folder} is not complete: {'; '.join(problems)}",
            hint="nemotron-h distill-cache RECIPE goes on where it was interrupted",
        )
