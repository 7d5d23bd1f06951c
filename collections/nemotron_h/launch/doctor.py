"""Report on this machine: what it has, what a run on it would use, and what to fix."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from nemotron_h.core.units import GIB
from nemotron_h.platform import memory

DISTRIBUTION = "nemotron-h-recipes"
GPU_EXTRAS = {
    "transformer-engine": "transformer_engine.pytorch",
    "mamba-ssm": "mamba_ssm",
    "causal-conv1d": "causal_conv1d",
}
#: what `make demo` takes: environment apart, 0.1 GB of data and two checkpoints; and the peak of a tiny training step
MIN_FREE_DISK_GIB, MIN_FREE_MEMORY_GIB = 2.0, 4.0


@dataclass(frozen=True)
class Finding:
    """Line of the report: `fail` means that training cannot run, `warn` that it can but not as well."""

    state: Literal["ok", "warn", "fail"]
    what: str
    found: str
    fix: str = ""


def examine(folder: Path, imports: bool = True) -> Iterator[Finding]:
    """Look at this machine.

    Args:
        folder: where runs would write; its disk is checked.
        imports: also import NeMo's training collection, which takes ten seconds and more.
    """
    yield _python()
    yield from _packages()
    yield from _device()
    yield from _room(folder)
    if imports:
        yield _imports()


def _python() -> Finding:
    version = platform.python_version()
    wanted = importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"]
    from packaging.specifiers import SpecifierSet

    if version not in SpecifierSet(wanted):
        return Finding("fail", "Python", version, f"use a Python {wanted}")
    return Finding("ok", "Python", version)


def _packages() -> Iterator[Finding]:
    wrong = []
    for text in importlib.metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version}, {requirement.specifier} is needed")
    if wrong:
        yield Finding("fail", "packages", "; ".join(wrong), "make install")
    else:
        main = ("nemo-toolkit", "megatron-core", "nemo_run", "torch", "lightning")
        yield Finding("ok", "packages", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in main))


def _device() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        described = ", ".join(f"{p.name} {p.total_memory / GIB:.0f} GiB" for p in names)
        mixed = len({p.name for p in names}) > 1
        yield Finding("warn" if mixed else "ok", "GPU", described, "runs need GPUs of one kind" if mixed else "")
        for package, module in GPU_EXTRAS.items():
            yield _extra(package, module)
    else:
        flags = _cpu_flags()
        speed = "AVX512-BF16: bf16 is the fast precision" if "avx512_bf16" in flags else "no AVX512-BF16: use fp32"
        yield Finding("ok", "device", f"CPU, {os.cpu_count()} cores, gloo; {speed}")
    from nemotron_h.ops.select import select_ops

    yield Finding("ok", "kernels", select_ops().origin)


def _extra(package: str, module: str) -> Finding:
    try:
        importlib.import_module(module)
        return Finding("ok", package, importlib.metadata.version(package))
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        return Finding("warn", package, f"does not import: {reason[:120]}", "pip install '.[cuda]'; runs are slower")


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def _room(folder: Path) -> Iterator[Finding]:
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(existing).free / GIB
    yield Finding(
        "ok" if free >= MIN_FREE_DISK_GIB else "fail",
        "disk",
        f"{free:.1f} GiB free in {existing}",
        "" if free >= MIN_FREE_DISK_GIB else f"free space: the demo needs {MIN_FREE_DISK_GIB:.0f} GiB",
    )
    available = memory.available() / GIB
    enough = available >= MIN_FREE_MEMORY_GIB
    yield Finding(
        "ok" if enough else "warn",
        "memory",
        f"{available:.1f} GiB available",
        "" if enough else f"the demo wants {MIN_FREE_MEMORY_GIB:.0f} GiB: set data.micro_batch_size=4",
    )


def _imports() -> Finding:
    try:
        from nemotron_h.launch import factories  # noqa: F401
    except Exception as error:
        return Finding("fail", "NeMo", f"does not import: {type(error).__name__}: {error}"[:200], "make install")
    return Finding("ok", "NeMo", "the training stack imports")
