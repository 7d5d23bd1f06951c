"""A command's process ends with its exit code, and without taking the interpreter apart."""

from __future__ import annotations

import subprocess
import sys

import pytest

#: an object whose end says that the interpreter was taken apart
PROGRAM = """
import atexit, sys, threading, time
from nemotron_h.core.ending import run_to_the_end

class Torn:
    def __del__(self):
        print("torn")

def command():
    global torn
    torn = Torn()
    atexit.register(print, "handler")
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
    print("command", end=" ")
    {end}

run_to_the_end(command)
"""


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("pass", 0, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(75)", 75, ""),
        ("sys.exit('no such run')", 1, "no such run\n"),
    ],
)
def test_threads_and_handlers_end_and_nothing_is_taken_apart(end: str, code: int, said: str) -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM.format(end=end)], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "command thread\nhandler\n", said)


def test_an_error_is_pythons() -> None:
    program = PROGRAM.format(end="raise ValueError('a bug')")
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.endswith("ValueError: a bug\n")
    assert ended.stdout == "command thread\nhandler\ntorn\n"
