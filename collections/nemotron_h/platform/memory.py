"""Memory that is there, and an early word where a model does not fit into it."""

from __future__ import annotations

import psutil

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.core.errors import UserError
from nemotron_h.core.units import GIB


def available(device: str = "cpu") -> int:
    """Return the bytes that can be had now: of a GPU, or of this machine without swapping.

    Args:
        device: `cpu`, or `cuda`, maybe with a number.
    """
    if not device.startswith("cuda"):
        return psutil.virtual_memory().available
    import torch

    return torch.cuda.mem_get_info(torch.device(device))[0]


def total(device: str) -> int:
    """Return the bytes of a GPU, used or not; asked without taking any of it."""
    import torch

    return torch.cuda.get_device_properties(torch.device(device)).total_memory


def check_weights_fit(definition: ModelDefinition, value_bytes: int, device: str) -> None:
    """Refuse to load a whole model where its weights alone are larger than what is there.

    Args:
        value_bytes: of a weight: 2 in bfloat16, 4 in float32.
        device: see `available`.
    Errors:
        UserError: names what is needed and what is there.
    """
    need, there = definition.parameters * value_bytes, available(device)
    if need <= there:
        return
    where = "this machine" if device == "cpu" else f"GPU memory of {device}"
    dtype = {2: "bfloat16", 4: "float32"}.get(value_bytes, f"{value_bytes} bytes each")
    less = "" if value_bytes <= 2 else f" bfloat16 takes {definition.parameters * 2 / GIB:,.1f} GiB."
    raise UserError(
        f"the weights of {definition.name} take {need / GIB:,.1f} GiB in {dtype}, {where} has {there / GIB:,.1f} GiB "
        "free",
        hint=f"the whole model is held by one process: free memory, or take a larger machine or GPU.{less}",
    )


#: ours: bytes that training holds at the least: of a weight that is trained (bfloat16 weight and gradient, main weight
#: and moments in 6 bytes), of one that is frozen
TRAINED_BYTES, FROZEN_BYTES = 10, 2


def check_training_fits(trained: int, frozen: int, nodes: int, devices: int, gpus: bool, origin: str) -> None:
    """Refuse to train what certainly is larger than all the memory of so many machines like this, however it is split.

    Args:
        trained, frozen: weights of the run; a teacher's are frozen.
        nodes, devices: machines, and ranks on each.
        gpus: whether ranks are on GPUs, else they are processes on the CPU.
        origin: stands before the message.
    Errors:
        UserError: names what is needed and what is there.
    """
    need = (trained * TRAINED_BYTES + frozen * FROZEN_BYTES) // nodes
    there = devices * total("cuda") if gpus else available()
    if need > there:
        where = f"{devices} {'GPU' if devices == 1 else 'GPUs'} of this machine" if gpus else "this machine"
        raise UserError(
            f"{origin}: training takes at least {need / GIB:,.1f} GiB on each node (weights, gradients, optimizer), "
            f"{where}: {there / GIB:,.1f} GiB",
            hint="take more GPUs (parallel.devices), submit with executor=FILE.yaml "
            "(docs/clusters.md), or take a smaller model; nemotron-h plan says what each rank holds",
        )
