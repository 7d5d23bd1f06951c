"""Run a recipe as `nemo llm` does and record what each step did, and the weights before the first (`start.pt`).

`worker.py RECIPE [kill=STEP] [signal=STEP:RANK:NAME] [save=STEP:RANK:NAME] [write=STEP:RANK:NAME] [slow=SECONDS]
[bug=STEP] [copy=FOLDER] [busy=CYCLES] [report=drawn] [poison=STEP:PART[:RANK] ...] [key=value ...]`: overrides of the
recipe are dotted; `kill` ends the process with SIGKILL right after that step, once the checkpoint that is being written
is whole, so that a test knows where the next start continues, `signal` sends a signal to the process group of one rank
during it, `save` while its checkpoint is copied, `write` while threads write it, which may be an error's name too, that
the thread meets; `slow` are seconds that a thread takes for a megabyte, `bug` is an exception on every rank in that
step, `copy` writes a checkpoint of what was loaded, before the first step, `busy` has a GPU wait before it makes the
weights, `report` draws one, which is a sixth of a run's time, and `poison` is of `poison.py`. Each step appends to
`steps.jsonl` beside the run: the loss, gradient norm and learning rate as exact hexadecimal floats, AdamW's betas,
epsilon and weight decay, and the numbers of the samples that this rank read.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from nemotron_h.platform import quiet

quiet.hush()

import fiddle as fdl  # noqa: E402
import lightning.pytorch as pl  # noqa: E402
import nemo_run as run  # noqa: E402
import torch  # noqa: E402
from poison import Poison  # noqa: E402

from nemotron_h.checkpoint import folders  # noqa: E402
from nemotron_h.core.errors import UserError  # noqa: E402
from nemotron_h.data.feed.datamodule import WindowDataset  # noqa: E402
from nemotron_h.data.feed.preference_module import PairDataset  # noqa: E402
from nemotron_h.data.feed.sft_module import PackedDataset  # noqa: E402
from nemotron_h.model.module import NemotronHConfig  # noqa: E402
from nemotron_h.platform import checkpoint_writer  # noqa: E402
from nemotron_h.recipe.compose import compose  # noqa: E402
from nemotron_h.report import page  # noqa: E402
from nemotron_h.training.callbacks.run_record import change  # noqa: E402
from nemotron_h.training.stages import pretrain, sft  # noqa: E402
from nemotron_h.training.stages.distillation import stage as distill  # noqa: E402
from nemotron_h.training.stages.preference import stage as preference  # noqa: E402

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


#: 127.0.0.1 and ::1 as the kernel writes them
LOOPBACK = ("0100007F:", "00000000000000000000000001000000:")


def open_ports() -> list[str]:
    """Addresses other than loopback on which this process listens."""
    links = (str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())
    sockets = {link.removeprefix("socket:[").removesuffix("]") for link in links if link.startswith("socket:[")}
    lines = [
        line.split() for family in ("tcp", "tcp6") for line in Path(f"/proc/net/{family}").read_text().splitlines()
    ]
    listening = [fields[1] for fields in lines if fields[3] == "0A" and fields[9] in sockets]
    return [address for address in listening if not address.startswith(LOOPBACK)]


class Recorder(pl.Callback):
    """Append a line per step; kill or signal the process when told."""

    def __init__(
        self,
        kill: int | None = None,
        signal: str | None = None,
        save: str | None = None,
        write: str | None = None,
        slow: float = 0.0,
        bug: int | None = None,
        copy: str | None = None,
    ) -> None:
        self.kill, self.slow, self.bug, self.copy = kill, slow, bug, copy
        self.told = {"signal": signal, "save": save, "write": write}

    def watch_threads(self, rank: int) -> None:
        """Slow down the threads that write checkpoints, and disturb one in the middle of a file."""
        write, advance, writing = checkpoint_writer._write, checkpoint_writer.advance, threading.local()

        def watched(transforms, bucket):
            writing.step = folders.step_of(Path(bucket[0]).parents[1])
            writing.bytes = 0
            return write(transforms, bucket)

        def slowly(size: int) -> None:
            advance(size)
            time.sleep(self.slow * size / 1e6)
            before, writing.bytes = writing.bytes, writing.bytes + size
            if before <= 400_000 < writing.bytes:
                self.tell("write", writing.step, rank)

        checkpoint_writer._write, checkpoint_writer.advance = watched, slowly

    def tell(self, when: str, step: int, rank: int) -> None:
        told = self.told[when]
        if told and told.rsplit(":", 1)[0] == f"{step}:{rank}":
            name = told.rsplit(":", 1)[1]
            if hasattr(errno, name):
                raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))
            number = getattr(signal, name)
            subprocess.run(["kill", f"-{number}", "--", f"-{os.getpgrp()}"], start_new_session=True, check=True)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint) -> None:
        self.tell("save", trainer.global_step, trainer.global_rank)

    def on_train_start(self, trainer, pl_module) -> None:
        if self.slow or self.told["write"]:
            self.watch_threads(trainer.global_rank)
        if not torch.cuda.is_available():  # NCCL's ranks meet on the network's interface
            assert "TORCHELASTIC_RUN_ID" in os.environ or not open_ports(), open_ports()
        if self.copy:
            trainer.save_checkpoint(self.copy)
            trainer.strategy.checkpoint_io.maybe_finalize_save_checkpoint(blocking=True)
        if not trainer.global_step and trainer.world_size == 1:
            weights = {name: weight.detach().clone() for name, weight in pl_module.named_parameters()}
            torch.save(weights, Path(trainer.checkpoint_callback.dirpath).parents[1] / "start.pt")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.tell("signal", trainer.global_step + 1, trainer.global_rank)
        if trainer.global_step + 1 == self.bug:
            raise RuntimeError("a bug of a step")

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
            trainer.checkpoint_callback.finish(trainer)
            os.kill(os.getpid(), signal.SIGKILL)


def keep_busy(cycles: int) -> None:
    """Have the GPU wait so long before it does what making the model asks of it; the CPU goes on."""
    configure = NemotronHConfig.configure_model

    def busily(config, *args, **kwargs):
        if torch.cuda.is_available():
            torch.cuda._sleep(cycles)
        return configure(config, *args, **kwargs)

    NemotronHConfig.configure_model = busily


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
    given, numbers = {}, {"kill": int, "slow": float, "bug": int}
    changed, poison, draw = [], [], False
    for option in options:
        key, value = option.split("=", 1)
        if key in ("kill", "signal", "save", "write", "slow", "bug", "copy"):
            given[key] = numbers.get(key, str)(value)
        elif key == "poison":
            poison.append(value)
        elif key == "busy":
            keep_busy(int(value))
        elif key == "report":
            draw = True
        else:
            changed.append(option)
    change(task, changed, "worker.py")
    task.trainer.callbacks.insert(0, run.Config(Recorder, **given))
    if not draw:
        page.write = lambda folder: None
    if poison:
        task.trainer.callbacks.append(run.Config(Poison, told=poison))
    try:
        fdl.build(task)()
    except UserError as error:
        print(error, file=sys.stderr)
        os._exit(error.EXIT_CODE)


if __name__ == "__main__":
    main(*sys.argv[1:])
