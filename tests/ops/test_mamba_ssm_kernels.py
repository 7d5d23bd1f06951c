"""Our ops against the kernels that train on GPUs, mamba-ssm's with our scan, under Triton's interpreter, in float32.

The package's source comes from the configured registry through pip once (3 s; nothing is built or installed) into
``~/.cache/nemotron_h``; the kernels run in a process of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

VERSION = "2.3.2.post1"
CASES = [
    "scan",
    "scan of heads too wide for ours",
    "scan with documents and states",
    "step with 0 options",
    "step with 2 options",
    "gated norm",
    "fused mixer with documents",
]
APART = ["scan, another document changed", "fused mixer, another document changed"]


def fetch_source() -> Path:
    """The folder of the unpacked package, fetched once; skips where that is impossible."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nemotron_h"
    root = cache / f"mamba_ssm-{VERSION}"
    if (root / "mamba_ssm").is_dir():
        return root / "mamba_ssm"
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", folder, "--no-deps"]
        command += ["--no-build-isolation", "--no-binary", "mamba-ssm", f"mamba-ssm=={VERSION}"]
        # its setup.py then neither compiles nor looks for a wheel elsewhere
        environment = {**os.environ, "MAMBA_SKIP_CUDA_BUILD": "TRUE", "MAMBA_FORCE_BUILD": "TRUE"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        archives = list(Path(folder).glob("*.tar.gz"))
        if result.returncode or not archives:
            last = (result.stderr.strip().splitlines() or ["no output"])[-1]
            pytest.skip(f"pip could not fetch the source of mamba-ssm {VERSION}: {last}")
        with tarfile.open(archives[0]) as archive:
            archive.extractall(folder, filter="data")
        # a rename is atomic: a run that is cut off, or another beside this one, leaves nothing half done
        try:
            (Path(folder) / root.name).rename(root)
        except OSError:
            if not (root / "mamba_ssm").is_dir():
                raise
    return root / "mamba_ssm"


def run(script: str) -> dict:
    """What a script of this folder prints, under Triton's interpreter."""
    command = [sys.executable, str(Path(__file__).with_name(script)), str(fetch_source())]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "MAMBA_DETERMINISTIC": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["TRITON_CACHE_AUTOTUNING"] = "0"  # stored choices are timed, which asks for a GPU driver
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def differences() -> dict[str, dict[str, float]]:
    pytest.importorskip("triton", reason="triton is installed on Linux only")
    pytest.importorskip("einops")
    return run("run_mamba_ssm_kernels.py")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_kernels_agree(differences, case):
    errors = differences[case]
    assert errors
    assert max(errors.values()) < 1e-4, errors


@pytest.mark.slow
@pytest.mark.parametrize("case", APART)
def test_no_bit_moves_with_another_document(differences, case):
    assert not any(differences[case].values()), differences[case]


@pytest.mark.slow
def test_every_case_is_looked_at(differences):
    assert sorted(differences) == sorted(CASES + APART)


@pytest.fixture(scope="module")
def packed() -> dict[str, dict]:
    pytest.importorskip("triton", reason="triton is installed on Linux only")
    pytest.importorskip("einops")
    return run("run_packed_models.py")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["whole", "whole, fused", "lora"])
def test_packed_conversations_are_separate_ones_with_the_kernels(packed, model: str) -> None:
    """Losses of SFT, DPO and RPO, and the gradients of SFT's and DPO's in all that is trained, at weights of scale 1;
    float32, through a whole small model.
    """
    found = packed[model]
    adapted = model == "lora"
    assert all((".adapter." in name) is adapted for name in found["trained"])
    assert len(found["trained"]) == 2 * 6 if adapted else "decoder.layers.0.mixer.A_log" in found["trained"]
    expected = {"sft", "dpo", "rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq"}
    expected |= {f"{loss} {name}" for loss in ("sft", "dpo") for name in found["trained"]}
    for errors in (found["alone"], found["plain"]):
        assert errors.keys() == expected
        assert max(errors.values()) < 1e-4, sorted(errors.items(), key=lambda e: -e[1])[:5]
