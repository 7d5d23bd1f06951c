"""On a GPU: a run that was killed and resumed is the run that never stopped, bit for bit where kernels add in a fixed
order and within a bound where they do not; and settings that a resume changes reach Adam with bfloat16 moments.

`python tests/gpu/test_gpu_resume.py` does it without pytest and prints what it measures. Without a GPU it tries itself
on the small model of the CPU tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
import small_run

try:
    import pytest

    pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
except ImportError:
    pytest = None  # type: ignore[assignment]

ON_GPU = torch.cuda.is_available()
#: scan and convolution (mamba-ssm, causal-conv1d), attention (Transformer Engine) and cuBLAS add in a fixed order
FIXED_ORDER = {
    "MAMBA_DETERMINISTIC": "1",
    "CAUSAL_CONV1D_DETERMINISTIC": "1",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
STEPS = 12
#: of a loss, without a fixed order; ours (measured on an H200: 0)
BOUND = 1e-3
#: widths at which kernels share their sums out over programs
WIDE = (
    ("hidden_size: 64", "hidden_size: 512"),
    ("ffn_hidden_size: 96", "ffn_hidden_size: 2048"),
    ("num_attention_heads: 4", "num_attention_heads: 8"),
    ("head_dim: 16\n  mamba", "head_dim: 64\n  mamba"),  # attention's and Mamba's
    ("mamba_num_heads: 8", "mamba_num_heads: 16"),
    ("mamba_state_dim: 16", "mamba_state_dim: 128"),
    ("seq_length: 64", "seq_length: 512"),
    ("tokens: 6144 # 12 steps", "tokens: 49152"),
    ("warmup_tokens: 1024", "warmup_tokens: 8192"),
    ("init_std: 0.1", "init_std: 0.02"),
    ("peak_lr: 1e-2", "peak_lr: 1e-3"),
    ("parameters: 163376", "parameters: 9080928"),
)


class Processes:
    """Programs in processes of their own, with the interface of `forks.Forks`: a fork would inherit the GPU's state."""

    def __init__(self) -> None:
        self.environment: dict[str, str] = {}

    def run(self, program: str, *arguments: str, folder: Path, name: str, ranks: int = 1) -> int:
        """Run a script or a module and wait; see `Forks.run`."""
        command = [program] if program.endswith(".py") else ["-m", program]
        environment = {**os.environ, **self.environment}
        with (folder / f"{name}.out").open("w") as out, (folder / f"{name}.err").open("w") as err:
            return subprocess.run(
                [sys.executable, *command, *arguments], cwd=folder, stdout=out, stderr=err, env=environment, timeout=600
            ).returncode


PROCESSES = Processes()


def recipe(small: small_run.Small, name: str, *changes: tuple[str, str]) -> Path:
    """Write the recipe of the run `name`."""
    return small.variant(name, *(WIDE if ON_GPU else ()), *changes)


def killed_and_resumed(small: small_run.Small, name: str, environment: dict[str, str]) -> tuple[str, str]:
    """Train a run without a stop and one that is killed at step 6 of 12 and resumed from 4; return their names."""
    PROCESSES.environment = environment
    straight, resumed = f"{name}_straight", f"{name}_resumed"
    small.train(straight, recipe=recipe(small, straight))
    assert small.train(resumed, "kill=6", check=False, recipe=recipe(small, resumed)).returncode < 0
    assert "resumed at step 4" in small.train(resumed, recipe=recipe(small, resumed)).stdout
    return straight, resumed


def difference(small: small_run.Small, one: str, two: str) -> float:
    """Return the largest relative difference of two runs' losses."""
    pairs = zip(small_run.losses(small, one), small_run.losses(small, two), strict=True)
    return max(abs(a - b) / abs(a) for a, b in pairs)


def in_a_fixed_order_it_is_exact(small: small_run.Small) -> None:
    """Compare steps, records, TensorBoard, and every tensor of weights and optimizer."""
    straight, resumed = killed_and_resumed(small, "fixed", FIXED_ORDER)
    print(f"in a fixed order, largest relative difference of a loss: {difference(small, straight, resumed):.1e}")
    small_run.assert_same(small, straight, resumed)
    assert small.same_tensors(straight, resumed, STEPS)


def in_any_order_it_is_near(small: small_run.Small) -> None:
    """Compare losses: two runs that were never stopped differ as well."""
    straight, resumed = killed_and_resumed(small, "free", {})
    largest = difference(small, straight, resumed)
    print(f"in any order, largest relative difference of a loss: {largest:.1e}")
    assert largest < BOUND


def changed_settings_reach_the_optimizer(small: small_run.Small) -> None:
    """Resume with other settings of Transformer Engine's Adam, with float32 moments and with bfloat16 ones."""
    PROCESSES.environment = {}
    for moments in ("fp32", "bf16") if ON_GPU else ("fp32",):
        name = f"moments_{moments}"
        path = recipe(small, name, ("optim: {", f"optim: {{moments: {moments}, "))
        assert small.train(name, "kill=6", check=False, recipe=path).returncode < 0
        settings = ("optim.weight_decay=0.3", "optim.beta2=0.99", "optim.eps=1e-6", "optim.peak_lr=5e-4")
        said = small.train(name, *settings, recipe=path).stdout
        assert "  optim.weight_decay: 0.1 -> 0.3\n" in said, said[-2000:]
        steps: dict[int, dict[str, Any]] = small.steps(name)
        assert sorted(steps[4]["adam"]) == [[0.9, 0.95, 1e-8, 0.0], [0.9, 0.95, 1e-8, 0.1]]
        assert sorted(steps[STEPS]["adam"]) == [[0.9, 0.99, 1e-6, 0.0], [0.9, 0.99, 1e-6, 0.3]]
        assert float.fromhex(steps[5]["lr"]) < 5e-4


CHECKS = (in_a_fixed_order_it_is_exact, in_any_order_it_is_near, changed_settings_reach_the_optimizer)


def run_checks(folder: Path) -> None:
    """Prepare the data once and do every check."""
    forks, small_run.FORKS = small_run.FORKS, PROCESSES
    try:
        small = small_run.prepared(folder)
        for check in CHECKS:
            check(small)
            print(f"{check.__name__}: passed", flush=True)
    finally:
        small_run.FORKS = forks


if pytest is not None:

    def test_resume_on_a_gpu(tmp_path: Path) -> None:
        run_checks(tmp_path)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        run_checks(Path(scratch))
