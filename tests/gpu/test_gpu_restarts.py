"""On two GPUs with NCCL: a run of the `nemo` command, of which a rank is killed and later one is stopped, starts itself
again each time and ends with the weights and losses of a run that was left alone, bit for bit.

`python tests/gpu/test_gpu_restarts.py` does it without pytest in about three minutes, and prints the times from fault
to training. Without GPUs it tries itself on the CPU with gloo.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.extend(str(Path(__file__).parents[up] / name) for up, name in ((2, "demos"), (0, ".")))
from gpu_runs import FIXED_ORDER, PROCESSES, recipe, small_run
from weights import differing

try:
    import pytest

    few = torch.cuda.device_count() < 2
    pytestmark = [pytest.mark.gpu, pytest.mark.skipif(few, reason="needs two NVIDIA GPUs")]
except ImportError:
    pytest = None  # type: ignore[assignment]

TESTS = Path(__file__).parents[1]
#: between the second process's first step, which is of its set-up, and its end
FAULTS = [
    {"start": 0, "rank": 1, "step": 6, "kind": "kill"},
    {"start": 1, "rank": 1, "step": 10, "kind": "stop"},
]
HANG_AFTER = 15
LIMIT_S = 400


def command(small: small_run.Small, name: str, folder: Path, *settings: str) -> subprocess.Popen:
    """Start the command of a run on two ranks; its output goes to NAME.txt."""
    factory = f"nemotron_h_recipe(path={recipe(small, name)})"
    arguments = ["llm", "pretrain", "--factory", factory, "--yes", "parallel.devices=2", "log.every_steps=2", *settings]
    if shutil.which("python") is None:  # executors start it by this name
        (folder / "bin").mkdir(exist_ok=True)
        (folder / "bin/python").symlink_to(sys.executable)
        os.environ["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"
    ranks = {"PYTHONPATH": os.pathsep.join([str(TESTS / "training/in_ranks"), os.environ.get("PYTHONPATH", "")])}
    environment = {**os.environ, **FIXED_ORDER, **ranks, "RANK_FAULTS": json.dumps(FAULTS), "OMP_NUM_THREADS": "1"}
    environment["NEMORUN_HOME"] = str(folder / ".nemo_run")
    if not settings:
        del environment["RANK_FAULTS"]
    with (folder / f"{name}.txt").open("w") as file:
        module = [sys.executable, "-m", "nemotron_h.launch.command"]
        return subprocess.Popen([*module, *arguments], cwd=folder, env=environment, stdout=file, stderr=file)


def losses(small: small_run.Small, name: str) -> dict[int, float]:
    """Return step -> loss as the run reported it, of a repeated step the last."""
    lines = (small.run_dir(name) / "progress.jsonl").read_text().splitlines()
    return {step["step"]: step["loss"] for step in map(json.loads, lines)}


def run_check(folder: Path) -> None:
    """Train both runs beside each other, and compare."""
    begun = time.monotonic()
    forks, small_run.FORKS = small_run.FORKS, PROCESSES
    try:
        small = small_run.prepared(folder)
    finally:
        small_run.FORKS = forks
    restarts = ("executor=local", "executor.restarts=3", f"executor.hang_after={HANG_AFTER}")
    runs = {"alone": command(small, "alone", folder), "disturbed": command(small, "disturbed", folder, *restarts)}
    try:
        codes = {name: run.wait(LIMIT_S) for name, run in runs.items()}
    finally:
        for run in runs.values():
            run.kill()
        said = {name: (folder / f"{name}.txt").read_text(errors="replace") for name in runs}
        print(said["disturbed"][-6000:], flush=True)
    assert codes == {"alone": 0, "disturbed": 0}, (codes, said["alone"][-3000:])

    from nemotron_h.core.incidents import INCIDENTS, read_incidents
    from nemotron_h.report.incidents import processes, table

    run = small.run_dir("disturbed")
    for row in table(processes(run)):
        print(*row, sep="  ")
    print("ranks", (run / "rank_times.json").read_text(), "limits", (run / "hang_limits.json").read_text())
    assert [process.end.kind for process in processes(run)] == ["killed", "hang", "finished"]
    noted, _ = read_incidents(run / INCIDENTS)
    hang = next(incident for incident in noted if incident.kind == "restarted" and "SIGSTOP" in incident.message)
    stacks = (run / hang.file).read_text()
    assert "on_train_batch_start" in stacks.split("rank 1\n")[1], stacks  # a stop comes a little after its call
    print("rank 0 waited in:", *stacks.partition("Current thread")[2].splitlines()[1:4], sep="\n")
    assert losses(small, "alone") == losses(small, "disturbed")
    checkpoints = [small.run_dir(name) / "checkpoints/step-000012" for name in runs]
    assert differing(*checkpoints) == []
    print(f"the same losses and weights, bit for bit; {time.monotonic() - begun:.0f} s")


if pytest is not None:

    def test_restarts_on_gpus(tmp_path: Path) -> None:
        run_check(tmp_path)


if __name__ == "__main__":
    if importlib.util.find_spec("nvidia_resiliency_ext") is None:
        sys.exit("skipped: this Python has no nvidia-resiliency-ext")
    with tempfile.TemporaryDirectory() as scratch:
        run_check(Path(scratch))
