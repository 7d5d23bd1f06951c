"""Check a run before its model is built: its folder, which is locked, and its layout, memory and disk."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from nemo import lightning as nl
from nemo.utils.app_state import AppState

from nemotron_h.architecture.adapters import check_adapter, trained_parameters
from nemotron_h.architecture.context import check_context_parallel
from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.architecture.frozen import check_frozen, frozen_parameters
from nemotron_h.core import locks
from nemotron_h.core.errors import UserError, naming
from nemotron_h.core.incidents import INCIDENTS
from nemotron_h.core.progress import RANK_TIMES, STEPS
from nemotron_h.core.units import gib
from nemotron_h.platform.memory import check_training_fits
from nemotron_h.platform.trackers import check_trackers
from nemotron_h.recipe.checks import check_expert_layout, check_trainable
from nemotron_h.training import trackers
from nemotron_h.training.sections import LIMITS

#: bytes per parameter in a checkpoint: bf16 weights at most fp32, plus fp32 main weights and two Adam moments
CHECKPOINT_BYTES_PER_PARAMETER = 16
#: what errors call the folder: its keys
KEYS = "the run's folder (log.dir and name)"


def check_layout(trainer: Any, model: Any) -> None:
    """Check model, adapter, parallel layout, memory and disk.

    Errors:
        UserError: the pattern breaks the family's rules, a dimension does not split, the ranks do not divide, the
            adapter cannot be, the memory is far too small, or the disk cannot hold the checkpoints; names the key and
            a value that fits.
    """
    definition, adapter = model.config.definition(), model.config.adapter
    ranks = trainer.num_devices * trainer.num_nodes
    check_split(definition, trainer.strategy, ranks, seq_length=model.config.seq_length)
    parameters, frozen = definition.parameters + definition.vision_parameters, 0
    if adapter is not None:
        stages = trainer.strategy.pipeline_model_parallel_size
        check_adapter(adapter, definition, "adapter", pipeline=stages)
        parameters, frozen = trained_parameters(adapter, definition), parameters
    if model.config.frozen:
        stages = trainer.strategy.pipeline_model_parallel_size
        check_frozen(model.config.frozen, definition, "optim.frozen", pipeline=stages)
        still = frozen_parameters(definition, model.config.frozen)
        parameters, frozen = parameters - still, frozen + still
    frozen += sum(other.parameters for other in model.config.definitions().values()) - definition.parameters
    gpus, origin = torch.cuda.is_available(), f"model {definition.name}"
    check_training_fits(parameters, frozen, trainer.num_nodes, trainer.num_devices, gpus, origin)
    check_disk(checkpoint_bytes(model.config), Path(AppState().log_dir))


def checkpoint_bytes(config: Any) -> int:
    """Return what a checkpoint of a model's configuration takes at most."""
    definition, adapter = config.definition(), config.adapter
    whole = definition.parameters + definition.vision_parameters
    parameters = whole if adapter is None else trained_parameters(adapter, definition)
    return parameters * CHECKPOINT_BYTES_PER_PARAMETER


def check_split(
    definition: ModelDefinition, strategy: Any, ranks: int, beside: bool = False, seq_length: int | None = None
) -> None:
    """Check model and parallel layout; `strategy` is the object or its configuration, so a login node can ask too.

    Args:
        beside: it is no trained model but one beside it, whose layout it need not use: a dense teacher of experts.
        seq_length: tokens of a sequence; None where they have been asked about.
    Errors:
        UserError: the pattern breaks the family's rules, a dimension does not split, or the ranks do not divide; names
            the key and a value that fits.
    """
    origin = f"model {definition.name}"
    definition.validate_structure(origin)
    tensor, pipeline = strategy.tensor_model_parallel_size, strategy.pipeline_model_parallel_size
    definition.validate_tensor_parallel(tensor, origin)
    definition.validate_pipeline_parallel(pipeline, origin)
    context, sequence = strategy.context_parallel_size, strategy.sequence_parallel
    check_context_parallel(definition, context, origin, tensor=tensor, sequence=sequence, seq_length=seq_length)
    keys, sizes = ["parallel.tensor", "parallel.pipeline"], [tensor, pipeline]
    if context > 1:
        keys, sizes = [*keys, "parallel.context"], [*sizes, context]
    if ranks % (needed := math.prod(sizes)):
        raise UserError(
            f"parallel.nodes * parallel.devices = {ranks} is not a multiple of {' * '.join(keys)} = "
            f"{' * '.join(map(str, sizes))}",
            hint=f"give a multiple of {needed} ranks",
        )
    check_trainable(definition, origin)
    expert = strategy.expert_model_parallel_size
    if beside and not definition.has_experts:
        expert = 1
    check_expert_layout(definition, origin, expert=expert, tensor=tensor, sequence=sequence, ranks=ranks // pipeline)


def check_disk(size: int, folder: Path) -> None:
    """Check that one more checkpoint fits on the disk while it is written.

    Errors:
        UserError: the disk of `folder` has less room.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(
            f"{folder} has {gib(free)} free, one checkpoint takes up to {gib(size)}",
            hint="free space, or write elsewhere: log.dir=DIR",
        )


@dataclass
class RunFolder(nl.NeMoLogger):
    """NeMo's logger, in a folder that no other process trains in. The first rank holds the lock until it ends.

    Attributes beyond NeMo's:
        trackers: as `log.trackers`; each takes the place of NeMo's own (`tensorboard`, `wandb`).
        project: as `log.project`.
    """

    trackers: list[str] = field(default_factory=list)
    project: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_trackers(self.trackers)
        for name in self.trackers:
            if getattr(self, name, None) is not None:
                raise UserError(f"log.{name} and log.trackers = {self.trackers} set one value", hint="keep one of them")

    def setup(self, trainer: Any, resume_if_exists: bool = False, task_config: Any = None) -> Any:
        """Make and lock the folder, then set up as NeMo does.

        Errors:
            UserError: the folder cannot be made or written, or another process trains in it.
        """
        if not self.explicit_log_dir:
            raise UserError(f"{KEYS} is not set", hint="log.dir=DIR")
        if trainer.is_global_zero:
            hint = "wait until it has ended, or write another run: log.dir=DIR"
            locks.acquire(Path(self.explicit_log_dir), "trained", KEYS, hint)
        folder = Path(self.explicit_log_dir)
        loggers = trackers.loggers(self.trackers, self.project, folder, first=trainer.is_global_zero)
        self.tensorboard = loggers.pop("tensorboard", self.tensorboard)
        self.wandb = loggers.pop("wandb", self.wandb)
        self.extra_loggers = [*self.extra_loggers, *loggers.values()]
        with naming(KEYS):
            return super().setup(trainer, resume_if_exists, task_config)

    def _setup_files_to_move(self, log_dir: Path, app_state: Any) -> None:
        """Leave lock, steps and incidents in place: NeMo moves files of an earlier start into a folder of theirs."""
        super()._setup_files_to_move(log_dir, app_state)
        stay = (locks.LOCK, STEPS, INCIDENTS, RANK_TIMES, LIMITS, trackers.IDS)
        app_state.files_to_move = [path for path in app_state.files_to_move if path.name not in stay]
