"""Let faults come in the ranks of a command: Python imports this first where its folder is in PYTHONPATH.

`RANK_FAULTS` is a JSON list of `{"start": N, "rank": R, "step": S, "kind": KIND}`: in the N-th start of the ranks, from
0, before step S. Kinds are the names of `Faults`' methods.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import time
from typing import Any


class Faults:
    """The faults, by name."""

    def __init__(self, pl_module: Any) -> None:
        self.pl_module = pl_module

    def slow(self) -> None:
        """Take longer for each micro-batch from here on."""
        self.pl_module.register_forward_pre_hook(lambda *_: time.sleep(0.8))

    def kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def stop(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def hang(self) -> None:
        time.sleep(10_000)

    def bug(self) -> None:
        raise RuntimeError("stand-in for a bug in a step")


def watch() -> None:
    """Have NeMo's trainer let the faults of this process come."""
    import lightning.pytorch as pl

    own = {"start": int(os.environ["TORCHELASTIC_RESTART_COUNT"]), "rank": int(os.environ["RANK"])}
    faults = [fault for fault in json.loads(os.environ["RANK_FAULTS"]) if own.items() <= fault.items()]

    class Moments(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, index: int) -> None:
            for fault in faults:
                if fault["step"] == trainer.global_step + 1:
                    getattr(Faults(pl_module), fault["kind"])()

    fit = pl.Trainer.fit

    def watched(self: pl.Trainer, *args: Any, **kwargs: Any) -> Any:
        self.callbacks[:0] = [Moments()]
        return fit(self, *args, **kwargs)

    pl.Trainer.fit = watched


if "RANK_FAULTS" in os.environ and "RANK" in os.environ:
    run_module = runpy.run_module

    def run(*args: Any, **kwargs: Any) -> Any:
        watch()
        return run_module(*args, **kwargs)

    runpy.run_module = run
