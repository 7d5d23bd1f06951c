"""Commands typed inside a Slurm job: ranks are read from Slurm only where srun started them. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from nemotron_h.core.errors import UserError

#: ids above are no steps of srun: the batch script, an interactive shell (slurm.h, SLURM_MAX_NORMAL_STEP_ID)
_LAST_STEP = 0xFFFFFFF0
_OF_A_TASK = ("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")


def forget_tasks_of_others(environment: MutableMapping[str, str] = os.environ) -> None:
    """Drop what Slurm says of tasks from the environment of a process that is none of them.

    The shell of salloc and a batch script have the numbers of their job, from which Lightning would conclude that as
    many ranks were started, and wait for them. Without these, ranks are started as on any other machine.
    """
    step = environment.get("SLURM_STEP_ID", "")
    if "SLURM_JOB_ID" in environment and not (step.isdigit() and int(step) < _LAST_STEP):
        for name in _OF_A_TASK:
            environment.pop(name, None)


def user_error(error: Exception) -> UserError | None:
    """Return what Lightning says of a layout that is not Slurm's, or None where the error is of something else."""
    message, _, hint = str(error).partition(" HINT: ")
    return UserError(message, hint) if "SLURM" in message else None
