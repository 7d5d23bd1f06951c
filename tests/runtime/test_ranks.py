"""An uncaught mistake of the user is a message and exit code 2; anything else is a traceback and 1, as before."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = (
    "import io, sys; from nemotron_h.core.errors import UserError; from nemotron_h.platform import ranks;"
    "ranks.report_mistakes(); ranks.report_mistakes(); {}"
)


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        ("raise UserError('no data', 'prepare it')", 2, "fix: prepare it"),
        ("sys.stderr = io.StringIO(); raise UserError('no data', 'prepare it')", 2, "fix: prepare it"),
        ("raise ValueError('a bug')", 1, "Traceback"),
        ("open('/proc/version/x', 'w')", 2, "error: /proc/version/x: Not a directory\nfix: name another place"),
        ("open('/dev/full', 'w', 1).write('x' * 10**6)", 2, "error: No space left on device\nfix: free space"),
        ("raise ConnectionResetError(104, 'gone')", 1, "Traceback"),
    ],
)
def test_exit_code(raised: str, code: int, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(raised)], capture_output=True, text=True)
    assert done.returncode == code
    assert said in done.stderr
    assert ("Traceback" in done.stderr) == (code == 1)
