"""The sources of a blend as they are now: their files, hashed, split into shards, and what decides their documents."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemotron_h.core.errors import UserError
from nemotron_h.core.files import read_json_object, write_json
from nemotron_h.data.blend import Blend, Source
from nemotron_h.data.prepare import sources as reading
from nemotron_h.data.prepare.hub_stream import check
from nemotron_h.data.prepare.inputs import Input, compression, find_inputs

#: how much text a byte of such a file holds, for the space check. Ours
_COMPRESSED = {".gz": 4, ".bz2": 5, ".xz": 5, ".zst": 5}
_PARQUET = 3
_ARCHIVE = 2  # images are copied: as much as so much text comes to as tokens


@dataclass
class SourcePlan:
    """A source as it is now: its files, their scans, and the hash that decides whether it is up to date."""

    name: str
    source: Source
    inputs: list[Input]
    scans: list[reading.Scan]
    key: str = ""
    shards: list[list[reading.Piece]] = field(default_factory=list)

    def text_bytes(self) -> int:
        """Return about how many bytes of text the files hold."""
        factor = {"parquet": _PARQUET, "webdataset": _ARCHIVE}.get(self.source.format)
        factors = [factor or _COMPRESSED.get(compression(i.path), 1) for i in self.inputs]
        return sum(factor * s.size for factor, s in zip(factors, self.scans, strict=True))

    def text_key(self) -> dict[str, Any]:
        """Return what decides the documents of the source, before any tokenizer."""
        source = self.source
        settings = {k: getattr(source, k) for k in ("format", "text_fields", "join", "split_on")}
        settings |= {k: getattr(source, k) for k in ("chat", "images", "prompts") if getattr(source, k)}
        return {"inputs": [(i.name, s.sha256) for i, s in zip(self.inputs, self.scans, strict=True)], **settings}


def plan_sources(blend: Blend, cache_file: Path, say: Callable[[str], None]) -> list[SourcePlan]:
    """Find and hash the inputs; files whose size and time did not change since the last run are not read again.

    Args:
        cache_file: keeps the hashes from run to run.
        say: is told what is fetched and what is left out.
    Errors:
        UserError: a path matches nothing, a fetch fails, or a source holds no document.
    """
    cache = saved_state(cache_file)
    inputs = _find_all(blend, say)
    plans = [SourcePlan(name, source, inputs[name], []) for name, source in blend.sources.items()]
    jobs = [
        (item.path, reading.is_line_based(plan.source, item.path))
        for plan in plans
        for item in plan.inputs
        if plan.source.format != "megatron"
    ]
    fresh: dict[str, Any] = {}
    todo = []
    for path, line_based in jobs:
        status = os.stat(path)
        stamp = [status.st_size, status.st_mtime_ns, line_based]
        known = cache.get(path)
        if isinstance(known, dict) and known.get("stamp") == stamp:
            fresh[path] = known
        else:
            todo.append((path, line_based, stamp))
    for path, line_based, stamp in todo:
        fresh[path] = {"stamp": stamp, "scan": dataclasses.asdict(reading.scan(path, line_based))}
    if todo:
        write_json(cache_file, fresh)
    for plan in plans:
        if plan.source.format == "megatron":
            plan.scans = [_stamp(i.path) for i in plan.inputs]
            continue
        for item in plan.inputs:
            content = fresh[item.path]["scan"]
            plan.scans.append(reading.Scan(content["size"], content["sha256"], tuple(map(tuple, content["cuts"]))))
        plan.shards = reading.plan_shards(plan.source, plan.inputs, plan.scans)
        if not plan.shards or not any(scan.size for scan in plan.scans):
            raise no_document(plan)
    return plans


def _find_all(blend: Blend, say: Callable[[str], None]) -> dict[str, list[Input]]:
    """Return the files of every source; local ones are looked for first, so that all missing paths are named before
    anything is downloaded.
    """
    files, problems, checked = {}, [], False
    for name, source in sorted(blend.sources.items(), key=lambda item: item[1].fetch is not None):
        if source.fetch:
            if problems:
                break
            if not checked:
                check(blend, say)
                checked = True
            say(f"{name}: {source.fetch.title()}, licence: {source.licence or 'not stated'}")
        try:
            files[name] = find_inputs(blend, name, lambda text, name=name: say(f"{name}: {text}"))
        except UserError as error:
            if source.fetch:
                raise
            problems.append(error)
    if problems:
        raise UserError("\n".join(p.message for p in problems), problems[0].hint)
    readers: dict[str, str] = {}
    for name, inputs in files.items():
        for item in inputs:
            other = readers.setdefault(os.path.realpath(item.path), name)
            if other != name:
                say(f"Note: sources {other} and {name} both read {item.path}")
                break
    return files


def saved_state(path: Path) -> dict[str, Any]:
    """Return what an earlier preparation left in a file; nothing where that is not there or damaged."""
    try:
        return read_json_object(path)
    except UserError:
        return {}


def _stamp(path: str) -> reading.Scan:
    """Return size and time in place of a hash, for ready files too large to read at every start."""
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}", "A ready .bin/.idx is named by its path without the suffix.") from error
    return reading.Scan(status.st_size, f"{path}:{status.st_size}:{status.st_mtime_ns}", ())


def no_document(plan: SourcePlan) -> UserError:
    """Return the error of a source that has nothing to train on."""
    return UserError(
        f"sources.{plan.name}: no document to train on in {len(plan.inputs):,} files, such as {plan.inputs[0].path}",
        "Give the source other files in its path, or take it out of the blend.",
    )
