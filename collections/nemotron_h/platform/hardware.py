"""Describe this machine, and check that it can run FP8 through Transformer Engine; say what to do if not."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from packaging.version import Version

from nemotron_h.core.errors import UserError
from nemotron_h.core.units import GIB

logger = logging.getLogger(__name__)

#: FP8 precision -> compute capability, Transformer Engine (as megatron-core asks for it) and CUDA that it needs
NEEDS = {
    "fp8_current_scaling": ((8, 9), "2.2", "12.1"),
    "fp8_blockwise": ((9, 0), "2.3", "12.9"),
}
#: what the tests and measurements were made with
TESTED = "2.11.0"
ELSE = "or set precision=bf16, or precision_options.fp8_backend=emulate (float8 casts around float32 products: slow)"
INSTALL = f"pip install --no-build-isolation 'transformer-engine[pytorch]=={TESTED}'"


def describe() -> dict[str, Any]:
    """Return the names of processor and GPUs of this machine, and how much it has: cores, memory in GiB."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.is_file() else []
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0  # `platform.cpu` gives a CPU the number 1
    return {
        "cpu": names[0].partition(":")[2].strip() if names else "",
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "gpus": [torch.cuda.get_device_name(index) for index in range(count)],
    }


def check_engine(precision: str) -> None:
    """Check this process's GPUs and its Transformer Engine.

    Errors:
        UserError: no GPU, one without FP8, GPUs of several kinds, or Transformer Engine missing, failing or too old;
            names the remedy.
    """
    if not torch.cuda.is_available():
        raise UserError(
            f"{precision} with fp8_backend=te needs a GPU, and PyTorch sees none",
            hint="leave precision_options.fp8_backend out to emulate it on the CPU, or set precision=bf16",
        )
    capability, engine, cuda = NEEDS[precision]
    found = {}
    for index in range(torch.cuda.device_count()):
        found.setdefault(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index))
    check_one_kind(list(found))
    for name, has in found.items():
        if has < capability:
            raise UserError(
                f"{precision} needs a compute capability of {_dotted(capability)}; {name} has {_dotted(has)}",
                hint=f"run on H100, H200 or newer GPUs, {ELSE}",
            )
    if Version(str(torch.version.cuda)) < Version(cuda):
        raise UserError(
            f"{precision} needs CUDA {cuda} or newer, this PyTorch was built for {torch.version.cuda}",
            hint=f"install a PyTorch for CUDA {cuda} or newer, {ELSE}",
        )
    check_import(precision, engine)


def check_one_kind(names: Sequence[str]) -> None:
    """Refuse a mixture: ranks would wait for the slowest, and may lack FP8."""
    kinds = sorted(set(names))
    if len(kinds) > 1:
        raise UserError(
            f"FP8 runs need GPUs of one kind; here are {', '.join(kinds)}",
            hint="choose those of one kind with CUDA_VISIBLE_DEVICES, or through the scheduler",
        )


def check_import(wanted: str, least: str, otherwise: str = ELSE) -> None:
    """Check that Transformer Engine is there, imports, and is new enough.

    Args:
        wanted: what needs it.
        least: its oldest release that has that.
        otherwise: what to do without it.
    """
    try:
        version = importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"{wanted} needs Transformer Engine, which is not installed", hint=f"{INSTALL}; {otherwise}"
        ) from error
    if Version(version) < Version(least):
        raise UserError(
            f"{wanted} needs Transformer Engine {least} or newer; {version} is installed",
            hint=f"{INSTALL}; {otherwise}",
        )
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # a library built for another torch or CUDA fails in many ways; the reason is reported
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{wanted} needs Transformer Engine; {version} is installed and does not import: {reason[:200]}",
            hint=f"it is built for one torch and CUDA, here {torch.__version__}: {INSTALL} --force-reinstall; "
            f"{otherwise}",
        ) from error
    if version != TESTED:
        logger.warning(f"Transformer Engine {version}: this release was tested with {TESTED}")


def check_engine_does_not_break_imports() -> None:
    """Check that Transformer Engine imports or is absent: NeMo imports it in every run, and takes only an `ImportError`
    for its absence.

    Errors:
        UserError: it is installed and fails in another way, such as a CUDA library that does not load.
    """
    try:
        version = importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        return
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"NeMo does not import, because Transformer Engine {version} is installed and fails: {reason[:200]}",
            hint=f"{INSTALL} --force-reinstall; or pip uninstall transformer-engine to run without it",
        ) from error


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
