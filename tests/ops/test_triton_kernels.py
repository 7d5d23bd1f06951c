"""Our Triton kernels, under Triton's interpreter in float32 (on a GPU: tests/gpu)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(("script", "cases"), [("run_generation_kernels.py", 14), ("run_scan_kernel.py", 9)])
def test_kernels_equal_pytorch(script: str, cases: int) -> None:
    pytest.importorskip("triton", reason="triton is installed on Linux only")
    worker = Path(__file__).with_name(script)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(worker)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(found) == cases
    assert max(found.values()) < 1e-5, found


def test_the_plan_knows_our_scan_s_chunk() -> None:
    pytest.importorskip("triton", reason="triton is installed on Linux only")
    from nemotron_h.architecture.blocks.mamba import KERNEL_CHUNK
    from nemotron_h.ops.scan_kernel import CHUNK

    assert 2 * CHUNK == KERNEL_CHUNK
