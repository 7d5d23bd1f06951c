"""megatron-core's corrections that no other test would miss."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest


def test_the_writers_queue_does_not_run_the_command_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from nemotron_h.runtime import megatron_fixes

    script, ran = tmp_path / "command.py", tmp_path / "ran"
    script.write_text(f"open({str(ran)!r}, 'w')")
    command = ModuleType("__main__")
    command.__file__ = str(script)
    monkeypatch.setitem(sys.modules, "__main__", command)
    monkeypatch.setattr(filesystem_async, "_results_queue", None)
    megatron_fixes.install()
    queue = filesystem_async._get_write_results_queue()
    queue.put(3)
    assert queue.get(timeout=60) == 3
    assert sys.modules["__main__"] is command
    assert not ran.exists()
