"""Compare answers by SymPy and by Math-Verify, in a process of its own: it may take forever, and is ended then.

Run as a module it is that process: a JSON list of a comparison and two texts a line in, `true` or `false` a line out.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import resource
import select
import subprocess
import sys

from nemotron_h.core.children import end_with_parent

#: NeMo-Skills' math grader
LIMIT_S = 10.0
#: ours: SymPy's import on a busy machine
_START_S = 120.0
#: ours: a power of powers fills the memory sooner than the time is up
_MEMORY = 4 << 30
_TOLERANCE = 1e-4
_worker: subprocess.Popen | None = None


def same_value(answer: str, reference: str) -> bool:
    """Return whether two texts are expressions of one value; False where one is none, or when the time is up."""
    return _asked("compare", answer, reference)


def verified(text: str, reference: str) -> bool:
    """Return whether Math-Verify, which has to be installed, finds the reference's answer in a text; see `same_value`.

    Args:
        text: a whole answer.
        reference: a solution, or an answer alone.
    """
    return _asked("verify", text, reference)


def _asked(comparison: str, answer: str, reference: str) -> bool:
    global _worker
    if _worker is None or _worker.poll() is not None:
        _worker = _start()
    try:
        _worker.stdin.write(json.dumps([comparison, answer, reference]).encode() + b"\n")
        _worker.stdin.flush()
    except OSError:
        stop()
        return False
    line = _line(_worker, LIMIT_S)
    if not line:
        stop()
    return line.strip() == b"true"


def stop() -> None:
    """End the process; the next comparison starts another."""
    global _worker
    if _worker is not None:
        _worker.kill()
        _worker.communicate()
    _worker = None


def _start() -> subprocess.Popen:
    command = [sys.executable, "-m", "nemotron_h.evaluation.grading.symbols"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, preexec_fn=end_with_parent
    )
    atexit.register(stop)
    if not _line(process, _START_S):
        process.kill()
        raise RuntimeError(f"{' '.join(command)} did not start")
    return process


def _line(process: subprocess.Popen, limit_s: float) -> bytes:
    ready, _, _ = select.select([process.stdout], [], [], limit_s)
    return process.stdout.readline() if ready else b""


def compare(answer: str, reference: str) -> bool:
    """Return whether two texts are expressions of one value, without a limit of time."""
    import sympy

    from nemotron_h.evaluation.grading.latex import expression

    first, second = expression(answer), expression(reference)
    if first == second:
        return True
    difference = first - second
    if difference.is_number:
        scale = max(abs(complex(sympy.N(second))), 1e-12)
        return abs(complex(sympy.N(difference))) <= _TOLERANCE * scale
    return sympy.simplify(difference) == 0


def verify(text: str, reference: str) -> bool:
    """Return Math-Verify's verdict, without a limit of time but its own."""
    from math_verify import parse, verify

    return verify(parse(reference), parse(text))


def _serve() -> None:
    import nemotron_h.evaluation.grading.latex  # noqa: F401  (the clock of a comparison begins after it)

    with contextlib.suppress(ImportError):
        import math_verify  # noqa: F401
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    print("ready", flush=True)
    comparisons = {"compare": compare, "verify": verify}
    for line in sys.stdin:
        try:
            comparison, *texts = json.loads(line)
            same = comparisons[comparison](*texts)
        except Exception:  # SymPy raises errors of every kind at what it cannot do
            same = False
        print(json.dumps(bool(same)), flush=True)


if __name__ == "__main__":
    _serve()
