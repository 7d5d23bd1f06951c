"""Run code that a model wrote, with its tests, as a process with limits. It is no sandbox: the process is of the same
user and may read what the user may, so that a command asks for permission first.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

#: Hugging Face's code_eval has 3 s; ours: of the processor, so that a busy machine changes no verdict
CPU_S = 3
#: ours: a program that waits ends too; memory and files that tests of functions do not reach
_WALL_S, _MEMORY, _FILE = 30.0, 4 << 30, 1 << 20

#: bounds its own process, and runs a file
_BEGIN = f"""
import resource, runpy, sys
for kind, most in (("CPU", {CPU_S}), ("AS", {_MEMORY}), ("FSIZE", {_FILE}), ("CORE", 0)):
    resource.setrlimit(getattr(resource, f"RLIMIT_{{kind}}"), (most, most))
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def passed(programs: Sequence[str], processes: int | None = None) -> Iterator[bool]:
    """Yield for each program whether it comes to its end.

    Args:
        processes: that run at once; None: as many as there are cores.
    """
    with ThreadPoolExecutor(processes or os.cpu_count()) as pool:
        yield from pool.map(_passes, programs)


def _passes(program: str) -> bool:
    with tempfile.TemporaryDirectory(prefix="nemotron_h_code_") as folder:
        file, end = Path(folder) / "program.py", Path(folder) / "end"
        # a program that leaves early, by sys.exit(0) in the middle of its tests, does not write this
        mark = secrets.token_hex(16)
        last = f"\n\nwith open({str(end)!r}, 'w') as _end:\n    _end.write({mark!r})\n"
        file.write_text(program + last, encoding="utf-8", errors="replace")
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _BEGIN, str(file)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_WALL_S)
        with contextlib.suppress(ProcessLookupError):  # and what it has started
            os.killpg(process.pid, signal.SIGKILL)
        return process.wait() == 0 and end.is_file() and end.read_text() == mark
