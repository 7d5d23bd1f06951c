"""Small runs of the training tests on a GPU: each rank a process, at widths at which kernels share their sums.

Without a GPU the models are as small as those of the CPU tests, so that a GPU's test can be tried there.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
import small_run
from forks import environments

ON_GPU = torch.cuda.is_available()
#: scan and convolution (mamba-ssm, causal-conv1d), attention (Transformer Engine) and cuBLAS add in a fixed order
FIXED_ORDER = {
    "MAMBA_DETERMINISTIC": "1",
    "CAUSAL_CONV1D_DETERMINISTIC": "1",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
STEPS = 12
#: widths at which kernels share their sums out over programs
WIDE = (
    ("\n  hidden_size: 64", "\n  hidden_size: 512"),
    ("\n  ffn_hidden_size: 96", "\n  ffn_hidden_size: 2048"),
    ("num_attention_heads: 4", "num_attention_heads: 8"),
    ("head_dim: 16\n  mamba", "head_dim: 64\n  mamba"),  # attention's and Mamba's
    ("mamba_num_heads: 8", "mamba_num_heads: 16"),
    ("mamba_state_dim: 16", "mamba_state_dim: 128"),
    ("seq_length: 64", "seq_length: 512"),
    ("tokens: 6144 # 12 steps", "tokens: 49152"),
    ("warmup_tokens: 1024", "warmup_tokens: 8192"),
    ("init_std: 0.1", "init_std: 0.02"),
    ("peak_lr: 1e-2", "peak_lr: 1e-3"),
)
WIDTH = 1024 if ON_GPU else 48
#: model or optimizer -> changes of the small recipe
KINDS: dict[str, tuple[tuple[str, str], ...]] = {
    "hybrid": (),
    "muon": (("optim: {", "optim: {name: muon, qk_clip: 1, "),),
    "experts": (
        ("family: nemotron_h", "family: pruned"),
        ("pattern: M-M*-", "pattern: MM-*E"),
        (
            "\n  conv_kernel",
            f"\n  num_experts: 4\n  experts_per_token: 2\n  expert_hidden_size: {WIDTH}"
            f"\n  shared_expert_hidden_size: {WIDTH}\n  expert_scaling: 1.5\n  conv_kernel",
        ),
    ),
    "parallel": (
        ("family: nemotron_h", "family: falcon_h1"),
        ("pattern: M-M*-", "pattern: PSPS"),
        (
            "\n  conv_kernel",
            "\n  multipliers: {rule: falcon_h1}\n  position_embedding: rope\n  rope_base: 10000"
            "\n  rope_percent: 1.0\n  conv_kernel",
        ),
    ),
    "linear": (("family: nemotron_h", "family: pruned"), ("pattern: M-M*-", "pattern: M-ML*-L")),
    "llama": (
        ("family: nemotron_h", "family: pruned"),
        ("pattern: M-M*-", "pattern: 'M*S*S'"),
        (
            "\n  conv_kernel",
            "\n  position_embedding: rope\n  rope_base: 10000\n  rope_percent: 1.0\n  qkv_bias: true\n  qk_norm: true"
            "\n  tied_embeddings: true\n  conv_kernel",
        ),
    ),
}
COUNTED = "mamba: 2, attention: 1, ffn: 2, parameters: 163376"
#: of each of these models at the widths of the GPU and of the CPU
COUNTS = {
    "hybrid": ("mamba: 2, attention: 1, ffn: 2, parameters: 9080928", COUNTED),
    "muon": ("mamba: 2, attention: 1, ffn: 2, parameters: 9080928", COUNTED),
    "experts": (
        "mamba: 2, attention: 1, ffn: 1, experts: 1, parameters: 12228708, active: 10131556",
        "mamba: 2, attention: 1, ffn: 1, experts: 1, parameters: 182068, active: 169780",
    ),
    "parallel": (
        "mamba: 0, attention: 0, ffn: 0, parallel: 2, swiglu: 2, parameters: 11832928",
        "mamba: 0, attention: 0, ffn: 0, parallel: 2, swiglu: 2, parameters: 187888",
    ),
    "linear": (
        "mamba: 2, attention: 1, ffn: 2, linear: 2, parameters: 9606240",
        "mamba: 2, attention: 1, ffn: 2, linear: 2, parameters: 171696",
    ),
    "llama": (
        "mamba: 1, attention: 2, ffn: 0, swiglu: 2, parameters: 9721136",
        "mamba: 1, attention: 2, ffn: 0, swiglu: 2, parameters: 125208",
    ),
}


class Processes:
    """Programs in processes of their own, with the interface of `forks.Forks`: a fork would inherit the GPU's state."""

    def __init__(self) -> None:
        self.environment: dict[str, str] = {}

    def run(self, program: str, *arguments: str, folder: Path, name: str, ranks: int = 1) -> int:
        """Run a script or a module on ranks and wait; see `Forks.run`."""
        command = [program] if program.endswith(".py") else ["-m", program]
        with contextlib.ExitStack() as stack:
            out, err = (stack.enter_context((folder / f"{name}.{end}").open("w")) for end in ("out", "err"))
            processes = []
            for own in environments(ranks, ranks > 1):
                environment = {**os.environ, **self.environment, **own}
                begun = subprocess.Popen(
                    [sys.executable, *command, *arguments], cwd=folder, stdout=out, stderr=err, env=environment
                )
                stack.callback(begun.kill)
                processes.append(begun)
            codes = [process.wait(600) for process in processes]
        return next((code for code in codes if code), 0)


PROCESSES = Processes()


def recipe(small: small_run.Small, name: str, *changes: tuple[str, str], kind: str = "hybrid") -> Path:
    """Write the recipe of the run `name`, with the counts of its model."""
    path = small.variant(name, *(WIDE if ON_GPU else ()), *KINDS[kind], *changes)
    text = path.read_text()
    assert COUNTED in text
    path.write_text(text.replace(COUNTED, COUNTS[kind][not ON_GPU]))
    return path


def run_checks(folder: Path, checks: Sequence[Callable[[small_run.Small], None]]) -> None:
    """Prepare the data once and do every check."""
    forks, small_run.FORKS = small_run.FORKS, PROCESSES
    try:
        small = small_run.prepared(folder)
        for check in checks:
            check(small)
            print(f"{check.__name__}: passed", flush=True)
    finally:
        small_run.FORKS = forks


def main(checks: Sequence[Callable[[small_run.Small], None]]) -> None:
    """Do the checks that the arguments name, all without any, and say which failed."""
    chosen = [check for check in checks if not sys.argv[1:] or check.__name__ in sys.argv[1:]]
    failed = []
    for check in chosen:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                run_checks(Path(scratch), [check])
            except AssertionError as error:
                failed.append(check.__name__)
                line = traceback.extract_tb(error.__traceback__)[-1]
                print(f"{check.__name__}: FAILED at line {line.lineno}: {line.line}\n{error}", flush=True)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
