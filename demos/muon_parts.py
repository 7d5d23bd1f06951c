"""What it is worth that Muon orthogonalizes a matrix in its block's parts: `python demos/muon_parts.py`.

After `nemotron-h data prepare --blend sample_small`, trains the hybrid of sweep `muon`, 4 M parameters, 120 steps, with
three seeds: in parts, and each matrix as one. Two runs at a time, each a process with one thread; about ten minutes on
two cores. Prints validation losses, and the RMS of the last updates by kind of matrix. Finished runs are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemotron_h.core.progress import STEPS, read_steps
from nemotron_h.report.run import read_run
from nemotron_h.sweep.rows import spread

WAYS, SEEDS = ("parts", "whole"), (1, 2, 3)
TOKENS = 245_760
SETTINGS = (
    *("model=hybrid_4m", f"tokens={TOKENS}", "data.global_batch_size=4", "data.micro_batch_size=4"),
    *("optim.name=muon", "optim.peak_lr=4e-3", "optim.final_lr=4e-5", f"optim.warmup_tokens={TOKENS // 10}"),
    *("checkpoint.every_steps=120", "log.validate_every_steps=60", "log.validation_batches=16", "log.trackers=[]"),
)


def train(way: str, seed: int, name: str, folder: Path) -> None:
    """Train a run in this process."""
    from nemotron_h.platform import quiet

    quiet.hush()
    import fiddle as fdl

    from nemotron_h.recipe.compose import compose
    from nemotron_h.training import muon
    from nemotron_h.training.stages import pretrain

    in_parts = muon.roles

    def as_one(model: Any) -> dict[Any, Any]:
        roles = in_parts(model)
        return {w: replace(role, matrix=replace(role.matrix, parts=(), groups=1)) for w, role in roles.items()}

    if way == "whole":
        muon.roles = as_one
    seeds = (f"init_seed={seed}", f"data.seed={seed}")
    fdl.build(pretrain.build(compose("nemotron_h_tiny", [*SETTINGS, *seeds, f"name={name}", f"log.dir={folder}"])))()


def runs(folder: Path) -> Iterator[tuple[str, int, Path]]:
    """Yield way, seed and folder of each run."""
    for way in WAYS:
        for seed in SEEDS:
            yield way, seed, folder / f"{way}-{seed}"


def main() -> None:
    """Train what is not there, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/muon_parts"), help="folder of the runs")
    parser.add_argument("--one", nargs=3, metavar=("WAY", "SEED", "NAME"), help="train this run, in this process")
    args = parser.parse_args()
    if args.one:
        way, seed, name = args.one
        train(way, int(seed), name, args.out)
        return

    def start(run: tuple[str, int, Path]) -> None:
        way, seed, folder = run
        record = folder / "run.json"
        if record.is_file() and json.loads(record.read_text()).get("ended") == "finished":
            return
        command = [sys.executable, __file__, "--out", str(args.out), "--one", way, str(seed), folder.name]
        with (args.out / f"{folder.name}.log").open("w") as log:
            subprocess.run(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
        print(f"{folder.name} is through", flush=True)

    args.out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(start, runs(args.out)))
    for way in WAYS:
        folders = [folder for each, _, folder in runs(args.out) if each == way]
        losses = [list(read_run(folder).validation.values())[-1] for folder in folders]
        print(f"{way}: validation loss {spread(losses)} ({', '.join(f'{loss:.3f}' for loss in losses)})")
        metrics = [read_steps(folder / STEPS)[0][-1].metrics for folder in folders]
        for key in (key for key in metrics[0] if key.startswith("update_rms/")):
            print(f"  {key}: {spread(each[key] for each in metrics)}")


if __name__ == "__main__":
    main()
