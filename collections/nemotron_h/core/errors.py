"""The error a user can act on: one message, one hint, no traceback."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

_FULL = "free space there and run the same command again"
_RIGHTS = "give this user the right to it, or name another place"
_KIND = "name another place, or move what stands there"
#: errors of a file or folder that the same command meets again until someone acts, and what to do
_LASTING = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EROFS: _RIGHTS,
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EEXIST: _KIND,
    errno.ENOTDIR: _KIND,
    errno.EISDIR: _KIND,
    errno.ENAMETOOLONG: "name another place",
    errno.ENOENT: "look at its name, and at what removed it",
}


class UserError(Exception):
    """Mistake that the user can fix: bad input, missing data, no network, a full disk.

    The command line prints `message` and `hint` without a traceback and exits with `EXIT_CODE`.

    Args:
        message: what is wrong, naming the key, file or package.
        hint: what to do about it (one line or a few); empty when the message says it all.
    """

    EXIT_CODE = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


def user_error(error: BaseException, what: str = "", hint: str = "") -> UserError | None:
    """Return an error as one that the user can act on, or None where it is another: a bug, or what may pass by itself.

    Args:
        error: a `UserError`, which is returned as it is, or the operating system's.
        what: stands before the path: the key that names it, or what it is.
        hint: in place of the usual one of this error.
    """
    if isinstance(error, UserError):
        return error
    if not isinstance(error, OSError) or error.errno not in _LASTING:
        return None
    path = error.filename2 or error.filename
    if path is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    parts = [what, str(path) if path is not None else "", error.strerror]
    return UserError(": ".join(part for part in parts if part), hint or _LASTING[error.errno])


@contextlib.contextmanager
def naming(what: str, hint: str = "") -> Iterator[None]:
    """Raise the operating system's errors as `user_error` gives them."""
    try:
        yield
    except OSError as error:
        raise user_error(error, what, hint) or error from error


def report(error: UserError) -> None:
    """Print the error and what to do about it on the standard error, as every command does."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(Text.assemble(("error: ", "bold red"), error.message))  # text, not markup: messages have brackets
    if error.hint:
        console.print(Text.assemble(("fix: ", "bold"), error.hint))
