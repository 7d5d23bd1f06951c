"""The settings that decide how a run trains on, by recipe key, and in which of them it differs from its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl

Changes = dict[str, list[Any]]


def settings_in_force(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
    """Return recipe key -> value, as trainer, data, optimizer and model were built with them.

    A key that changes the numbers of the next step belongs here. The model, the order of the data and an adapter's
    shape do not: a run that resumes with others is refused, or declares it (`resume.blend_change`).
    """
    strategy = trainer.strategy
    return {
        "trainer.max_steps": trainer.max_steps,
        "init_seed": module.config.init_seed,
        "init.checkpoint": strategy.init_checkpoint,
        "precision": getattr(trainer.precision_plugin, "recipe", trainer.precision),
        "parallel.ranks": trainer.world_size,
        "parallel.tensor": strategy.tensor_model_parallel_size,
        "parallel.pipeline": strategy.pipeline_model_parallel_size,
        "parallel.sequence": strategy.sequence_parallel,
        **trainer.datamodule.settings(),
        **{f"optim.{key}": value for key, value in getattr(module.optim, "settings", {}).items()},
        **module.settings(),
    }


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """Return key -> [value before, value now] where they differ; a side that lacks the key has None."""
    return {key: [before.get(key), now.get(key)] for key in {**before, **now} if before.get(key) != now.get(key)}


def described(changes: Changes) -> list[str]:
    """Return a line for each change."""
    return [f"{key}: {before} -> {now}" for key, (before, now) in changes.items()]
