"""NeMo's trainer and Megatron strategy on whatever this machine has: GPUs with NCCL, or the CPU with gloo."""

from __future__ import annotations

import inspect
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from nemo import lightning as nl
from nemo.utils import AppState

from nemotron_h.checkpoint.index import safe_reads
from nemotron_h.checkpoint.reader import WEIGHTS
from nemotron_h.core import children
from nemotron_h.core.errors import UserError
from nemotron_h.core.units import seconds_of
from nemotron_h.model import adapters
from nemotron_h.model.stored_names import reading
from nemotron_h.platform import chained_optimizers, cpu, flat_shards, megatron_fixes
from nemotron_h.platform.ranks import (
    ADDRESS,
    check_here,
    forget_tasks_of_others,
    is_rank,
    local_store,
    report_mistakes,
    slurm_error,
)
from nemotron_h.training.callbacks import run_report
from nemotron_h.training.callbacks.hang_limits import HangLimits
from nemotron_h.training.lost_ranks import GRACE_S, is_of_a_collective, lost_ranks
from nemotron_h.training.optimizer import setting_of
from nemotron_h.training.optimizer_change import ADAMW, FreshStates, fresh_states
from nemotron_h.training.sections import sections
from nemotron_h.training.step_inputs import StepInputs

logger = logging.getLogger(__name__)

#: ours: how long rank 0, whose exit code is the run's, may take to leave
END_OF_RANK_0_S = 30.0


def with_parameters_of(parent: type) -> Callable[[type], type]:
    """Show the parent's parameters in place of `**kwargs`: nemo-run types overrides by the signature."""

    def decorate(child: type) -> type:
        own = inspect.signature(child.__init__, eval_str=True)
        named = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        inherited = [
            p.replace(kind=p.KEYWORD_ONLY)
            for name, p in inspect.signature(parent.__init__).parameters.items()
            if name not in own.parameters and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]
        child.__init__.__signature__ = own.replace(parameters=[*named, *inherited])
        return child

    return decorate


@with_parameters_of(nl.Trainer)
class NemotronHTrainer(nl.Trainer):
    """NeMo's trainer, on GPUs where they are visible and on the CPU elsewhere; with `HangLimits` under a monitor.

    Errors:
        UserError: srun started other tasks than the layout has ranks.
    """

    def __init__(self, accelerator: str = "auto", devices: int = 1, num_nodes: int = 1, **kwargs: Any) -> None:
        report_mistakes()
        if accelerator == "auto":
            accelerator = "gpu" if torch.cuda.is_available() else "cpu"
        forget_tasks_of_others()
        if sections.monitored:
            kwargs["callbacks"] = [*(kwargs.get("callbacks") or []), HangLimits()]
        if not is_rank(num_nodes * devices):
            check_here(num_nodes, devices, gpus=torch.cuda.device_count() if accelerator == "gpu" else 0)
        try:
            super().__init__(accelerator=accelerator, devices=devices, num_nodes=num_nodes, **kwargs)
        except (RuntimeError, ValueError) as error:
            raise slurm_error(error) or error from error


@with_parameters_of(nl.MegatronStrategy)
class NemotronHStrategy(nl.MegatronStrategy):
    """NeMo's Megatron strategy with the checkpoint format that any layout can read, and gloo without GPUs.

    Args:
        distributed_optimizer: shard the optimizer's state over data-parallel ranks.
        overlap_grad_reduce: reduce gradients while the backward pass goes on; None does where several data- or
            context-parallel ranks have GPUs. Parameters are not gathered likewise: Megatron waits for one when the
            module that holds it is called, and the Mamba-2 mixer reads its convolution and norm without calling them.
        pipeline_dtype: dtype between pipeline stages; None takes the precision plugin's.
        collective_timeout: `HH:MM:SS` after which a rank gives up waiting for another: that one is stopped or hangs.
            Ours: torch's default for NCCL; gloo and megatron-core would wait for 30 minutes.
        kwargs: as `nemo.lightning.MegatronStrategy`.

    Attributes beyond NeMo's:
        adapter_base: the checkpoint of the frozen weights, where the model has adapters. Checkpoints then hold the
            adapters and their optimizer alone.
        init_checkpoint: the recipe's `init.checkpoint` where the run began; None is weights of `init_seed`.
        repair_embeddings: its `init.repair_embeddings`.
        optimizer_change: the recipe's `resume.optimizer_change`.
        fresh: states that the checkpoint of another optimizer lacks.
        inputs: of the step that is being trained.
    """

    adapter_base: Path | None = None
    init_checkpoint: str | None = None
    repair_embeddings: bool = False
    optimizer_change: str | None = None
    fresh: FreshStates | None = None

    def __init__(
        self,
        tensor_model_parallel_size: int = 1,
        pipeline_model_parallel_size: int = 1,
        expert_model_parallel_size: int = 1,
        sequence_parallel: bool = False,
        distributed_optimizer: bool = True,
        overlap_grad_reduce: bool | None = None,
        collective_timeout: str = "00:10:00",
        **kwargs: Any,
    ) -> None:
        self.collective_timeout = timedelta(seconds=seconds_of(collective_timeout))
        self.overlap_grad_reduce = overlap_grad_reduce
        self.inputs = StepInputs()
        megatron_fixes.install()
        flat_shards.install()
        chained_optimizers.install()
        if not torch.cuda.is_available():
            cpu.install()
            kwargs.setdefault("process_group_backend", "gloo")
        super().__init__(
            tensor_model_parallel_size=tensor_model_parallel_size,
            pipeline_model_parallel_size=pipeline_model_parallel_size,
            expert_model_parallel_size=expert_model_parallel_size,
            expert_tensor_parallel_size=1,  # an expert is whole: it is small, and its tokens few
            sequence_parallel=sequence_parallel,
            ckpt_async_save=True,  # `StepCheckpoint` knows no other
            ddp=DistributedDataParallelConfig(
                check_for_nan_in_grad=False,  # a wait per bucket, an error of one rank: `GuardedOptimizer` does it
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=distributed_optimizer,
            ),
            # who writes which shard is agreed on once, among the ranks that hold the same ones: over all ranks of a
            # large run, and for each save, that alone takes minutes
            ckpt_parallel_save_within_dp=True,
            ckpt_assume_constant_structure=True,
            replace_progress_bar=False,
            **kwargs,
        )

    def setup_environment(self) -> None:
        """Warn where ranks share cores, then set up as NeMo does; ranks that this command starts meet on loopback."""
        ranks, cores = self.num_processes, os.cpu_count() or 1
        if not torch.cuda.is_available() and ranks > cores and self.local_rank == 0:
            logger.warning(f"{ranks} ranks share {cores} cores of this machine: steps take longer than with {cores}")
        meeting = self.cluster_environment
        if isinstance(meeting, LightningEnvironment) and meeting.main_address == ADDRESS:
            self.store = local_store(meeting.main_port, meeting.local_rank())
        super().setup_environment()
        overlap = self.overlap_grad_reduce
        several = AppState().data_parallel_size * self.context_parallel_size > 1
        self.ddp_config.overlap_grad_reduce = several and torch.cuda.is_available() if overlap is None else overlap

    def setup_distributed(self) -> None:
        """Join the other ranks as NeMo does, and wait no longer for one than `collective_timeout`."""
        super().setup_distributed()
        parallel_state.update_pg_timeout(self.collective_timeout)
        if isinstance(self.cluster_environment, TorchElasticEnvironment):
            children.end_with_parent()
        elif self._started_by_rank_0():
            children.end_with_parent(signal.SIGKILL)  # this one may be stopped

    def _started_by_rank_0(self) -> bool:
        return bool(self.local_rank) and isinstance(self.cluster_environment, LightningEnvironment)

    def init_model_parallel(self) -> None:
        """Move the weights into Megatron's buffers as NeMo does, when they are there, and wait until they have moved.

        NeMo moves them on a stream of its own, which waits for no other and for which none waits: on a busy GPU weights
        were copied before they had their initial values, or from memory that was somebody else's by then.
        """
        torch.cuda.synchronize()
        super().init_model_parallel()
        torch.cuda.synchronize()

    def training_step(self, dataloader_iter: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        """Run a step as NeMo does, with inputs that are kept for a second run."""
        return super().training_step(self.inputs.take(dataloader_iter), *args, **kwargs)

    def on_exception(self, exception: BaseException) -> None:
        """Name the ranks that are gone where one was waited for in vain.

        Errors:
            RuntimeError: some are.
        """
        super().on_exception(exception)
        if isinstance(exception, SystemExit | UserError) and self._started_by_rank_0():
            time.sleep(END_OF_RANK_0_S)  # the end of rank 0 ends this one; the other way round Lightning kills rank 0
        if not isinstance(exception, Exception) or not dist.is_initialized() or dist.get_world_size() == 1:
            return
        grace = min(GRACE_S, self.collective_timeout.total_seconds())
        lost = lost_ranks(grace, wait=is_of_a_collective(exception))
        if lost:
            writer = min(set(range(dist.get_world_size())) - set(lost))
            if hasattr(self, "trainer"):  # else the run has not begun
                run_report.note(self.trainer, message=f"no answer from ranks {lost}", error=exception, rank=writer)
            ranks = f"rank{'s' if len(lost) > 1 else ''} {', '.join(map(str, lost))}"
            raise RuntimeError(
                f"no answer from {ranks} of {dist.get_world_size()}: stopped, killed, hanging, "
                f"or on a machine that is gone. Others wait {self.collective_timeout} for a rank "
                "(trainer.strategy.collective_timeout). The same command continues from the newest checkpoint."
            ) from exception

    @property
    def sharded_state_dict_metadata(self) -> dict[str, Any]:
        """Return NeMo's, with the optimizer's state sharded as the ranks hold it: nothing is gathered to save it, and
        any layout reads it (`platform/flat_shards.py`). A checkpoint states its own, so former ones are read as before.
        """
        metadata = super().sharded_state_dict_metadata
        if self.ddp_config.use_distributed_optimizer:
            metadata["distrib_optim_sharding_type"] = flat_shards.SHARDING
        return metadata

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Save as NeMo does, without the frozen weights of an adapted model."""
        part = "all" if self.adapter_base is None else "adapter"
        with adapters.only(part, self.megatron_parallel):
            super().save_checkpoint(*args, **kwargs)

    def load_checkpoint(self, checkpoint_path: str | Path, selective_restore: bool = False) -> dict[str, Any]:
        """Load as NeMo does, data alone: see `safe_reads`. Initial weights are the model's alone, and resuming an
        adapted model reads its base first.

        Errors:
            UserError: a checkpoint of another optimizer is to be resumed.
        """
        reads = safe_reads(Path(checkpoint_path) / WEIGHTS)
        with reads as index, reading(index.state_dict_metadata, self.megatron_parallel):
            if selective_restore:
                with adapters.only("base", self.megatron_parallel):
                    return super().load_checkpoint(checkpoint_path, selective_restore)
            self._check_optimizer(checkpoint_path)
            names = (getattr(self.lightning_module.optim, "settings", {}).get("name", ADAMW), self.optimizer_change)
            self.fresh = fresh_states(Path(checkpoint_path), *names)
            if self.adapter_base is None:
                return super().load_checkpoint(checkpoint_path, selective_restore)
            base = self.load_checkpoint(self.adapter_base, selective_restore=True)
            self.load_model_state_dict(base)
            del base
            with adapters.only("adapter", self.megatron_parallel):
                return super().load_checkpoint(checkpoint_path, selective_restore)

    def _check_optimizer(self, checkpoint: str | Path) -> None:
        """Refuse to read the state of an optimizer that is sharded over ranks into one that is not, and the reverse."""
        content = self.unwrapped_checkpoint_io.load_content_metadata(checkpoint)
        saved, now = "distrib_optim_sharding_type" in content, self.ddp_config.use_distributed_optimizer
        if saved != now:
            raise UserError(
                f"checkpoint {checkpoint} was written with parallel.distributed_optimizer = {str(saved).lower()}, "
                f"which is {str(now).lower()} now",
                hint=f"set parallel.distributed_optimizer={str(saved).lower()}",
            )

    def optimizer_sharded_state_dict(self, is_loading: bool = False, metadata: dict | None = None) -> dict[str, Any]:
        """Return NeMo's, to load without the states that the checkpoint of another optimizer lacks."""
        state = super().optimizer_sharded_state_dict(is_loading, metadata)
        if is_loading and self.fresh is not None:
            self.fresh.take_out(state)
        return state

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any], selective_restore: bool = False) -> None:
        """Load as NeMo does; betas, epsilon and weight decay stay the recipe's, where the checkpoint has others."""
        if self.fresh is not None:
            self.fresh.put_back(checkpoint["optimizer"][0])
        recipe = [[setting_of(group) for group in optimizer.param_groups] for optimizer in self.optimizers]
        super().load_optimizer_state_dict(checkpoint, selective_restore)
        for optimizer, settings in zip(self.optimizers, recipe, strict=True):
            for group, setting in zip(optimizer.param_groups, settings, strict=True):
                group.update(setting)
