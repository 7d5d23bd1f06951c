"""The record of a run: what was trained, with which versions and data, and what came out."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

VERSIONED = (
    "nemotron-h-recipes",
    "nemo-toolkit",
    "megatron-core",
    "lightning",
    "torch",
    "nemo_run",
    "transformer-engine",
    "mamba-ssm",
    "causal-conv1d",
)


def versions() -> dict[str, str]:
    """Installed versions of what decides a run's numbers; absent packages are left out."""
    found = {"python": platform.python_version()}
    for package in VERSIONED:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the repository that holds `folder`, and whether its files differ from it; None outside of one."""

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *args], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "modified": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def plain(value: Any) -> Any:
    """Plain JSON containers of a configuration tree; other objects become their text."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, str | int | float | bool | type(None)):
        return value
    return str(value)


class RunRecord(pl.Callback):
    """Write `run.json` at the start and the end of a run, and beside each checkpoint.

    Args:
        recipe: the resolved recipe, as plain containers; what the command line changed on top is in `command`.
    """

    def __init__(self, recipe: dict[str, Any]) -> None:
        super().__init__()
        self.recipe = recipe
        self.started = time.time()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Note what does not change during the run."""
        self.fixed = {
            "command": sys.argv,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(self.started)),
            "versions": versions(),
            "git": git_state(Path(__file__).parent),
            "recipe": plain(self.recipe),
        }

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The record exists from the first step on."""
        if trainer.is_global_zero:
            self.write(trainer, self.path(trainer))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The record of the finished run."""
        if trainer.is_global_zero:
            self.write(trainer, self.path(trainer))

    @staticmethod
    def path(trainer: pl.Trainer) -> Path:
        """`<run>/run.json`."""
        return Path(trainer.checkpoint_callback.dirpath).parent / "run.json"

    def write(self, trainer: pl.Trainer, path: Path) -> None:
        """Write the record as it is now."""
        strategy, data, config = trainer.strategy, trainer.datamodule, trainer.lightning_module.config
        metrics = {
            key: float(value)
            for key, value in trainer.callback_metrics.items()
            if key in ("reduced_train_loss", "val_loss") and torch.is_tensor(value)
        }
        record = {
            **self.fixed,
            "step": trainer.global_step,
            "max_steps": trainer.max_steps,
            "seconds": round(time.time() - self.started, 1),
            "layout": {
                "world_size": trainer.world_size,
                "tensor": strategy.tensor_model_parallel_size,
                "pipeline": strategy.pipeline_model_parallel_size,
                "sequence": strategy.sequence_parallel,
            },
            "model": plain(vars_of(config)),
            "data": data.record(),
            "metrics": metrics,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(record, indent=1))
        temporary.replace(path)


def vars_of(config: Any) -> dict[str, Any]:
    """The definition that the built model follows."""
    return dataclasses.asdict(config.definition())
