"""Repositories of the Hugging Face Hub: their names, pinned revisions, and errors that a user can act on.

`huggingface_hub` is imported where it is used. It honours `HF_ENDPOINT`, `HF_HOME` and `HF_HUB_OFFLINE`. The token is
that of the environment's `HF_TOKEN` alone; it is sent to the Hub, and neither printed nor written.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from nemotron_h.core.errors import UserError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")
PREFIX = "hub:"
UNPINNED = "unpinned"
TOKEN = "HF_TOKEN"
#: ours: seconds to wait before each new attempt, after the library's own; some minutes, as rate limits last
WAITS = (2, 10, 60, 120)
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_REPOSITORY = re.compile(f"{_PART}/{_PART}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,199}")
_NETWORK = ("ConnectionError", "ConnectError", "Timeout", "ConnectTimeout", "ReadTimeout", "ChunkedEncodingError")


@dataclass(frozen=True)
class Repository:
    """A repository at a revision.

    Args:
        name: `organisation/name`.
        revision: a commit or a tag.
        kind: `model` or `dataset`.
        key: that names it in errors, with its file or recipe.
    """

    name: str
    revision: str
    kind: str
    key: str

    def __str__(self) -> str:
        return f"{self.key}: {self.name}@{self.revision}"


def is_repository(name: str) -> bool:
    """Return True for `organisation/name`."""
    return bool(_REPOSITORY.fullmatch(name)) and "--" not in name and ".." not in name


def is_commit(revision: str) -> bool:
    """Return True for the 40 hexadecimal digits of a commit."""
    return bool(_COMMIT.fullmatch(revision))


def is_hub(checkpoint: object) -> bool:
    """Return True for a checkpoint that is named on the Hub: `hub:organisation/name@revision`."""
    return str(checkpoint).startswith(PREFIX)


def parse(text: str, key: str) -> Repository:
    """Return the model of `hub:organisation/name@revision`.

    Args:
        key: that holds it, for errors.
    Errors:
        UserError: it is written otherwise, or has no revision.
    """
    name, _, revision = text.removeprefix(PREFIX).partition("@")
    form = f"write {PREFIX}organisation/name@revision; a revision is a commit's 40 hexadecimal digits or a tag"
    if not is_repository(name):
        raise UserError(f"{key}: {text!r} names no repository of the Hub", form)
    if not _REVISION.fullmatch(revision):
        raise UserError(f"{key}: {text!r} has no revision", form)
    return Repository(name, revision, "model", key)


def token() -> str | bool:
    """Return the token of the environment; False where there is none, so that no stored one is taken."""
    return os.environ.get(TOKEN, "").strip() or False


def client(key: str) -> HfApi:
    """Return the Hub's interface.

    Errors:
        UserError: `huggingface_hub` is not installed, or it is told to stay offline.
    """
    try:
        from huggingface_hub import HfApi, constants
    except ImportError as error:
        raise missing_package(key, "huggingface_hub") from error
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"{key}: has to be fetched from the Hub, and HF_HUB_OFFLINE is set",
            "Unset it, or fetch on a machine with a network first and copy the cache (NEMOTRON_H_CACHE).",
        )
    return HfApi(token=token())


def missing_package(key: str, name: str) -> UserError:
    """Return the error of a package that is not installed."""
    return UserError(f"{key}: the Python package {name} is needed and not installed", f"Run: pip install {name}")


def endpoint() -> str:
    """Return the Hub's address, without a password in it."""
    address = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
    return re.sub("//[^/@]*@", "//", address)


def page(repository: Repository) -> str:
    """Return the address of its page."""
    return f"{endpoint()}/{'datasets/' if repository.kind == 'dataset' else ''}{repository.name}"


def commit_of(repository: Repository, say: Callable[[str], None] = lambda text: None) -> str:
    """Return the commit of a pinned revision, once the Hub has said that it is there and may be read.

    Errors:
        UserError: a branch, which is not pinned; no such repository or revision; no access; no network.
    """
    api, named = client(repository.key), {"repo_id": repository.name, "repo_type": repository.kind}
    patiently(lambda: api.auth_check(**named), repository, say)
    if is_commit(repository.revision):
        return patiently(lambda: api.repo_info(**named, revision=repository.revision), repository, say).sha
    refs = patiently(lambda: api.list_repo_refs(**named), repository, say)
    tags = {ref.name: ref.target_commit for ref in refs.tags}
    branches = {ref.name: ref.target_commit for ref in refs.branches}
    if repository.revision in tags:
        # a tag can stand for an object of its own, so the commit is asked for
        return patiently(lambda: api.repo_info(**named, revision=repository.revision), repository, say).sha
    if repository.revision in branches:
        raise UserError(
            f"{repository}: {repository.revision} is a branch, which moves, so that runs could not be repeated",
            f"Write the commit where it is now: {branches[repository.revision]}",
        )
    known = f"its tags: {', '.join(sorted(tags)[:10])}" if tags else "it has no tags; take a commit"
    raise UserError(f"{repository}: there is no such revision", f"Look at {page(repository)}/commits/main; {known}.")


def current_commit(repository: Repository, say: Callable[[str], None] = lambda text: None) -> str:
    """Return the commit where a branch or tag is now; of an unpinned repository, that of its main branch.

    Errors:
        UserError: as of `commit_of`.
    """
    revision = None if repository.revision == UNPINNED else repository.revision
    named = {"repo_id": repository.name, "repo_type": repository.kind, "revision": revision}
    api = client(repository.key)
    return patiently(lambda: api.repo_info(**named), repository, say).sha


def patiently(
    do: Callable[[], T],
    repository: Repository,
    say: Callable[[str], None],
    progress: Callable[[], int] = lambda: 0,
) -> T:
    """Return what `do` returns; call it again after a while where the server or the network fails.

    Args:
        say: is told of every new attempt.
        progress: of the work; where it has grown between two failures, the attempts are counted anew. Where it is 0
            and no server answers, there is one new attempt.
    Errors:
        UserError: it went on failing, or for another reason that `hub_error` knows.
    """
    failures, before = 0, progress()
    while True:
        try:
            with _quiet():
                return do()
        except Exception as error:
            failures, before = (0 if progress() > before else failures), progress()
            unreached = _status(error) is None and not progress()  # most often a wrong address, or no network at all
            if failures == (1 if unreached else len(WAITS)) or not is_passing(error):
                raise hub_error(error, repository) or error from error
            wait = max(WAITS[failures], _retry_after(error))
            failures += 1
            say(f"{repository.name}: {_reason(error)}; again in {wait:g} s")
            time.sleep(wait)


def is_passing(error: BaseException) -> bool:
    """Return True for a failure that may pass by itself: of the network, of the server, or of too many requests."""
    status = _status(error)
    if status is not None:
        return status >= 500 or status in (408, 429)
    return any(type(each).__name__ in _NETWORK for each in _chain(error))


def hub_error(error: BaseException, repository: Repository) -> UserError | None:
    """Return a failure as an error that the user can act on; None where it is another.

    Args:
        error: of `huggingface_hub`, `datasets` or what they stand on, or one that these have caused.
    """
    chain = list(_chain(error))
    known = next((each for each in chain if isinstance(each, UserError)), None)
    if known is not None:
        return known
    names, status = {kind.__name__ for each in chain for kind in type(each).__mro__}, _status(error)
    if "RevisionNotFoundError" in names:
        return UserError(
            f"{repository}: there is no such revision",
            f"Take a commit of {page(repository)}/commits/main, or one of its tags.",
        )
    if "GatedRepoError" in names or status == 403:
        has = f"the token of {TOKEN} has no access" if token() else f"{TOKEN} is not set"
        return UserError(
            f"{repository}: access is restricted (HTTP {status or 403}), and {has}",
            f"Accept its terms on {page(repository)}, and set {TOKEN} to a token of that account which may read it.",
        )
    if "RepositoryNotFoundError" in names or status == 401:
        private = f"; the token of {TOKEN} may be wrong" if token() else f"; where it is private, set {TOKEN}"
        return UserError(
            f"{repository}: there is no such {repository.kind} (HTTP {status or 404})",
            f"Look at its name on {page(repository)}{private}.",
        )
    if status == 429:
        better = "" if token() else f", or set {TOKEN}: accounts may ask more often"
        return UserError(
            f"{repository}: the Hub refuses more requests for now (HTTP 429)", f"Run again later: it goes on{better}."
        )
    if status is not None and status >= 500:
        return UserError(
            f"{repository}: the Hub fails (HTTP {status}), also after {len(WAITS)} new attempts",
            "Run again later: it goes on where it was.",
        )
    if "EntryNotFoundError" in names or status == 404:
        return UserError(f"{repository}: a file is not there (HTTP 404)", f"Look at {page(repository)}.")
    if any(type(each).__name__ in _NETWORK for each in chain):
        return UserError(
            f"{repository}: {endpoint()} cannot be reached",
            "Check the network, the proxy (HTTPS_PROXY) and HF_ENDPOINT, then run again: it goes on where it was.",
        )
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave errors to `hub_error`: the libraries log each of their attempts too."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    """Return the status of the HTTP response that an error is of, or None."""
    responses: Iterator[Any] = (getattr(each, "response", None) for each in _chain(error))
    return next((r.status_code for r in responses if getattr(r, "status_code", None) is not None), None)


def _retry_after(error: BaseException) -> float:
    """Return the seconds that a server asks to wait, at most 10 minutes."""
    for each in _chain(error):
        text = str(getattr(getattr(each, "response", None), "headers", {}).get("Retry-After", ""))
        if text.isdigit():
            return min(float(text), 600)
    return 0


def _reason(error: BaseException) -> str:
    status = _status(error)
    return f"HTTP {status}" if status else "the network failed"
