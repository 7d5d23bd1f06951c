"""Preparing a blend: sources -> documents -> tokens -> `.bin/.idx`, in parallel, restartable, the same bytes every
time.

Each source is split into shards by its files alone. Worker processes turn shards into tokens; a shard is finished when
its record is renamed into place, so a killed run continues with the missing shards. When a source's shards are
complete they are joined in order, duplicates are dropped (the first stays) and the result is renamed into place.
`manifest.json` comes last.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from nemotron_h.core.errors import UserError
from nemotron_h.core.files import file_sha256, write_json
from nemotron_h.core.locks import locked
from nemotron_h.core.progress import StageProgress
from nemotron_h.core.strict import from_json
from nemotron_h.core.units import parse_count
from nemotron_h.core.worker_pool import worker_pool
from nemotron_h.data.blend import Blend
from nemotron_h.data.blend import Tokenizer as TokenizerSpec
from nemotron_h.data.chat import FAMILY_TEMPLATE, TOKENIZER_TEMPLATE, ChatTemplate, template_source
from nemotron_h.data.hf_tokenizer import template_of
from nemotron_h.data.images.store import FILES as IMAGE_FILES
from nemotron_h.data.images.store import files_changed
from nemotron_h.data.indexed import token_dtype
from nemotron_h.data.manifest import (
    FORMAT_VERSION,
    SPLITS,
    TEMPLATE,
    Manifest,
    SourceManifest,
    SplitManifest,
    TokenizerManifest,
    data_root,
    split_problem,
)
from nemotron_h.data.prepare import shards as sharding
from nemotron_h.data.prepare import sources as reading
from nemotron_h.data.prepare.fetch import fetch
from nemotron_h.data.prepare.hub_stream import origin
from nemotron_h.data.prepare.inputs import resolve_path
from nemotron_h.data.prepare.ready import adopt_split
from nemotron_h.data.source_plan import SourcePlan, no_document, plan_sources, saved_state
from nemotron_h.data.tokenizer import (
    META_FILE,
    Tokenizer,
    fingerprint,
    load_tokenizer,
    read_meta,
    train_bpe,
    write_meta,
)

PIPELINE_VERSION = 2  # part of every source's hash: raise it when the same inputs would give other tokens


def prepare(
    blend: Blend,
    root: str | Path | None = None,
    workers: int | None = None,
    force: bool = False,
    console: Console | None = None,
) -> Manifest:
    """Prepare a blend under `<root>/<blend.name>`; what is up to date is left alone.

    Args:
        blend: from `load_blend`.
        root: the data root; see `data_root`.
        workers: processes; the cores of this machine by default. The result does not depend on it.
        force: rebuild everything, the tokenizer included.
        console: where progress goes.

    Returns:
        The manifest, as written.

    Errors:
        UserError: bad input, no network, a full disk, or another preparation of the same folder under way.
    """
    folder, console = data_root(root) / blend.name, console or Console()
    try:
        with locked(folder, "prepared", "the blend's folder (--root)"):
            return _Preparation(blend, folder.resolve(), workers or os.cpu_count() or 1, console).run(force)
    except KeyboardInterrupt:
        console.print("\nctrl-c: the same command continues; finished shards are kept", highlight=False)
        raise
    except OSError as error:
        raise _system_error(error, folder) from error


def _system_error(error: OSError, folder: Path) -> UserError:
    """Name the file that the error is of; an error of writing has none, and all that is written is in the folder."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"the disk of {error.filename or folder} is full",
            "Free space and run the same command again: finished shards are kept, half-written ones redone.",
        )
    return UserError(
        f"{error.filename or f'preparing {folder}'}: {error.strerror or error}",
        "Clear the cause and run the same command again: finished shards are kept, half-written ones redone.",
    )


class _Preparation:
    def __init__(self, blend: Blend, folder: Path, workers: int, console: Console) -> None:
        self.blend, self.folder, self.workers, self.console = blend, folder, workers, console
        self.template = ""
        if blend.is_chat() and blend.chat_template != TOKENIZER_TEMPLATE:
            named = blend.chat_template
            self.template = template_source(named if named == FAMILY_TEMPLATE else resolve_path(blend, named))

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def run(self, force: bool) -> Manifest:
        plans = plan_sources(self.blend, self.folder / ".scans.json", self.say)
        tokenizer, trained = self._tokenizer(plans, force)
        self._check_template(tokenizer)
        sha256 = tokenizer.fingerprint()
        stale, entries = [], {}
        for plan in plans:
            plan.key = _hash(
                {
                    "version": [FORMAT_VERSION, PIPELINE_VERSION],
                    "text": plan.text_key(),
                    "tokenizer": sha256,
                    "validation": plan.source.validation,
                    "deduplicate": plan.source.deduplicate,
                    **({"chat_template": self.template} if plan.source.chat else {}),
                    **({"extend": dataclasses.asdict(plan.source.extend)} if plan.source.extend else {}),
                }
            )
            entry = None if force else self._finished(plan)
            if entry is None:
                stale.append(plan)
            else:
                entries[plan.name] = dataclasses.replace(
                    entry,
                    category=plan.source.category,
                    licence=plan.source.licence,
                    settings_hash=plan.source.settings_hash(),
                    origin=origin(plan.source),
                )
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            blend=self.blend.name,
            blend_hash=self.blend.hash(),
            tokenizer=TokenizerManifest(
                self.blend.tokenizer.kind,
                tokenizer.vocab_size,
                tokenizer.eod_id,
                sha256,
                "tokenizer",
                tokenizer.is_lossless(),
            ),
            sources={},
            folder=str(self.folder),
        )
        if not manifest.tokenizer.lossless:
            self.say(
                f"Warning: the {manifest.tokenizer.kind} tokenizer is lossy: decoding does not give back every text"
            )
        if stale or trained:
            (self.folder / "manifest.json").unlink(missing_ok=True)  # what is on disk no longer matches it
            entries |= self._build(stale, tokenizer, force)
        manifest.sources = {plan.name: entries[plan.name] for plan in plans}
        self._clean()
        if self.template:
            (self.folder / TEMPLATE).write_text(self.template, encoding="utf-8")
        manifest.save()
        self._report(manifest, [plan.name for plan in stale])
        return manifest

    def _check_template(self, tokenizer: Tokenizer) -> None:
        """Say where the template's markers are no single tokens; a text that is no template ends here."""
        if not self.blend.is_chat():
            return
        if self.blend.chat_template == TOKENIZER_TEMPLATE:
            self.template = template_of(self.folder / "tokenizer") or ""
            if not self.template:
                raise UserError(
                    "chat_template: tokenizer, but the blend's tokenizer has no chat template",
                    f"Name {FAMILY_TEMPLATE} (the family's), or the path of a Jinja file.",
                )
        plain = ChatTemplate(self.template, tokenizer).plain_markers
        if plain:
            self.say(f"Warning: the tokenizer has no {', '.join(plain)}: these markers are encoded as plain text")

    def _finished(self, plan: SourcePlan) -> SourceManifest | None:
        """Return the source's entry when it was prepared from just these inputs and its files are still in place."""
        content = saved_state(self.folder / plan.name / "source.json")
        content.pop("inputs", None)
        try:
            entry = from_json(SourceManifest, content)
        except UserError:
            return None
        probe = Manifest(FORMAT_VERSION, "", "", None, {plan.name: entry}, folder=str(self.folder))
        if entry.hash_of_inputs != plan.key or any(split_problem(probe, plan.name, split) for split in entry.splits):
            return None
        if plan.source.has_images() and files_changed(self.folder / plan.name / IMAGE_FILES):
            return None
        return entry

    # ---- the tokenizer

    def _tokenizer(self, plans: list[SourcePlan], force: bool) -> tuple[Tokenizer, bool]:
        """Return the blend's tokenizer, made or copied when absent or out of date, and whether that was needed."""
        spec, final = self.blend.tokenizer, self.folder / "tokenizer"
        if spec.is_trained():
            chosen = [
                p for p in plans if p.name in (spec.train_on or self.blend.sources) and p.source.format != "megatron"
            ]
            if not chosen:
                raise UserError(
                    "tokenizer: nothing to train on: every source is a ready .bin/.idx", "Give tokenizer.path."
                )
            content: dict[str, Any] = {"vocab_size": spec.vocab_size, "bytes": parse_count(spec.train_bytes)}
            content["train"] = {p.name: p.text_key() for p in chosen}
        else:
            files = self._tokenizer_files()
            content = {"files": [(name, file_sha256(path)) for name, path in files]}
            content |= {"special": spec.num_special_tokens, "pattern": spec.pattern}
        key = _hash({"version": PIPELINE_VERSION, "kind": spec.kind, **content})
        mark = self.folder / ".tokenizer.json"
        known = saved_state(mark)
        if not force and known.get("key") == key and fingerprint(final) == known.get("sha256"):
            return load_tokenizer(final), False
        staged = self.folder / ".tokenizer.tmp"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        if spec.is_trained():
            self.say(
                f"tokenizer: training a byte-level BPE of {spec.vocab_size:,} on {', '.join(p.name for p in chosen)}"
            )
            train_bpe(_training_texts(chosen, parse_count(spec.train_bytes)), spec.vocab_size, staged)
        else:
            _copy_tokenizer(spec, files, staged)
        load_tokenizer(staged)  # fails here when it is no tokenizer, before anything is replaced
        (self.folder / "manifest.json").unlink(missing_ok=True)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(staged, final)
        write_json(mark, {"key": key, "sha256": fingerprint(final)})
        return load_tokenizer(final), True

    def _tokenizer_files(self) -> list[tuple[str, Path]]:
        spec = self.blend.tokenizer
        if spec.fetch:
            return [(path.name, path) for _, path in fetch(spec.fetch, self.say)]
        if spec.blend:
            path = self.folder.parent / spec.blend / "tokenizer"
            if not (path / META_FILE).is_file():
                raise UserError(
                    f"tokenizer.blend: {spec.blend} has no tokenizer in {path}",
                    f"Run: nemotron-h data prepare --blend {spec.blend} --root {self.folder.parent}",
                )
            kind = read_meta(path)["kind"]
            if kind != spec.kind:
                raise UserError(f"tokenizer.kind: {spec.kind}, but the tokenizer of blend {spec.blend} is {kind}")
            return [(p.name, p) for p in sorted(path.iterdir()) if p.is_file()]
        path = Path(resolve_path(self.blend, spec.path))
        if path.is_file():
            return [(path.name, path)]
        weights = (".safetensors", ".bin", ".pt", ".gguf", ".h5")
        files = [p for p in sorted(path.glob("*")) if p.is_file() and p.suffix not in weights] if path.is_dir() else []
        if not files:
            raise UserError(f"tokenizer.path: there is no {path}", f"Edit it in {self.blend.path}.")
        return [(p.name, p) for p in files]

    # ---- building

    def _build(self, stale: list[SourcePlan], tokenizer: Tokenizer, force: bool) -> dict[str, SourceManifest]:
        entries = {}
        for plan in stale:
            if plan.source.format == "megatron":
                entries[plan.name] = self._adopt(plan, tokenizer)
        plans = [plan for plan in stale if plan.source.format != "megatron"]
        if not plans:
            return entries
        dtype = token_dtype(tokenizer.vocab_size)
        self._check_space(plans, dtype)
        jobs = {}
        for plan in plans:
            work = self._work_folder(plan)
            for old in work.parent.glob(".build-*"):
                if old != work or force:
                    shutil.rmtree(old)
            work.mkdir(parents=True, exist_ok=True)
            jobs[plan.name] = [
                sharding.ShardJob(plan.source, pieces, str(work / f"shard-{number:06d}"), dtype.name)
                for number, pieces in enumerate(plan.shards)
            ]
        return entries | self._run_jobs({plan.name: plan for plan in plans}, jobs)

    def _work_folder(self, plan: SourcePlan) -> Path:
        return self.folder / plan.name / f".build-{plan.key[:16]}"

    def _run_jobs(
        self, plans: dict[str, SourcePlan], jobs: dict[str, list[sharding.ShardJob]]
    ) -> dict[str, SourceManifest]:
        """Run all shards of all sources through one pool; a source is joined as soon as its last shard is done."""
        entries: dict[str, SourceManifest] = {}
        records: dict[str, dict[int, sharding.ShardRecord]] = {name: {} for name in plans}
        pending: dict[Future, tuple[str, int | None]] = {}  # None: the joining of a source
        queue = iter([(name, number) for name in plans for number in range(len(jobs[name]))])
        sizes = {name: sum(s.size for s in plan.scans) / max(1, len(jobs[name])) for name, plan in plans.items()}

        def shard_done(name: str, number: int, record: sharding.ShardRecord) -> None:
            records[name][number] = record
            progress.advance(sizes[name], name)
            if len(records[name]) == len(jobs[name]):
                prefixes = [job.prefix for job in jobs[name]]
                _check_bad(plans[name], list(records[name].values()), prefixes)
                job = sharding.MergeJob(plans[name].source, prefixes, str(self.folder / name), jobs[name][0].dtype)
                pending[pool.submit(sharding.merge_shards, job)] = (name, None)

        total = sum(sizes[name] * len(jobs[name]) for name in plans)
        own = (str(self.folder / "tokenizer"), self.template)
        with (
            StageProgress(self.console, "preparing", total, "bytes") as progress,
            worker_pool(self.workers, sharding.start_worker, own, "finished shards are kept", "--workers") as pool,
        ):
            while True:
                while len(pending) < 2 * self.workers and (item := next(queue, None)):
                    name, number = item
                    record = sharding.finished_shard(jobs[name][number].prefix)
                    if record is None:
                        pending[pool.submit(sharding.build_shard, jobs[name][number])] = item
                    else:
                        shard_done(name, number, record)
                if not pending:
                    return entries
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    name, number = pending.pop(future)
                    if number is not None:
                        shard_done(name, number, future.result())
                        continue
                    merged = future.result()
                    entries[name] = self._finish_source(plans[name], merged)
                    progress.say(_summary(name, entries[name]))
                    if merged["unread"]:
                        progress.say(f"{name}: {_unread(merged['unread'])}")

    def _finish_source(self, plan: SourcePlan, merged: dict[str, Any]) -> SourceManifest:
        """Rename the joined files into place; the source's record goes first and comes back last."""
        folder = self.folder / plan.name
        if "train" not in merged["splits"]:
            raise no_document(plan)
        (folder / "source.json").unlink(missing_ok=True)
        for split in SPLITS:
            for suffix in (".bin", ".idx", *sharding.beside_tokens(plan.source)):
                if split in merged["splits"]:
                    os.replace(folder / f".{split}.tmp{suffix}", folder / f"{split}{suffix}")
                else:
                    (folder / f"{split}{suffix}").unlink(missing_ok=True)
        for path in folder.glob(".*.jsonl.tmp"):
            os.replace(path, folder / path.name[1:].removesuffix(".tmp"))
        entry = SourceManifest(
            category=plan.source.category,
            licence=plan.source.licence,
            hash_of_inputs=plan.key,
            splits={s: SplitManifest(prefix=f"{plan.name}/{s}", **content) for s, content in merged["splits"].items()},
            duplicates_dropped=merged["duplicates"],
            empty_dropped=merged["empty"],
            quarantined=merged["bad"],
            settings_hash=plan.source.settings_hash(),
            origin=origin(plan.source),
        )
        inputs = {i.name: s.sha256 for i, s in zip(plan.inputs, plan.scans, strict=True)}
        write_json(folder / "source.json", dataclasses.asdict(entry) | {"inputs": inputs})
        shutil.rmtree(self._work_folder(plan))
        return entry

    def _adopt(self, plan: SourcePlan, tokenizer: Tokenizer) -> SourceManifest:
        """Take a ready `.bin/.idx` as it is."""
        source = plan.source
        written = {"train": source.paths()[0], "validation": source.validation_path}
        splits = {}
        for split, path in written.items():
            if path:
                prefix = resolve_path(self.blend, path)
                self.say(f"{plan.name}: checking {prefix}.bin")
                splits[split] = adopt_split(f"sources.{plan.name}", prefix, tokenizer)
        entry = SourceManifest(source.category, source.licence, plan.key, splits, settings_hash=source.settings_hash())
        (self.folder / plan.name).mkdir(exist_ok=True)
        write_json(self.folder / plan.name / "source.json", dataclasses.asdict(entry) | {"inputs": {}})
        return entry

    def _clean(self) -> None:
        """Remove what killed runs left: all working files have names that begin with a dot."""
        left = [p for name in self.blend.sources for p in (self.folder / name).glob(".*")] + [
            *self.folder.glob(".*.tmp")
        ]
        for path in left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _check_space(self, plans: list[SourcePlan], dtype: np.dtype) -> None:
        # ours: 3 bytes of text per token; the shards and the joined files of one source exist at the same time
        sizes = [plan.text_bytes() for plan in plans]
        needed = int((sum(sizes) + max(sizes)) / 3 * dtype.itemsize)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise UserError(
                f"{self.folder}: about {needed / 1e9:.3g} GB are needed and {free / 1e9:.3g} GB are free",
                "Free space, or give another --root.",
            )

    def _report(self, manifest: Manifest, rebuilt: list[str]) -> None:
        tokens = sum(manifest.tokens().values())
        kept = len(manifest.sources) - len(rebuilt)
        state = (
            "up to date" if not rebuilt else f"built {', '.join(rebuilt)}" + (f"; {kept} up to date" if kept else "")
        )
        self.say(f"{self.folder}: {state}; {tokens:,} training tokens in {len(manifest.sources)} sources")
        for path in sorted(p for p in self.folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
            if path.name != "tokenizer" and path.name not in manifest.sources:
                self.say(f"Note: {path} belongs to no source of this blend; delete it if it is not needed.")


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _unread(fields: dict[str, int]) -> str:
    counts = ", ".join(f"{key} ({count:,} messages)" for key, count in sorted(fields.items(), key=lambda f: -f[1]))
    return f"fields of messages that are not read: {counts}"


def _check_bad(plan: SourcePlan, records: list[sharding.ShardRecord], prefixes: list[str]) -> None:
    """Stop when more of a source is unreadable than its `max_bad` allows: most often a wrong field or format."""
    bad = sum(r.bad for r in records)
    total = bad + sum(r.empty + r.joined + sum(r.documents.values()) for r in records)
    if bad <= plan.source.max_bad * total:
        return
    quarantined = (line for prefix in prefixes for line in Path(prefix + ".bad").read_bytes().splitlines())
    first = reading.Bad(**json.loads(next(quarantined)))
    hint = f"Check format and {'chat' if plan.source.chat else 'text_fields'}, or raise max_bad."
    if "the template" in first.reason:
        hint = "Name a chat_template that writes such conversations, or take them out of the files."
    elif first.reason.startswith("image "):
        hint = "Check `images`, the folder that their paths start at; or raise max_bad."
    raise UserError(
        f"sources.{plan.name}: {bad:,} of {total:,} records cannot be read (max_bad is {plan.source.max_bad:.2%})\n"
        f"  the first: {first.file}, {first.position}: {first.reason}",
        hint,
    )


def _training_texts(plans: list[SourcePlan], limit: int) -> Iterator[str]:
    """Yield the first `limit` bytes of text of each source, in order."""
    for plan in plans:
        left = limit
        for pieces in plan.shards:
            for item in reading.read_documents(plan.source, pieces):
                if left <= 0:
                    break
                if isinstance(item, reading.Document):
                    text = "\n".join(item.parts())
                    yield text
                    left -= len(text.encode())


def _copy_tokenizer(spec: TokenizerSpec, files: list[tuple[str, Path]], target: Path) -> None:
    """Put a given tokenizer's files into the prepared folder, which so stands on its own."""
    if spec.blend:  # prepared already
        for name, path in files:
            shutil.copyfile(path, target / name)
        return
    if spec.kind in ("tiktoken", "sentencepiece") and len(files) != 1:
        raise UserError(f"tokenizer: kind {spec.kind} is one file, not {', '.join(name for name, _ in files)}")
    for name, path in files:
        shutil.copyfile(path, target / name)
    meta = {"file": files[0][0]} if spec.kind in ("tiktoken", "sentencepiece") else {}
    if spec.kind == "tiktoken":
        meta |= {"num_special_tokens": spec.num_special_tokens, "pattern": spec.pattern}
    write_meta(target, spec.kind, **meta)


def _summary(name: str, entry: SourceManifest) -> str:
    parts = [f"{s.documents:,} documents, {s.tokens:,} tokens ({split})" for split, s in entry.splits.items()]
    counts = {
        "duplicates dropped": entry.duplicates_dropped,
        "empty": entry.empty_dropped,
        "quarantined": entry.quarantined,
        "images": sum(s.images for s in entry.splits.values()),
    }
    return f"{name}: " + ", ".join(parts + [f"{count:,} {what}" for what, count in counts.items() if count])
