"""Data sets of the Hugging Face Hub, streamed into the cache as JSON lines: as much of them as a blend asks for.

Layout: `<cache>/hub/<name>-<hash of the fetch>/part-000000.jsonl`, ..., and `state.json`: the commit, the finished
parts, and where the stream goes on. A part counts once it is in `state.json`, so a killed preparation goes on with the
part that it was in. What ends a part is the records alone, so the parts are those of a preparation that was not killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotron_h.core import hub
from nemotron_h.core.errors import UserError
from nemotron_h.core.files import read_json_object, whole_file, write_json
from nemotron_h.core.hub import Repository
from nemotron_h.core.locks import locked
from nemotron_h.core.strict import nearest
from nemotron_h.core.units import duration, parse_count
from nemotron_h.data.blend import Blend, Source
from nemotron_h.data.blend_files import available_blends
from nemotron_h.data.fetch_spec import HUB
from nemotron_h.data.prepare.fetch import CACHE_VARIABLE, cache_folder

if TYPE_CHECKING:
    from datasets import DatasetBuilder, IterableDataset

PART_BYTES = 64 << 20  # ours: about what a killed preparation reads again
_EVERY_S = 10
_STATE = "state.json"


def stream(blend: Blend, name: str, say: Callable[[str], None]) -> list[tuple[str, Path]]:
    """Stream a source's data set into the cache, unless all of it is there.

    Args:
        blend: whose source it is.
        name: of the source.
        say: is told of the progress.
    Returns:
        (name with the commit, path of a file of JSON lines), in order.
    Errors:
        UserError: the revision is not pinned, or not there; an unknown configuration, split or column; no access; no
            network; the server fails; another process streams it.
    """
    source = blend.sources[name]
    fetch, folder = source.fetch, _folder(source)
    repository = _repository(blend, name)
    with locked(folder, "filled", repository.key):
        state = _state(folder)
        if not state.get("complete"):
            state = _Stream(source, repository, folder, say).run(state)
        return [(f"{fetch.repo}@{state['commit']}/{_part(i)}", folder / _part(i)) for i in range(len(state["parts"]))]


def check(blend: Blend, say: Callable[[str], None]) -> None:
    """Ask the Hub for the revisions, configurations, splits and columns of all sources that are not in the cache yet.

    Errors:
        UserError: as of `stream`.
    """
    for name, source in blend.sources.items():
        if source.fetch is not None and source.fetch.kind == HUB and not _state(_folder(source)).get("complete"):
            _Stream(source, _repository(blend, name), _folder(source), say).check()


def _repository(blend: Blend, name: str) -> Repository:
    """Return the pinned repository of a source.

    Errors:
        UserError: it is not pinned.
    """
    fetch = blend.sources[name].fetch
    repository = Repository(fetch.repo, fetch.revision, "dataset", f"{blend.path}: sources.{name}.fetch")
    if fetch.revision == hub.UNPINNED:
        path = Path(blend.path)
        shipped = path in {file.resolve() for file in available_blends().values()}
        what = f"{path.stem} --out my_{path.stem}.yaml" if shipped else path
        raise UserError(
            f"{repository.key}.revision: {fetch.repo} is not pinned",
            f"Write the commit that is the newest now: nemotron-h data pin {what}",
        )
    return repository


def origin(source: Source) -> str:
    """Return the repository, commit, configuration and split that a source was streamed from; empty for others."""
    if source.fetch is None or source.fetch.kind != HUB:
        return ""
    fetch = source.fetch
    words = [f"{fetch.repo}@{_state(_folder(source))['commit']}", f"config {fetch.config}" if fetch.config else ""]
    return ", ".join(word for word in [*words, f"split {fetch.split}"] if word)


def _columns(source: Source) -> dict[str, str]:
    """Return field of the records -> column; empty for all columns."""
    if source.fetch.columns or source.chat:
        return source.fetch.columns
    return {key: key for key in dict.fromkeys(field.split(".")[0] for field in source.text_fields)}


def _folder(source: Source) -> Path:
    content = json.dumps([source.fetch.content(), _columns(source)], sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    return cache_folder() / "hub" / f"{source.fetch.repo.replace('/', '--')}-{digest}"


def _part(number: int) -> str:
    return f"part-{number:06d}.jsonl"


def _state(folder: Path) -> dict[str, Any]:
    """Return what an earlier preparation left; nothing where a part of it was lost."""
    with contextlib.suppress(UserError, OSError, KeyError, TypeError):
        state = read_json_object(folder / _STATE)
        sizes = [os.path.getsize(folder / _part(i)) for i in range(len(state["parts"]))]
        if sizes == [part["bytes"] for part in state["parts"]] and hub.is_commit(state["commit"]):
            return state
    return {}


class _Stream:
    def __init__(self, source: Source, repository: Repository, folder: Path, say: Callable[[str], None]) -> None:
        self.fetch, self.columns, self.repository = source.fetch, _columns(source), repository
        self.folder, self.say = folder, say
        limits = (self.fetch.max_documents, self.fetch.max_bytes)
        self.most_documents, self.most_bytes = (None if limit is None else parse_count(limit) for limit in limits)
        self.state: dict[str, Any] = {}

    def check(self) -> None:
        """Open the stream and read nothing of it."""
        self._library()
        self.state = {"commit": hub.commit_of(self.repository, self.say)}
        hub.patiently(lambda: self._explained(self._open), self.repository, self.say)

    def _library(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise hub.missing_package(self.repository.key, "datasets") from error
        return datasets

    def run(self, state: dict[str, Any]) -> dict[str, Any]:
        """Stream what is missing and return the final state."""
        datasets = self._library()
        commit = hub.commit_of(self.repository, self.say)
        if state and (state["commit"], state["datasets"]) != (commit, datasets.__version__):
            self.say("begins anew: the tag was moved, or another version of datasets counts its place in another way")
            state = {}
        for old in self.folder.glob(".part-*" if state else "*part-*"):  # the part of a process that was killed; or all
            old.unlink()
        if not state:
            state = {"commit": commit, "datasets": datasets.__version__, "parts": [], "next": None, "complete": False}
        self.state = state
        self._check_space()

        def parts() -> int:
            return len(self.state["parts"])

        hub.patiently(lambda: self._explained(self._fill), self.repository, self.say, parts)
        documents, size = _amount(self.state["parts"])
        self.say(f"{documents:,} documents, {size / 1e6:,.1f} MB in {self.folder}")
        return self.state

    def _check_space(self) -> None:
        needed = 0 if self.most_bytes is None else self.most_bytes - _amount(self.state["parts"])[1]
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise UserError(
                f"{self.repository.key}: max_bytes asks for {needed / 1e9:,.3g} GB more, {self.folder} has "
                f"{free / 1e9:,.3g} GB free",
                f"Free space, lower max_bytes, or set {CACHE_VARIABLE} to a folder on another disk.",
            )

    def _explained(self, do: Callable[[], Any]) -> None:
        """Run a step, and explain what the library says of files that it cannot read."""
        try:
            do()
        except (UserError, OSError):
            raise
        except Exception as error:
            if hub.is_passing(error) or hub.hub_error(error, self.repository):
                raise
            raise UserError(
                f"{self.repository}: cannot be read: {type(error).__name__}: {_first_line(error)}",
                "Its files do not fit together. Name those that do in `files`, or download them and give `path`.",
            ) from error

    # ---- opening

    def _open(self) -> tuple[IterableDataset, int | None]:
        """Return the stream of the chosen columns, and the number of records where the data set states it."""
        builder = self._builder(self.state["commit"])
        splits = {str(split): files for split, files in (builder.config.data_files or {}).items()}
        if self.fetch.split not in splits:
            raise UserError(
                f"{self.repository.key}.split: {self.fetch.repo} has no split {self.fetch.split!r}",
                f"{nearest(self.fetch.split, splits)}Its splits: {', '.join(splits)}.",
            )
        stated = (builder.info.splits or {}).get(self.fetch.split)
        total = None if stated is None or self.fetch.files else stated.num_examples
        dataset = builder.as_streaming_dataset(split=self.fetch.split)
        if not self.columns:
            return dataset, total
        known = list(dataset.features or next(iter(dataset), {}))
        missing = sorted(set(self.columns.values()) - set(known))
        if missing:
            key = (
                f"{self.repository.key}.columns"
                if self.fetch.columns
                else self.repository.key.replace(".fetch", ".text_fields")
            )
            raise UserError(
                f"{key}: {self.fetch.repo} has no column {', '.join(missing)}",
                f"{nearest(missing[0], known)}Its columns: {', '.join(known)}. "
                "Write fetch.columns: {field: column} where they have other names.",
            )
        chosen = list(dict.fromkeys(self.columns.values()))
        if hasattr(builder.config, "columns"):  # Parquet: then others are not downloaded
            builder.config.columns = chosen
            dataset = builder.as_streaming_dataset(split=self.fetch.split)
        return dataset.select_columns(chosen), total

    def _builder(self, commit: str) -> DatasetBuilder:
        import datasets

        fetch = self.fetch
        if Path(fetch.repo).exists():
            raise UserError(
                f"{self.repository.key}.repo: there is a folder {fetch.repo} here, which would be read instead",
                "Run the command from another folder.",
            )
        known = {"revision": commit, "token": hub.token()}
        files = {fetch.split: fetch.files} if fetch.files else None
        try:
            return datasets.load_dataset_builder(fetch.repo, fetch.config or None, data_files=files, **known)
        except FileNotFoundError as error:
            if hub.is_passing(error) or hub.hub_error(error, self.repository):
                raise
            wanted = f"matches {', '.join(fetch.files)}" if fetch.files else "can be read as a data set"
            raise UserError(
                f"{self.repository}: no file {wanted}", f"Look at {hub.page(self.repository)}/tree/{commit}."
            ) from error
        except ValueError as error:
            configs = datasets.get_dataset_config_names(fetch.repo, **known)
            if fetch.config in configs or (not fetch.config and len(configs) == 1):
                raise
            has = f"has no configuration {fetch.config!r}" if fetch.config else "has several configurations"
            raise UserError(
                f"{self.repository.key}.config: {fetch.repo} {has}",
                f"{nearest(fetch.config, configs)}Its configurations: {', '.join(configs)}.",
            ) from error

    # ---- reading

    def _fill(self) -> None:
        """Write part after part from where the state says; it is brought up to date after each."""
        stream, total = self._open()
        if self.state["next"] is not None:
            stream.load_state_dict(self.state["next"])
        self.progress = _Progress(self, total)
        rows = iter(stream)
        while not self.state["complete"]:
            self._write_part(rows)
            if not self.state["complete"]:
                self.state["next"] = stream.state_dict()
            write_json(self.folder / _STATE, self.state)

    def _write_part(self, rows: Iterator[dict[str, Any]]) -> None:
        parts = self.state["parts"]
        before, number = _amount(parts), len(parts)
        documents = size = 0
        complete = False
        with whole_file(self.folder / _part(number)) as temporary, temporary.open("wb") as out:
            while not complete and size < PART_BYTES:
                row = next(rows, None)
                if row is None:
                    complete = True
                    break
                line = self._line(row)
                out.write(line)
                documents, size = documents + 1, size + len(line)
                complete = self._enough(before[0] + documents, before[1] + size)
                self.progress.show(before[0] + documents, before[1] + size)
        part = [{"documents": documents, "bytes": size}] if documents or not number else []
        self.state = {**self.state, "parts": parts + part, "next": None, "complete": complete}

    def _enough(self, documents: int, size: int) -> bool:
        return (self.most_documents is not None and documents >= self.most_documents) or (
            self.most_bytes is not None and size >= self.most_bytes
        )

    def _line(self, row: dict[str, Any]) -> bytes:
        record = {field: row[column] for field, column in self.columns.items()} if self.columns else row
        try:
            return json.dumps(record, ensure_ascii=False).encode() + b"\n"
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{self.repository}: a record is no JSON: {error}", "Choose other columns: `columns` of the fetch."
            ) from error


def _amount(parts: list[dict[str, int]]) -> tuple[int, int]:
    """Return documents and bytes of parts."""
    return sum(part["documents"] for part in parts), sum(part["bytes"] for part in parts)


class _Progress:
    """Say every few seconds how much was streamed and how long the rest takes, where its length is known."""

    def __init__(self, of: _Stream, total: int | None) -> None:
        self.say = of.say
        whole = [count for count in (total, of.most_documents) if count is not None]
        self.whole = (min(whole, default=None), of.most_bytes)
        self.first = _amount(of.state["parts"])
        self.started = self.last = time.monotonic()

    def show(self, *done: int) -> None:
        """Take note of documents and bytes up to now."""
        now = time.monotonic()
        if now - self.last < _EVERY_S:
            return
        self.last, seconds = now, now - self.started
        rest = [
            seconds * (whole - count) / (count - first)
            for whole, count, first in zip(self.whole, done, self.first, strict=True)
            if whole is not None and count > first
        ]
        left = f", {duration(max(0, min(rest)))} left" if rest else ""
        speed = (done[1] - self.first[1]) / seconds / 1e6
        self.say(f"{done[0]:,} documents, {done[1] / 1e6:,.0f} MB, {speed:,.1f} MB/s{left}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]
