"""The virtual environment of Hugging Face transformers, `.bench/hf`: transformers with this model and NeMo cannot
share one.

`python tests/benchmarks/hf_environment.py` makes it where it is absent or of other pins, and prints its interpreter.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parents[1] / ".bench" / "hf"
REQUIREMENTS = HERE / "requirements_hf.txt"


class SetupError(RuntimeError):
    """The environment could not be made; the text says why."""


def packages() -> list[str]:
    """What is installed, pinned."""
    return [line for line in REQUIREMENTS.read_text().split("\n") if line and not line.startswith("#")]


def hugging_face_python() -> Path:
    """The environment's interpreter; the environment is made on first use.

    Errors:
        SetupError: packages cannot be installed.
    """
    python, mark = FOLDER / "bin" / "python", FOLDER / "requirements.sha256"
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    if mark.exists() and mark.read_text() == wanted:
        return python
    print(f"Setting up {FOLDER} with {' '.join(packages())} (once) ...", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(FOLDER)], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "-r", str(REQUIREMENTS)]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        raise SetupError(f"cannot install transformers into {FOLDER}: {done.stderr.strip()[-600:]}")
    mark.write_text(wanted)
    return python


if __name__ == "__main__":
    try:
        print(hugging_face_python())
    except SetupError as error:
        sys.exit(f"error: {error}")
