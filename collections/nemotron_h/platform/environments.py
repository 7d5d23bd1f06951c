"""Virtual environments of their own, for tools whose pins and NeMo's cannot be installed together.

`python -m nemotron_h.platform.environments FOLDER REQUIREMENTS` makes one, or finds it, and prints its interpreter.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from nemotron_h.core.errors import UserError

MARK = "requirements.sha256"


def ready(folder: Path, requirements: Path) -> Path | None:
    """Return the interpreter of the environment in `folder`, or None where it is not there or of other pins."""
    mark, python = folder / MARK, interpreter(folder)
    wanted = hashlib.sha256(requirements.read_bytes()).hexdigest()
    return python if python.is_file() and mark.is_file() and mark.read_text() == wanted else None


def interpreter(folder: Path) -> Path:
    """Return the path of an environment's interpreter."""
    return folder / "bin" / "python"


def packages(requirements: Path) -> list[str]:
    """Return the installed packages with their pins."""
    return [line for line in requirements.read_text().splitlines() if line and not line.startswith("#")]


def make(folder: Path, requirements: Path, say: Callable[[str], None] = lambda _: None) -> Path:
    """Return the interpreter of the environment in `folder`, which is built anew unless it has these pins.

    Args:
        folder: of the environment; created.
        requirements: pip's file of pinned packages.
        say: told before packages are installed.
    Errors:
        UserError: the environment cannot be made; pip's last words are in the message.
    """
    if found := ready(folder, requirements):
        return found
    named = ", ".join(packages(requirements))
    say(f"setting up {folder} with {named} (once)")
    python = interpreter(folder)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(requirements)]
    for command in ([sys.executable, "-m", "venv", "--clear", str(folder)], install):
        try:
            done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        except OSError as error:
            raise UserError(f"cannot make the environment {folder}: {error}") from error
        if done.returncode:
            shutil.rmtree(folder, ignore_errors=True)
            raise UserError(
                f"cannot install {named} into {folder}: {done.stderr.strip()[-600:]}",
                hint="check the network and `pip config list`, then run again",
            )
    (folder / MARK).write_text(hashlib.sha256(requirements.read_bytes()).hexdigest())
    return python


if __name__ == "__main__":
    try:
        print(make(Path(sys.argv[1]), Path(sys.argv[2]), lambda text: print(text, file=sys.stderr)))
    except UserError as error:
        sys.exit(f"error: {error}")
