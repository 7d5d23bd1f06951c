"""The process of a rank: who started it, which layout fits, where its ranks meet, how a mistake ends it.

Imports torch only where there are GPUs to count, or ranks that meet.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import sys
from collections.abc import MutableMapping
from types import TracebackType
from typing import TYPE_CHECKING

from nemotron_h.core.errors import UserError, report, user_error

if TYPE_CHECKING:
    from torch.distributed import TCPStore

#: where ranks of one machine meet, out of reach of others
ADDRESS = "127.0.0.1"
#: what launchers tell each of their processes: how many there are of them (torchrun, srun, mpirun)
RANKS = ("WORLD_SIZE", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
#: ids above are no steps of srun: the batch script, an interactive shell (slurm.h, SLURM_MAX_NORMAL_STEP_ID)
_LAST_STEP = 0xFFFFFFF0
_OF_A_TASK = ("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")


def is_rank(ranks: int) -> bool:
    """Tell whether torchrun, srun, mpirun or a hand started this process as one of so many ranks."""
    return bool(os.environ.get("NODE_RANK")) or any(os.environ.get(name) == str(ranks) for name in RANKS)


def check_here(nodes: int, devices: int, origin: str = "", gpus: int | None = None) -> None:
    """Refuse a layout that one command on this machine cannot start.

    Args:
        nodes, devices: of the recipe: `parallel.nodes`, `parallel.devices`.
        origin: stands before the key.
        gpus: of this machine; None counts them. Without any, ranks are processes on the CPU.
    Errors:
        UserError: names the key, the number and what to set.
    """
    if nodes > 1:
        raise UserError(
            f"{origin}parallel.nodes = {nodes}: {nodes * devices:,} ranks, and this command starts them on one machine",
            hint="add executor=slurm or executor=FILE.yaml, which submits (docs/clusters.md); or set parallel.nodes=1 "
            "and a model and layout that this machine takes",
        )
    if gpus is None:
        import torch

        # where there are none, Megatron is told of one (platform/cpu.py)
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus and devices > gpus:
        raise UserError(
            f"{origin}parallel.devices = {devices}, this machine has {gpus} {'GPU' if gpus == 1 else 'GPUs'}",
            hint=f"set parallel.devices={gpus} and a layout that divides it, or submit with "
            "executor=FILE.yaml (docs/clusters.md)",
        )


def forget_tasks_of_others(environment: MutableMapping[str, str] = os.environ) -> None:
    """Drop what Slurm says of tasks from the environment of a process that is none of them.

    The shell of salloc and a batch script have the numbers of their job, from which Lightning would conclude that as
    many ranks were started, and wait for them. Without these, ranks are started as on any other machine.
    """
    step = environment.get("SLURM_STEP_ID", "")
    if "SLURM_JOB_ID" in environment and not (step.isdigit() and int(step) < _LAST_STEP):
        for name in _OF_A_TASK:
            environment.pop(name, None)


def slurm_error(error: Exception) -> UserError | None:
    """Return what Lightning says of a layout that is not Slurm's, or None where the error is of something else."""
    message, _, hint = str(error).partition(" HINT: ")
    return UserError(message, hint) if "SLURM" in message else None


def report_mistakes() -> None:
    """Have a mistake of the user, or a file that cannot be, end this process as it ends a command: one message, exit
    code 2. Other exceptions are shown as before.

    A job starts in nemo-run's runner, where an exception would be a traceback and exit code 1, as after a crash; a
    chain of jobs goes on after a crash, and not after a mistake.
    """
    before = sys.excepthook
    if getattr(before, "nemotron_h", False):
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        mistake = user_error(error)
        if mistake is not None:
            with contextlib.redirect_stderr(sys.__stderr__):  # whatever upstream has put in its place by now
                report(mistake)
            raise SystemExit(mistake.EXIT_CODE)  # the interpreter takes a hook's exit code for its own
        before(kind, error, trace)

    hook.nemotron_h = True  # type: ignore[attr-defined]
    sys.excepthook = hook


@functools.cache  # runs of one process meet at one port, as they do with PyTorch's
def local_store(port: int, rank: int) -> TCPStore:
    """Return a rank's store, whose server listens on loopback.

    PyTorch's own listens on every interface and asks nobody who he is, also where the ranks meet at 127.0.0.1.

    Args:
        port: the same on all ranks.
        rank: 0 has the server; the others wait for it as long as for PyTorch's.
    """
    from torch.distributed import TCPStore

    if rank:
        return TCPStore(ADDRESS, port, is_master=False)
    listener = socket.create_server((ADDRESS, port), backlog=1024)
    return TCPStore(ADDRESS, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
