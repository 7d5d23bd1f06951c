"""Checks between a resolved recipe and this machine, before any model is built."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from nemo.utils.app_state import AppState

from nemotron_h.architecture.adapters import check_adapter, trained_parameters
from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.core.errors import UserError
from nemotron_h.core.sizes import gib
from nemotron_h.platform.memory import check_training_fits

#: bytes per parameter in a checkpoint: bf16 weights at most fp32, plus fp32 main weights and two Adam moments
CHECKPOINT_BYTES_PER_PARAMETER = 16


def check_layout(trainer: Any, model: Any) -> None:
    """Check model, adapter, parallel layout, memory and disk.

    Errors:
        UserError: the pattern breaks the family's rules, a dimension does not split, the ranks do not divide, the
            adapter cannot be, the memory is far too small, or the disk cannot hold the checkpoints; names the key and
            a value that fits.
    """
    definition, adapter = model.config.definition(), model.config.adapter
    check_split(definition, trainer.strategy, trainer.num_devices * trainer.num_nodes)
    parameters, frozen = definition.parameters, 0
    if adapter is not None:
        stages = trainer.strategy.pipeline_model_parallel_size
        check_adapter(adapter, definition, "adapter", pipeline=stages)
        parameters, frozen = trained_parameters(adapter, definition), parameters
    frozen += sum(other.parameters for other in model.config.definitions().values()) - definition.parameters
    gpus, origin = torch.cuda.is_available(), f"model {definition.name}"
    check_training_fits(parameters, frozen, trainer.num_nodes, trainer.num_devices, gpus, origin)
    check_disk(checkpoint_bytes(model.config), Path(AppState().log_dir))


def checkpoint_bytes(config: Any) -> int:
    """Return what a checkpoint of a model's configuration takes at most."""
    definition, adapter = config.definition(), config.adapter
    parameters = definition.parameters if adapter is None else trained_parameters(adapter, definition)
    return parameters * CHECKPOINT_BYTES_PER_PARAMETER


def check_split(definition: ModelDefinition, strategy: Any, ranks: int) -> None:
    """Check model and parallel layout; `strategy` is the object or its configuration, so a login node can ask too.

    Errors:
        UserError: the pattern breaks the family's rules, a dimension does not split, or the ranks do not divide; names
            the key and a value that fits.
    """
    origin = f"model {definition.name}"
    definition.validate_structure(origin)
    tensor, pipeline = strategy.tensor_model_parallel_size, strategy.pipeline_model_parallel_size
    definition.validate_tensor_parallel(tensor, origin)
    definition.validate_pipeline_parallel(pipeline, origin)
    if strategy.context_parallel_size != 1:
        raise UserError(
            f"trainer.strategy.context_parallel_size={strategy.context_parallel_size}",
            hint="context parallelism is not supported; use tensor or pipeline parallelism",
        )
    if ranks % (tensor * pipeline):
        raise UserError(
            f"parallel.nodes * parallel.devices = {ranks} is not a multiple of parallel.tensor * parallel.pipeline = "
            f"{tensor} * {pipeline}",
            hint=f"give a multiple of {tensor * pipeline} ranks",
        )


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
