"""A folder has one writer; its lock dies with that process, though children of it live on."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from nemotron_h.core.errors import UserError
from nemotron_h.core.locks import acquire, locked, release


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    with locked(tmp_path / "run", "trained", "log.dir"):
        with pytest.raises(UserError) as no:
            acquire(tmp_path / "run", "trained", "log.dir", "wait")
        assert no.value.message.startswith(f"{tmp_path}/run is being trained by another process: pid {os.getpid()} ")
        assert f"on {socket.gethostname()}, since {time.strftime('%Y-')}" in no.value.message
        assert no.value.hint == "wait"
    release(acquire(tmp_path / "run", "trained", "log.dir"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"^log.dir: {tmp_path}/file/run: Not a directory"):
        acquire(tmp_path / "file" / "run", "trained", "log.dir")


def test_a_lock_dies_with_its_process_and_not_with_its_children(tmp_path: Path) -> None:
    read, write = os.pipe()
    holder = os.fork()
    if not holder:
        acquire(tmp_path / "run", "trained", "log.dir")
        if not os.fork():  # as a data loader is
            os.write(write, b"%d" % os.getpid())
        time.sleep(60)
    child = int(os.read(read, 10))
    with pytest.raises(UserError, match=f"pid {holder} on"):
        acquire(tmp_path / "run", "trained", "log.dir")
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    try:
        release(acquire(tmp_path / "run", "trained", "log.dir"))
    finally:
        os.kill(child, signal.SIGKILL)
