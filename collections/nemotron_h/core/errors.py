"""The error a user can act on: one message, one hint, no traceback."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

_FULL = "free space there and run the same command again"
_RIGHTS = "give this user the right to it, or name another place"
_KIND = "name another place, or move what stands there"
#: errors of a file or folder that the same command meets again until someone acts, and what to do
_LASTING = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: "raise this user's limit of a file's size (ulimit -f), or name another place",
    errno.EROFS: _RIGHTS,
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EEXIST: _KIND,
    errno.ENOTDIR: _KIND,
    errno.EISDIR: _KIND,
    errno.ENAMETOOLONG: "name another place",
    errno.ENOENT: "look at its name, and at what removed it",
}
#: those of a write, which need no path to be clear
_OF_A_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: libraries in Rust (safetensors, tokenizers) hide the operating system's error in the text of theirs
_NUMBER = re.compile(r"\(os error (\d+)\)")
#: `torch.save` writes in C++, whose errors have no number
_OF_TORCH_SAVE = ("iostream error", "PytorchStreamWriter failed", "enforce fail at inline_container")


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
        error: a `UserError`, which is returned as it is, or the operating system's, as `of_system` finds it.
        what: stands before the path: the key that names it, or what it is.
        hint: in place of the usual one of this error.
    """
    if isinstance(error, UserError):
        return error
    system = of_system(error)
    if system is None or system.errno not in _LASTING:
        return None
    path = system.filename2 or system.filename
    if path is None and system.errno not in _OF_A_WRITE:
        return None
    parts = [what, str(path) if path is not None else "", system.strerror]
    return UserError(": ".join(part for part in parts if part), hint or _LASTING[system.errno])


def of_system(error: BaseException) -> OSError | None:
    """Return the operating system's error that an error is, or that a library tells of; None where it is another."""
    if isinstance(error, OSError):
        return error
    if isinstance(error, Exception) and (number := _NUMBER.search(str(error))):
        return OSError(int(number[1]), os.strerror(int(number[1])))
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _OF_TORCH_SAVE):
        said = str(error).splitlines()[0]
        return OSError(errno.ENOSPC, f"{said}, as PyTorch says where the disk is full or a file may not grow")
    return None


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Have errors of the operating system, libraries' too, that name no file name the one that is written."""
    try:
        yield
    except Exception as error:
        system = of_system(error)
        if system is None or system.filename is not None:
            raise
        raise OSError(system.errno, system.strerror, str(path)) from error


@contextlib.contextmanager
def naming(what: str, hint: str = "") -> Iterator[None]:
    """Raise the operating system's errors as `user_error` gives them."""
    try:
        yield
    except Exception as error:
        mistake = user_error(error, what, hint)
        if mistake is None or mistake is error:
            raise
        raise mistake from error


def report(error: UserError) -> None:
    """Print the error and what to do about it on the standard error, as every command does."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(Text.assemble(("error: ", "bold red"), error.message))  # text, not markup: messages have brackets
    if error.hint:
        console.print(Text.assemble(("fix: ", "bold"), error.hint))
