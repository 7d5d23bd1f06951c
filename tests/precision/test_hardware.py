"""Machines that cannot run FP8 through Transformer Engine: each is told what to do."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nemotron_h.core.errors import UserError
from nemotron_h.platform import hardware

H100, A100 = ("NVIDIA H100", (9, 0)), ("NVIDIA A100", (8, 0))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Pretend: GPUs, CUDA, Transformer Engine's version (None: not installed) and what its import does."""

    def pretend(*gpus, cuda: str = "13.0", engine: str | None = "2.11.0", fails: Exception | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: gpus[index][0])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: gpus[index][1])
        monkeypatch.setattr(torch.version, "cuda", cuda)

        def version(name: str) -> str:
            if engine is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return engine

        def import_module(name: str) -> SimpleNamespace:
            if fails:
                raise fails
            return SimpleNamespace()

        monkeypatch.setattr(hardware.importlib.metadata, "version", version)
        monkeypatch.setattr(hardware.importlib, "import_module", import_module)

    return pretend


def test_hopper_with_the_tested_engine_runs_both(machine) -> None:
    machine(H100, H100)
    hardware.check_engine("fp8_current_scaling")
    hardware.check_engine("fp8_blockwise")


@pytest.mark.parametrize(
    ("gpus", "options", "message", "remedy"),
    [
        ([], {}, "needs a GPU, and PyTorch sees none", "emulate it on the CPU"),
        ([A100], {}, r"compute capability of 9.0; NVIDIA A100 has 8.0", "fp8_backend=emulate"),
        ([H100, A100], {}, "GPUs of one kind; here are NVIDIA A100, NVIDIA H100", "CUDA_VISIBLE_DEVICES"),
        ([H100], {"cuda": "12.8"}, "needs CUDA 12.9 or newer", "install a PyTorch"),
        ([H100], {"engine": None}, "which is not installed", "pip install"),
        ([H100], {"engine": "2.1"}, "2.3 or newer; 2.1 is installed", "pip install"),
        (
            [H100],
            {"fails": OSError("libcublas.so.13: cannot open\nmore")},
            "2.11.0 is installed and does not import: libcublas.so.13: cannot open\n",
            "--force-reinstall",
        ),
    ],
    ids=["no GPU", "no FP8", "mixed", "CUDA", "no engine", "old engine", "failing engine"],
)
def test_the_error_names_the_remedy(machine, gpus: list, options: dict, message: str, remedy: str) -> None:
    machine(*gpus, **options)
    with pytest.raises(UserError, match=message) as error:
        hardware.check_engine("fp8_blockwise")
    assert remedy in error.value.hint


def test_current_scaling_runs_on_ada(machine) -> None:
    machine(("NVIDIA L40", (8, 9)))
    hardware.check_engine("fp8_current_scaling")


def test_an_engine_that_breaks_the_import_of_nemo_is_named(tmp_path: Path) -> None:
    package, info = tmp_path / "transformer_engine", tmp_path / "transformer_engine-2.11.0.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text('raise OSError("libcublas.so.13: cannot open")')
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: transformer-engine\nVersion: 2.11.0\n")
    done = subprocess.run(
        [sys.executable, "-c", "from nemotron_h.platform import quiet; quiet.hush()"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "UserError" in done.stderr
    assert "Transformer Engine 2.11.0 is installed and fails: libcublas.so.13: cannot open" in done.stderr
    assert "pip uninstall transformer-engine" in done.stderr
