"""Run a command with a fault: `injector.py FAULT nemo llm pretrain ...`; FAULT is JSON, as `cases.Fault` has it.

The fault comes from inside of the process at its moment, so a case repeats it: in a step, while a checkpoint is saved,
or at the N-th file that is opened, renamed or removed under the fault's folder. Each step is recorded as
`tests/training/worker.py` does. A file marks that the moment came; each rank's number of files is written at its end.
The runs that a pipeline starts are forks; the fault is of one of them where it says which.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forked_runs import ForkedRun

#: what the stand-in for a bug says
BUG = "stand-in for a bug in a step"
_FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")


class Injector:
    """The fault of this process: `fault` as `cases.Fault` has it; nothing on ranks and runs that it is not for."""

    def __init__(self, fault: dict[str, Any], run: int = 0) -> None:
        self.fault, self.kind, self.fired, self.files = fault, fault["kind"], False, 0
        self.process = os.getpid()
        ranks = fault["ranks"]
        here = run == fault["run"] and (ranks is None or int(os.environ.get("RANK", 0)) in ranks)
        self.here = self.kind != "none" and here
        sys.addaudithook(self.count)

    def count(self, event: str, arguments: tuple) -> None:
        """Count the files of the fault's folder; the fault comes at one of them."""
        if event in _FILE_EVENTS and self.fault["folder"] in str(arguments[0]) and os.getpid() == self.process:
            self.files += 1
            if self.files == self.fault["file"]:
                self.act()

    def at(self, part: str, step: int, act: Callable[[], None] | None = None) -> None:
        """Let the fault come, some time later where it says so, if this is its moment."""
        if (part, step) == (self.fault["part"], self.fault["step"]):
            if self.fault["delay"] and act is None:
                timer = threading.Timer(self.fault["delay"], self.act)
                timer.daemon = True
                timer.start()
            else:
                self.act(act)

    def act(self, act: Callable[[], None] | None = None) -> None:
        """Let the fault come, once."""
        if self.here and not self.fired:
            self.fired = True
            Path(self.fault["mark"]).touch()
            (act or getattr(self, self.kind))()

    def kill(self) -> None:
        os.kill(self.process, signal.SIGKILL)

    def term(self) -> None:
        os.kill(self.process, signal.SIGTERM)

    def interrupt(self) -> None:
        os.kill(self.process, signal.SIGINT)

    def interrupt_group(self) -> None:
        subprocess.run(["kill", "-INT", "--", f"-{os.getpgrp()}"], start_new_session=True, check=True)

    def kill_group(self) -> None:
        os.killpg(0, signal.SIGKILL)

    def stop(self) -> None:
        """Stop this process for a while."""
        again = f"sleep {self.fault['amount']}; kill -CONT {self.process}"
        subprocess.Popen(["sh", "-c", again], start_new_session=True)
        os.kill(self.process, signal.SIGSTOP)

    def stop_for_good(self) -> None:
        os.kill(self.process, signal.SIGSTOP)

    def bug(self) -> None:
        raise RuntimeError(BUG)

    def full(self) -> None:
        """Fill the disk of the fault's folder but for so many bytes."""
        fill(Path(self.fault["disk"]), int(self.fault["amount"]))

    def file_limit(self) -> None:
        """Let no file grow beyond so many bytes, as `ulimit -f` does."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(self.fault["amount"]), resource.RLIM_INFINITY))

    def clock(self) -> None:
        """Move the wall clock."""
        now, jump = time.time, self.fault["amount"]
        time.time = lambda: now() + jump


def fill(disk: Path, but: int) -> None:
    """Fill a file system but for so many bytes."""
    left = shutil.disk_usage(disk).free - but
    if left > 0:
        # what the run writes meanwhile is not counted
        with contextlib.suppress(OSError), (disk / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, left)


def watch(injector: Injector) -> None:
    """Have NeMo's trainer tell the injector of its steps, and record them."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
    import lightning.pytorch as pl
    import torch
    from megatron.core.utils import get_attr_wrapped_model
    from worker import Recorder

    Recorder.on_train_start = pl.Callback.on_train_start  # its file of first weights is not one of the run's

    class Moments(pl.Callback):
        """The moments of a step, and the faults that are of its model."""

        def at(self, part: str, step: int, pl_module) -> None:
            model = get_attr_wrapped_model(pl_module, "decoder", return_model_obj=True)

            @torch.no_grad()
            def weight() -> None:
                parameters = [p for p in model.parameters() if p.requires_grad]
                parameters[int(injector.fault["amount"] * len(parameters))].view(-1)[0] = torch.nan

            def activation() -> None:
                hook = model.decoder.layers[0].register_forward_hook(lambda *_: (hook.remove(), _poison(_[2]))[1])

            injector.at(part, step, {"nan_weight": weight, "nan_batch": activation}.get(injector.kind))

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            self.at("begin", trainer.global_step + 1, pl_module)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            self.at("end", trainer.global_step, pl_module)

        def on_save_checkpoint(self, trainer, pl_module, checkpoint) -> None:
            self.at("save", trainer.global_step, pl_module)

    fit = pl.Trainer.fit

    def watched(self: pl.Trainer, *args: Any, **kwargs: Any) -> Any:
        self.callbacks[:0] = [Recorder(), Moments()]
        return fit(self, *args, **kwargs)

    pl.Trainer.fit = watched


def _poison(output: Any) -> Any:
    """Return a layer's output with a NaN in the first of its tensors."""
    if isinstance(output, tuple):
        return (_poison(output[0]), *output[1:])
    poisoned = output.clone()
    poisoned.view(-1)[0] = float("nan")
    return poisoned


def nemo(injector: Injector) -> None:
    """Run `nemo`, watched."""
    watch(injector)
    from nemotron_h.launch.command import main as command

    command()


def fork_runs(fault: dict[str, Any]) -> None:
    """Have the runs that a pipeline starts be forks."""
    from nemotron_h.launch import runs

    started = 0

    def start(*arguments: Any, **named: Any) -> ForkedRun:
        nonlocal started
        started += 1
        return ForkedRun(lambda: nemo(Injector(fault, started)), *arguments, **named)

    runs.subprocess = type("subprocess", (), {**vars(subprocess), "Popen": staticmethod(start)})


def main(fault: str, program: str, *arguments: str) -> None:
    """Run the command as its console script does."""
    injector = Injector(json.loads(fault))
    sys.argv = [program, *arguments]
    try:
        if program == "nemo":
            nemo(injector)
            return
        from nemotron_h.cli.main import main as command
        from nemotron_h.data.prepare import sources

        sources.MIN_SHARD_BYTES = 1 << 14
        if arguments[0] == "minipuzzle":
            fork_runs(injector.fault)
        command()
    finally:
        Path(f"{injector.fault['mark']}.{os.environ.get('RANK', 0)}").write_text(str(injector.files))


if __name__ == "__main__":
    main(*sys.argv[1:])
