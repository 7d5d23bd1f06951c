"""List what the GPU's memory holds at the peak of a run, saves included.

After `nemotron-h data prepare --blend sample_small`, `python tests/gpu/peak_of_a_run.py --out FOLDER` pretrains the run
of `bench_saves.py` for a few steps with a checkpoint, and prints the peak of the allocator beside the plan's and its
parts, and the tensors that were there by the line that made them, largest first: those of before the second step, which
stay, and those that came since, at the moment of the peak.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import bench_saves
import fiddle as fdl
import lightning.pytorch as pl
import torch

from nemotron_h.core.units import GIB
from nemotron_h.planning.plan import make_plan
from nemotron_h.training.stages import pretrain

#: packages whose lines say what a tensor is for
PACKAGES = ("nemotron_h/", "megatron/core/", "transformer_engine/", "mamba_ssm/", "causal_conv1d/", "nemo/")


class History(pl.Callback):
    """Record each allocation, and what is there when the second step begins."""

    def setup(self, *_: Any, **__: Any) -> None:
        torch.cuda.memory._record_memory_history(max_entries=2_000_000, context="alloc", stacks="python")

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        if trainer.global_step == 1:
            self.before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            snapshot = torch.cuda.memory._snapshot()
            self.first = len(snapshot["device_traces"][0])
            self.there: Counter[str] = Counter()
            for block in (b for segment in snapshot["segments"] for b in segment["blocks"]):
                if block["state"] == "active_allocated":
                    self.there[line_of(block)] += block["size"]

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.peak = torch.cuda.max_memory_allocated()
        self.events = torch.cuda.memory._snapshot()["device_traces"][0][self.first :]


def line_of(event: dict[str, Any]) -> str:
    """Return the innermost line of a package that made an allocation."""
    frames = event.get("frames", [])
    for frame in frames:
        for package in PACKAGES:
            if package in frame["filename"]:
                return f"{package}{frame['filename'].split(package)[-1]}:{frame['line']} {frame['name']}"
    return frames[0]["name"] if frames else "?"


def at_peak(events: list[dict[str, Any]]) -> tuple[int, Counter[str]]:
    """Return the largest sum of what was allocated since the record began, and its bytes by line."""
    live: dict[int, dict[str, Any]] = {}
    total = largest = 0
    held: list[dict[str, Any]] = []
    for event in events:
        if event["action"] == "alloc":
            live[event["addr"]] = event
            total += event["size"]
            if total > largest:
                largest, held = total, []
        elif event["action"] == "free_completed":
            if total == largest and not held:
                held = list(live.values())
            freed = live.pop(event["addr"], None)
            total -= event["size"] if freed is None else freed["size"]
    by_line: Counter[str] = Counter()
    for event in held or live.values():
        by_line[line_of(event)] += event["size"]
    return largest, by_line


def main() -> None:
    """Train, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the run, made anew")
    parser.add_argument("--precision", default="bf16", help="of the recipe")
    parser.add_argument("settings", nargs="*", help="of the recipe, such as optim.name=muon")
    args = parser.parse_args()
    args.every = args.steps = 12
    folder = args.out.absolute() / "peak"
    shutil.rmtree(folder, ignore_errors=True)
    composed, history = bench_saves.recipe(args, folder, *args.settings), History()
    task = pretrain.build(composed)
    task.trainer.callbacks.insert(0, history)
    fdl.build(task)()
    shutil.rmtree(folder)
    plan = make_plan(composed, "h200")
    largest_stage = max(plan.stages, key=lambda stage: stage.peak)
    largest, by_line = at_peak(history.events)
    print(
        json.dumps(
            {
                "peak_gib": round(history.peak / GIB, 3),
                "planned_gib": round(largest_stage.peak / GIB, 3),
                "planned_parts_gib": {name: round(size / GIB, 3) for name, size in largest_stage.parts().items()},
                "before_gib": round(history.before / GIB, 3),
                "since_gib": round(largest / GIB, 3),
            }
        )
    )
    for title, lines in (("before the second step", history.there), ("since, at the peak", by_line)):
        print(title)
        for line, size in lines.most_common(24):
            print(f"{size / GIB:8.3f} GiB  {line}")


if __name__ == "__main__":
    main()
