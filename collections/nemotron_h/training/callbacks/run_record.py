"""The record of a run: what was trained, with which versions and data, and what came out."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fiddle as fdl
import lightning.pytorch as pl
import nemo_run as run
import torch

from nemotron_h.checkpoint.adapters import describe_base
from nemotron_h.checkpoint.reader import read_record
from nemotron_h.core.files import whole_file, write_json
from nemotron_h.platform import hardware
from nemotron_h.recipe.compose import to_yaml
from nemotron_h.schema.recipe import command_of
from nemotron_h.training import settings, trackers
from nemotron_h.training.callbacks.embedding_rows import EmbeddingRows
from nemotron_h.training.callbacks.progress import TERMS, StageMetrics, Throughput

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
RECIPE = "recipe.yaml"
#: the last values that a record keeps
METRICS = ("reduced_train_loss", "val_loss", *TERMS)


def versions() -> dict[str, str]:
    """Return the installed versions of what decides a run's numbers; absent packages are left out."""
    found = {"python": platform.python_version()}
    for package in VERSIONED:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return the commit of the repository that holds `folder`, and whether files differ; None outside of one."""

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *args], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "modified": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def plain(value: Any) -> Any:
    """Return plain JSON containers of a configuration tree; other objects become their text."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, str | int | float | bool | type(None)):
        return value
    return str(value)


class RunRecord(pl.Callback):
    """Write `run.json` and `recipe.yaml` at the start and the end of a run, and beside each checkpoint.

    A resumed run goes on with its checkpoint's record: the metrics that it measured last, and in `changes` every
    setting that a resume changed, with the step from which the new value holds.

    Args:
        recipe: the resolved recipe, as plain containers; its `overrides` hold what was changed in the built task.
    """

    def __init__(self, recipe: dict[str, Any]) -> None:
        super().__init__()
        self.recipe = recipe
        self.started = time.time()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Note what does not change during this process."""
        resumed = read_record(Path(str(trainer.ckpt_path))) if trainer.ckpt_path else {}
        self.metrics, self.changes = resumed.get("metrics", {}), resumed.get("changes", [])
        self.start = {key: resumed[key] for key in ("embedding_rows",) if key in resumed}
        self.settings = plain(settings_in_force(trainer, pl_module))
        self.changed = changed_settings(resumed["settings"], self.settings) if "settings" in resumed else {}
        if self.changed:
            self.changes = [*self.changes, {"from_step": resumed["step"], **self.changed}]
        self.unrecorded = bool(resumed) and "settings" not in resumed
        self.fixed = {
            "command": sys.argv,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(self.started)),
            "versions": versions(),
            "hardware": hardware.describe(),
            "git": git_state(Path(__file__).parent),
            "recipe": plain(self.recipe),
        }

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the record, so that it exists from the first step on; a resumed run says what it changes."""
        if trainer.is_global_zero:
            self.write(trainer, self.path(trainer))
            trackers.begin(trainer, self.described(trainer), self.path(trainer).parent)
            for line in self.announcement(trainer):
                print(line)

    def described(self, trainer: pl.Trainer) -> trackers.Described:
        """Return what trackers show of the run beside its metrics."""
        git = self.fixed["git"] or {}
        tags = {"stage": self.recipe["stage"], "hardware": trackers.hardware(trainer.world_size)}
        tags |= {"git_commit": git["commit"]} if git else {}
        text = recipe_text(self.recipe, self.path(trainer).with_name(RECIPE), self.changes)
        return trackers.Described(self.recipe, text, tags, repeats=not self.changed)

    def announcement(self, trainer: pl.Trainer) -> Iterator[str]:
        """Yield a line for each setting that holds from this step on."""
        if self.unrecorded:
            yield "the checkpoint does not record the settings that it was trained with: the recipe's hold from now on"
        if self.changed:
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            yield f"changed from step {trainer.global_step:,} on (learning rate of the next step: {rate:.3g}):"
            yield from (f"  {line}" for line in described(self.changed))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the record of the finished run."""
        if trainer.is_global_zero:
            complete = trainer.global_step >= trainer.max_steps
            self.write(trainer, self.path(trainer), "finished" if complete else "trainer.max_time")

    @staticmethod
    def path(trainer: pl.Trainer) -> Path:
        """Return `<run>/run.json`."""
        return Path(trainer.checkpoint_callback.dirpath).parent / "run.json"

    def write(self, trainer: pl.Trainer, path: Path, ended: str | None = None) -> None:
        """Write the record as it is now.

        Args:
            ended: `finished`, or why the process stops before; None while it trains, and beside checkpoints.
        """
        strategy, data, config = trainer.strategy, trainer.datamodule, trainer.lightning_module.config
        metrics = {
            key: float(value)
            for key, value in trainer.callback_metrics.items()
            if key in METRICS and torch.is_tensor(value)
        }
        for callback in trainer.callbacks:
            if isinstance(callback, StageMetrics):
                metrics |= callback.record()
        self.metrics = {**self.metrics, **metrics}
        record = {
            **self.fixed,
            "settings": self.settings,
            "changes": self.changes,
            "step": trainer.global_step,
            "max_steps": trainer.max_steps,
            "ended": ended,
            "seconds": round(time.time() - self.started, 1),
            "layout": {
                "world_size": trainer.world_size,
                "tensor": strategy.tensor_model_parallel_size,
                "pipeline": strategy.pipeline_model_parallel_size,
                **({"context": strategy.context_parallel_size} if strategy.context_parallel_size > 1 else {}),
                **({"expert": strategy.expert_model_parallel_size} if config.num_experts else {}),
                "sequence": strategy.sequence_parallel,
            },
            "model": plain(vars_of(config)),
            **adapter_of(config, strategy),
            **config.record(),
            **next((cb.record() for cb in trainer.callbacks if isinstance(cb, EmbeddingRows)), self.start),
            "data": data.record(),
            "metrics": self.metrics,
            "save": last.record() if (last := getattr(trainer.checkpoint_callback, "last", None)) else None,
            "throughput": next((cb.record() for cb in trainer.callbacks if isinstance(cb, Throughput)), None),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        recipe = path.with_name(RECIPE)
        with whole_file(recipe) as temporary:
            temporary.write_text(recipe_text(self.recipe, recipe, self.changes))
        write_json(path, record)


def recipe_text(recipe: dict[str, Any], path: Path, changes: Sequence[Mapping[str, Any]]) -> str:
    """Return the recipe as a YAML file that runs again, and says how, and what of it a resume changed."""
    changed = "".join(
        f"# From step {change['from_step']} on: {line}\n"
        for change in changes
        for line in described({key: pair for key, pair in change.items() if key != "from_step"})
    )
    if changed:
        changed = (
            f"# A resume changed settings; run again, the recipe has the new values from its first step on.\n{changed}"
        )
    return (
        "# The complete recipe of a run; `overrides` is what its command line set beyond its keys. To run it again:\n"
        f"#   cd {shlex.quote(str(Path.cwd()))}\n"
        f"#   {command_of(recipe['stage'], path)} log.dir=ANOTHER\n"
        "# More settings may follow; later ones win. run.json, beside this file, has versions and data hashes.\n"
        + changed
        + to_yaml(recipe)
    )


def change(task: run.Partial, changed: Sequence[str], where: str) -> None:
    """Set values of a built task by their dotted names, as a command line does, and note them in its record.

    Errors:
        UserError: names `where`, the key and the nearest known one.
    """
    settings.apply(task, changed, where)
    note(task, changed)


def note(task: run.Partial, changed: Sequence[str]) -> None:
    """Add settings that were made in a built task to its record, inside the task itself: they travel with it.

    Args:
        task: of `build`, the settings applied; one without a `RunRecord` is left alone.
        changed: in the order in which they were applied.
    """
    for callback in getattr(getattr(task, "trainer", None), "callbacks", None) or []:
        if isinstance(callback, fdl.Buildable) and fdl.get_callable(callback) is RunRecord:
            overrides = settings.merged(callback.recipe["overrides"], changed)
            callback.recipe = {**callback.recipe, "overrides": overrides}


def vars_of(config: Any) -> dict[str, Any]:
    """Return the definition that the built model follows."""
    return dataclasses.asdict(config.definition())


def adapter_of(config: Any, strategy: Any) -> dict[str, Any]:
    """Return the adapter's settings and its base checkpoint, which the checkpoints of an adapted model lack."""
    if config.adapter is None or strategy.adapter_base is None:
        return {}
    return {"adapter": {**plain(dataclasses.asdict(config.adapter)), "base": describe_base(strategy.adapter_base)}}


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
        "init.repair_embeddings": strategy.repair_embeddings,
        "precision": getattr(trainer.precision_plugin, "recipe", trainer.precision),
        "parallel.ranks": trainer.world_size,
        "parallel.tensor": strategy.tensor_model_parallel_size,
        "parallel.pipeline": strategy.pipeline_model_parallel_size,
        **({"parallel.context": strategy.context_parallel_size} if strategy.context_parallel_size > 1 else {}),
        "parallel.sequence": strategy.sequence_parallel,
        **({"parallel.expert": strategy.expert_model_parallel_size} if module.config.num_experts else {}),
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
