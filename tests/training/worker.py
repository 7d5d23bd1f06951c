"""Run a recipe as `nemo llm` does and record what each step did, and the weights before the first (`start.pt`).

`worker.py RECIPE [kill=STEP] [signal=STEP:RANK:NAME] [key=value ...]`: overrides of the built recipe are dotted; `kill`
ends the process with SIGKILL right after that step, `signal` sends a signal to one rank during it. Each step appends to
`steps.jsonl` beside the run: the loss, gradient norm and learning rate as exact hexadecimal floats, AdamW's betas,
epsilon and weight decay, and the numbers of the samples that this rank read.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
from pathlib import Path

from nemotron_h.runtime import quiet

quiet.hush()

import fiddle as fdl  # noqa: E402
import lightning.pytorch as pl  # noqa: E402
import nemo_run as run  # noqa: E402
import torch  # noqa: E402
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402

from nemotron_h.compose import compose  # noqa: E402
from nemotron_h.data.datamodule import WindowDataset  # noqa: E402
from nemotron_h.data.preference_module import PairDataset  # noqa: E402
from nemotron_h.data.sft_module import PackedDataset  # noqa: E402
from nemotron_h.errors import UserError  # noqa: E402
from nemotron_h.training import distill, preference, pretrain, sft  # noqa: E402
from nemotron_h.training.callbacks.run_record import change  # noqa: E402

#: a checkpoint is written by this process, so its results need no process of their own (three seconds a run)
filesystem_async._results_queue = queue.Queue()
READ: list[int] = []


def record_reads(dataset: type) -> None:
    """Have a dataset note what training reads."""
    getitem = dataset.__getitem__

    def recording(self, index):
        if self.training:
            READ.append(index)
        return getitem(self, index)

    dataset.__getitem__ = recording


record_reads(WindowDataset)
record_reads(PackedDataset)
record_reads(PairDataset)


class Recorder(pl.Callback):
    """Append a line per step; kill or signal the process when told."""

    def __init__(self, kill: int | None, told: str | None) -> None:
        self.kill = kill
        self.told = told.split(":") if told else None

    def on_train_start(self, trainer, pl_module) -> None:
        if not trainer.global_step and trainer.world_size == 1:
            weights = {name: weight.detach().clone() for name, weight in pl_module.named_parameters()}
            torch.save(weights, Path(trainer.checkpoint_callback.dirpath).parents[1] / "start.pt")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if self.told and (trainer.global_step + 1, trainer.global_rank) == (int(self.told[0]), int(self.told[1])):
            os.kill(os.getpid(), getattr(signal, self.told[2]))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        metrics = trainer.callback_metrics
        if trainer.global_rank == trainer.world_size - 1:  # the last pipeline stage has the loss
            record = {
                "step": trainer.global_step,
                "loss": float(metrics["reduced_train_loss"]).hex(),
                "grad_norm": float(metrics["grad_norm"]).hex(),
                "lr": float(trainer.optimizers[0].param_groups[0]["lr"]).hex(),
                "adam": [[*g["betas"], g["eps"], g["weight_decay"]] for g in trainer.optimizers[0].param_groups],
                "samples": list(READ),
            }
            if isinstance(pl_module, preference.PreferenceModel):
                record["margin"] = pl_module.training_loss_reduction.metrics()["reward_margin"].hex()
            path = Path(trainer.checkpoint_callback.dirpath).parents[1] / "steps.jsonl"
            with path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        READ.clear()
        if trainer.global_step == self.kill:
            os.kill(os.getpid(), signal.SIGKILL)


def main(recipe: str, *options: str) -> None:
    """Build, override, run."""
    composed = compose(recipe)
    builders = {
        "pretrain": pretrain.build,
        "sft": sft.build,
        "preference": preference.build,
        "distill": distill.build,
    }
    task = builders[composed.stage](composed)
    kill = told = None
    changed = []
    for option in options:
        key, value = option.split("=", 1)
        if key == "kill":
            kill = int(value)
            continue
        if key == "signal":
            told = value
            continue
        changed.append(option)
    change(task, changed, "worker.py")
    task.trainer.callbacks.insert(0, run.Config(Recorder, kill=kill, told=told))
    try:
        fdl.build(task)()
    except UserError as error:
        print(error, file=sys.stderr)
        os._exit(error.EXIT_CODE)


if __name__ == "__main__":
    main(*sys.argv[1:])
