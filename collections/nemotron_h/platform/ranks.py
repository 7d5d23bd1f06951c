"""Ranks of this machine: whether this process is one, and whether a layout fits. Imports torch only to count GPUs."""

from __future__ import annotations

import os

from nemotron_h.core.errors import UserError

#: what launchers tell each of their processes: how many there are of them (torchrun, srun, mpirun)
RANKS = ("WORLD_SIZE", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


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
