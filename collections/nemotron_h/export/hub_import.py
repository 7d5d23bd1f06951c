"""Download a model of the Hugging Face Hub, compare its files with the Hub's hashes, and import it."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from nemotron_h.checkpoint.hub_cache import folder_of
from nemotron_h.core import hub
from nemotron_h.core.errors import UserError
from nemotron_h.core.files import file_sha256
from nemotron_h.core.hub import Repository
from nemotron_h.core.locks import locked
from nemotron_h.core.progress import StageProgress

if TYPE_CHECKING:
    from nemotron_h.export.hf_reader import Source

#: what an import reads, of the repository's first level; code and other formats stay where they are
FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
#: ours: seconds between two looks of a rank that waits, and until it says what for
_POLL_S, _PATIENCE_S = 1.0, 600.0


def obtain(checkpoint: str, key: str, rank: int = 0, say: Callable[[str], None] = print) -> None:
    """Fetch a checkpoint that is named on the Hub into the cache, unless it is there; leave a path as it is.

    Args:
        checkpoint: of a recipe.
        key: that names it, for errors.
        rank: of this process; rank 0 downloads and imports, the others wait for it.
        say: is told of the progress by rank 0.
    Errors:
        UserError: as of `download` and `hf_reader.examine`; another process fetches it.
    """
    if not hub.is_hub(checkpoint):
        return
    repository = hub.parse(checkpoint, key)
    folder = folder_of(repository)
    if rank:
        begun = time.monotonic()
        while not folder.is_dir():  # where rank 0 fails, the launcher ends this one too
            time.sleep(_POLL_S)
            if time.monotonic() - begun > _PATIENCE_S:
                begun = time.monotonic()
                print(f"{key}: rank {rank} waits for {folder}, which rank 0 writes; is it on a disk that both see?")
        return
    if folder.is_dir():
        return
    with locked(folder.with_name(f"{folder.name}.lock"), "fetched", key):
        if folder.is_dir():
            return
        say(f"{key}: fetching {repository.name}@{repository.revision} into {folder}")
        from nemotron_h.export import hf_reader

        source = examine(repository, None, say)
        with StageProgress(Console(stderr=True), "importing", source.size, "bytes") as bar:
            hf_reader.write(source, folder, bar.advance)


def examine(repository: Repository, name: str | None, say: Callable[[str], None]) -> Source:
    """Download a model and check it as `hf_reader.examine` does.

    Args:
        name: of the model definition; None makes one of the repository's name.
    """
    import dataclasses

    from nemotron_h.export import hf_reader
    from nemotron_h.export.config import definition_name

    folder, commit = download(repository, say)
    source = hf_reader.examine(folder, name or definition_name(repository.name.partition("/")[2]))
    return dataclasses.replace(source, origin=f"{repository.name}@{commit}")


def download(repository: Repository, say: Callable[[str], None] = lambda text: None) -> tuple[Path, str]:
    """Download the files that an import reads into Hugging Face's own cache, and compare them with the Hub's hashes.

    With HF_HUB_OFFLINE the cache's files are taken as they are, and the revision has to be a commit.

    Returns:
        the folder, and the commit.
    Errors:
        UserError: as of `hub.commit_of`; the disk is full; a file differs from what the Hub says of it.
    """
    try:
        from huggingface_hub import constants, snapshot_download
    except ImportError as error:
        raise hub.missing_package(repository.key, "huggingface_hub") from error
    wanted = {"repo_id": repository.name, "allow_patterns": list(FILES), "ignore_patterns": ["*/*"]}
    if constants.HF_HUB_OFFLINE and hub.is_commit(repository.revision):
        return _cached(snapshot_download, wanted, repository), repository.revision
    commit = hub.commit_of(repository, say)
    api = hub.client(repository.key)
    listed = hub.patiently(
        lambda: api.repo_info(repository.name, revision=commit, files_metadata=True), repository, say
    )
    files = [each for each in listed.siblings if _is_wanted(each.rfilename)]
    if not any(each.rfilename == "config.json" for each in files):
        raise UserError(f"{repository}: it has no config.json", f"Look at {hub.page(repository)}: is it a model?")
    say(f"downloading {len(files)} files, {sum(each.size or 0 for each in files) / 1e9:,.2f} GB")

    def snapshot() -> Path:
        return Path(snapshot_download(**wanted, revision=commit, token=hub.token()))

    folder = hub.patiently(snapshot, repository, say)
    with StageProgress(Console(stderr=True), "comparing hashes", sum(each.size or 0 for each in files), "bytes") as bar:
        for each in files:
            _compare(folder / each.rfilename, each, repository)
            bar.advance(each.size or 0)
    return folder, commit


def _cached(snapshot_download: Callable[..., str], wanted: dict[str, Any], repository: Repository) -> Path:
    try:
        return Path(snapshot_download(**wanted, revision=repository.revision, local_files_only=True))
    except FileNotFoundError as error:
        raise UserError(
            f"{repository}: is not in Hugging Face's cache, and HF_HUB_OFFLINE is set",
            "Unset it, or fetch on a machine with a network first and copy the cache (HF_HOME).",
        ) from error


def _is_wanted(file: str) -> bool:
    from fnmatch import fnmatchcase

    return "/" not in file and any(fnmatchcase(file, pattern) for pattern in FILES)


def _compare(path: Path, listed: Any, repository: Repository) -> None:
    """Compare a file with the size and hash that the Hub states; one that differs is removed from the cache.

    Errors:
        UserError: it differs, or is not there.
    """
    size = path.stat().st_size if path.is_file() else None
    if size is not None and size == listed.size:
        if listed.lfs is not None and file_sha256(path) == listed.lfs.sha256:
            return
        if listed.lfs is None and _git_hash(path) == listed.blob_id:
            return
    for damaged in (Path(os.path.realpath(path)), path):
        damaged.unlink(missing_ok=True)
    raise UserError(
        f"{repository}: {path.name} is not the file that the Hub describes: {size or 0:,} bytes, "
        f"{listed.size or 0:,} and another hash are stated",
        "It was removed from the cache. Run again; where it happens again, a proxy or mirror alters it.",
    )


def _git_hash(path: Path) -> str:
    """Return git's hash of a small file."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
