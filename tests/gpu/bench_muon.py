"""What a step of Muon costs over one of AdamW, by tokens a step.

After `nemotron-h data prepare --blend demos/muon_budgets.yaml` (sample_small without a GPU),
`python tests/gpu/bench_muon.py --out FOLDER` pretrains the 8B's widths in 13 layers (1.77 B parameters; the tiny model
without a GPU) with each optimizer, a process each, in steps of one micro-batch and of many, up to 1 M tokens. It prints
the seconds of a step, what the optimizer's own part of them is, and the peak of the GPU's memory beside the plan's, as
lines of JSON, then the ratios.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from nemotron_h.platform import quiet

quiet.hush()

import bench_saves  # noqa: E402
import fiddle as fdl  # noqa: E402
import lightning.pytorch as pl  # noqa: E402
import torch  # noqa: E402

from nemotron_h.core.units import GIB  # noqa: E402
from nemotron_h.planning.plan import make_plan  # noqa: E402
from nemotron_h.training.stages import pretrain  # noqa: E402

#: sequences a step -> steps, and tokens of a sequence: 128 of 8,192 are 1,048,576
STEPS = {4: 12, 128: 3} if bench_saves.ON_GPU else {16: 12}
LENGTH = 8192 if bench_saves.ON_GPU else 512
#: a blend of which three steps are a run, and its vocabulary
ONE_PHASE = (
    "data.blend=demos/muon_budgets.yaml",
    "model.vocab_size=2048",
    "model.expect={mamba: 6, attention: 1, ffn: 6, parameters: 1_773_558_016}",
)
#: steps at the beginning that are not counted: kernels are compiled and states made
WARM_UP = 1


def wait() -> float:
    """Return the time once the GPU has done what it was given."""
    if bench_saves.ON_GPU:
        torch.cuda.synchronize()
    return time.monotonic()


class Watch(pl.Callback):
    """Take the time of each step, and of the optimizer's part in it."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.updates: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        optimizer = trainer.optimizers[0].mcore_optimizer
        step = optimizer.step_with_ready_grads

        def timed() -> Any:
            began = wait()
            done = step()
            self.updates.append(wait() - began)
            return done

        optimizer.step_with_ready_grads = timed
        self.last = wait()

    def on_train_batch_end(self, *_: Any) -> None:
        now = wait()
        self.steps.append(now - self.last)
        self.last = now


def train(optimizer: str, sequences: int, steps: int, folder: Path) -> dict[str, Any]:
    """Train, and return the measured values."""
    args = argparse.Namespace(every=100_000, steps=steps, precision="bf16")
    tokens = sequences * LENGTH
    composed = bench_saves.recipe(
        args,
        folder,
        f"optim.name={optimizer}",
        f"data.global_batch_size={sequences}",
        f"tokens={steps * tokens}",
        f"optim.warmup_tokens={tokens}",
        *(ONE_PHASE if bench_saves.ON_GPU else ()),
    )
    watch = Watch()
    task = pretrain.build(composed)
    task.trainer.callbacks.insert(0, watch)
    fdl.build(task)()
    counted = watch.steps[WARM_UP:]
    plan = max(stage.peak for stage in make_plan(composed, "h200").stages)
    return {
        "optimizer": optimizer,
        "tokens_a_step": tokens,
        "step_seconds": [round(each, 4) for each in counted],
        "median": round(median(counted), 4),
        "optimizer_seconds": round(median(watch.updates[WARM_UP:]), 4),
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 3) if bench_saves.ON_GPU else None,
        "planned_gib": round(plan / GIB, 3),
    }


def main() -> None:
    """Train with each optimizer in a process of its own, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs, made anew")
    parser.add_argument("--sequences", type=int, nargs="*", choices=STEPS, default=list(STEPS), help="of a step")
    parser.add_argument(
        "--one", nargs=3, metavar=("OPTIMIZER", "SEQUENCES", "STEPS"), help="train once, in this process"
    )
    args = parser.parse_args()
    folder = args.out.absolute() / "muon"
    shutil.rmtree(folder, ignore_errors=True)
    if args.one:
        optimizer, sequences, steps = args.one
        print(json.dumps(train(optimizer, int(sequences), int(steps), folder)))
        return
    results: dict[tuple[str, int], dict[str, Any]] = {}
    for sequences in args.sequences:
        steps = STEPS[sequences]
        for optimizer in ("adamw", "muon"):
            command = [sys.executable, __file__, "--out", str(args.out), "--one", optimizer, str(sequences), str(steps)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            line = done.stdout.strip().splitlines()[-1]
            print(line, flush=True)
            results[optimizer, sequences] = json.loads(line)
    for sequences in args.sequences:
        adamw, muon = results["adamw", sequences], results["muon", sequences]
        share = (muon["optimizer_seconds"] - adamw["optimizer_seconds"]) / adamw["median"]
        print(
            f"{adamw['tokens_a_step']:,} tokens a step: Muon's step takes {muon['median'] / adamw['median']:.4f} times "
            f"AdamW's; its optimizer adds {100 * share:.2f} % of AdamW's step"
        )


if __name__ == "__main__":
    main()
