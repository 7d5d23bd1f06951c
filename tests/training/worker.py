"""Run a recipe as `nemo llm pretrain` does and record what each step did.

`worker.py RECIPE [kill=STEP] [signal=STEP:RANK:NAME] [key=value ...]`: overrides of the built recipe are dotted; `kill`
ends the process with SIGKILL right after that step, `signal` sends a signal to one rank during it. Each step appends to
`steps.jsonl` beside the run: the loss, gradient norm and learning rate as exact hexadecimal floats, and the numbers of
the samples that this rank read.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from nemotron_h.runtime import quiet

quiet.hush()

import fiddle as fdl  # noqa: E402
import lightning.pytorch as pl  # noqa: E402
import nemo_run as run  # noqa: E402

from nemotron_h.compose import compose  # noqa: E402
from nemotron_h.data.datamodule import WindowDataset  # noqa: E402
from nemotron_h.errors import UserError  # noqa: E402
from nemotron_h.training.callbacks.run_record import change  # noqa: E402
from nemotron_h.training.pretrain import build  # noqa: E402

READ: list[int] = []
_getitem = WindowDataset.__getitem__


def recording(self, index):
    """`WindowDataset.__getitem__` that notes what training reads."""
    if self.training:
        READ.append(index)
    return _getitem(self, index)


WindowDataset.__getitem__ = recording


class Recorder(pl.Callback):
    """Append a line per step; kill or signal the process when told."""

    def __init__(self, kill: int | None, told: str | None) -> None:
        self.kill = kill
        self.told = told.split(":") if told else None

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
                "samples": list(READ),
            }
            path = Path(trainer.checkpoint_callback.dirpath).parents[1] / "steps.jsonl"
            with path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        READ.clear()
        if trainer.global_step == self.kill:
            os.kill(os.getpid(), signal.SIGKILL)


def main(recipe: str, *options: str) -> None:
    """Build, override, run."""
    task = build(compose(recipe))
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
