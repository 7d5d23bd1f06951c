"""Write checkpoints by step, always at the end of a run, each with a record and checksums."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from nemo import lightning as nl
from nemo.lightning.pytorch.strategies.utils import ckpt_to_dir
from torch.distributed.checkpoint import CheckpointException

from nemotron_h.checkpoint import folders
from nemotron_h.checkpoint.finite import check_weights
from nemotron_h.core.errors import UserError, naming
from nemotron_h.training.callbacks.run_record import RunRecord
from nemotron_h.training.preflight import check_disk, checkpoint_bytes
from nemotron_h.training.sections import CHECKPOINTING, sections

#: `torch.save` writes in C++, whose errors have no number
_OF_TORCH_SAVE = ("iostream error", "PytorchStreamWriter failed")


def describe_by_rank(checkpoint: Path) -> dict[str, list]:
    """Return size and sha256 of every file of a checkpoint, each read by one rank; returned on all ranks."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    # One listing for all: on a shared file system the ranks' own could differ, and a file would go unread.
    names = [folders.content(checkpoint) if rank == 0 else None]
    dist.broadcast_object_list(names)
    parts: list[dict[str, list]] = [{}] * ranks
    dist.all_gather_object(parts, folders.describe(checkpoint, names[0][rank::ranks]))
    return {name: entry for part in parts for name, entry in part.items()}


class StepCheckpoint(nl.ModelCheckpoint):
    """NeMo's checkpoint callback: `checkpoints/step-000100`, the newest `keep`, optimizer always included.

    Args:
        every_steps: steps between checkpoints; the last step of the run always writes one.
        keep: how many of the newest stay; -1 keeps all.

    Attributes beyond NeMo's:
        seconds: that this process has spent on them.
    """

    def __init__(self, every_steps: int, keep: int = 2) -> None:
        super().__init__(
            monitor="step",
            mode="max",
            save_top_k=keep,
            every_n_train_steps=every_steps,
            save_last=False,
            filename="step-{step:06d}",
            auto_insert_metric_name=False,
            save_optim_on_train_end=True,
            verbose=False,
            # NeMo's own record of constructor arguments cannot be loaded again for classes outside of NeMo
            always_save_context=False,
            save_context_on_train_end=False,
        )
        self.seconds = 0.0

    def setup(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Remove what was not written to its end and say so, as NeMo does; name what nothing reads; take up others."""
        run_dir = Path(self.dirpath).parent
        if trainer.is_global_zero:
            for path in folders.unfinished(run_dir):
                print(f"removed {path}: it was not written to its end", flush=True)
            for path, problem in folders.torn(run_dir).items():
                print(f"checkpoint {path} {problem}; remove it when it is not needed", flush=True)
        super().setup(trainer, *args, **kwargs)
        self.nemo_topk_check_previous_run()

    def nemo_topk_check_previous_run(self) -> None:
        """Take up the checkpoints that an earlier process of this run left."""
        found = folders.finished(Path(self.dirpath).parent)
        self.best_k_models = {str(path): torch.tensor(float(folders.step_of(path))) for path in found}
        if found:
            self.best_model_path, self.kth_best_model_path = str(found[0]), str(found[-1])
            self.best_model_score = self.best_k_models[self.best_model_path]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Leave out a checkpoint's list of those to keep and to remove: it may name any folder, see `setup`."""

    def _monitor_candidates(self, trainer: pl.Trainer) -> dict[str, torch.Tensor]:
        candidates = super()._monitor_candidates(trainer)
        candidates["step"] = torch.tensor(trainer.global_step)
        return candidates

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        """Write a checkpoint, or raise one error on all ranks.

        Errors:
            UserError: the disk has no room for it, or is full; its folder is there already, or cannot be written; a
                weight is not finite.
        """
        folder = Path(ckpt_to_dir(filepath))
        then = "clear the cause and run the same command again: it continues from the newest checkpoint"
        with self._clock(), naming(f"checkpoint {folder} cannot be written", hint=then):
            problem = self._problem(trainer, folder) if trainer.is_global_zero else None
            problem = trainer.strategy.broadcast(problem)
            if problem is not None:
                raise problem
            self._check_finite(trainer, folder)
            try:
                super()._save_checkpoint(trainer, filepath)
            except CheckpointException as error:
                reasons = [f"rank {rank}: {failure}" for rank, (failure, _) in sorted(error.failures.items())]
                if any("[Errno" not in reason for reason in reasons):
                    raise
                said = reasons[0] if reasons else "the first rank says why"  # failures are known there alone
                raise UserError(f"checkpoint {folder} cannot be written: {said}", hint=then) from error
            except RuntimeError as error:
                if not any(words in str(error) for words in _OF_TORCH_SAVE):
                    raise
                said = f"{error}, as PyTorch says where the disk is full"
                raise UserError(f"checkpoint {folder} cannot be written: {said}", hint=then) from error

    @contextlib.contextmanager
    def _clock(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            with sections.within(CHECKPOINTING):
                yield
        finally:
            self.seconds += time.monotonic() - began

    @staticmethod
    def _problem(trainer: pl.Trainer, folder: Path) -> UserError | None:
        """Return why a checkpoint cannot be written now: no room, or another process wrote one of this step."""
        if folder.exists():
            return UserError(
                f"checkpoint {folder} is there already: it appeared while this run trained",
                hint=f"set it aside: mv {folder} {folder.with_name(f'aside-{folder.name}')}",
            )
        run_dir = folder.parents[1]
        written = folders.finished(run_dir)
        try:
            size = folders.size_of(written[0]) if written else checkpoint_bytes(trainer.lightning_module.config)
            check_disk(size, run_dir)
        except UserError as error:
            return error
        return None

    @staticmethod
    def _check_finite(trainer: pl.Trainer, folder: Path) -> None:
        """Refuse to save a weight that is not finite. No step makes one, but broken memory does, and a run would never
        get away from its checkpoint.

        Errors:
            UserError: on every rank, where a weight of any is not; that rank names it.
        """
        refused, problem = f"checkpoint {folder} is not written", None
        named = trainer.lightning_module.named_parameters()
        try:
            weights = {name.split("module.")[-1]: weight for name, weight in named if weight.numel()}
            check_weights(weights, f"{refused} (rank {trainer.global_rank})")
        except UserError as error:
            problem = error.message
        if trainer.strategy.reduce_boolean_decision(problem is not None, all=False):
            raise UserError(
                problem or f"{refused}: weights of another rank are not finite",
                hint="the same command continues from the newest checkpoint; if this comes again, check the machine",
            )

    def _should_remove_checkpoint(self, trainer: pl.Trainer, previous: str, current: str) -> bool:
        """Return True for any but the one just written: Lightning would keep the one that this process began from."""
        return ckpt_to_dir(previous) != ckpt_to_dir(current)

    def file_exists(self, *args: Any, **kwargs: Any) -> bool:
        """Return False: Lightning would write `step-000100-v1` beside a folder that is there, which nothing reads."""
        return False

    def _get_finalize_save_checkpoint_callback(self, trainer: pl.Trainer, filepath: str, global_step: int) -> Any:
        finish = super()._get_finalize_save_checkpoint_callback(trainer, filepath, global_step)
        folder = Path(ckpt_to_dir(filepath))

        def finalize() -> None:
            trainer.strategy.barrier("checkpoint written")
            if trainer.is_global_zero:
                for record in (cb for cb in trainer.callbacks if isinstance(cb, RunRecord)):
                    record.write(trainer, folder / folders.RECORD)
            described = describe_by_rank(folder)
            if trainer.is_global_zero:
                folders.write_integrity(folder, described)
            finish()

        return finalize

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Checkpoint as NeMo does; the last step only once it is validated: a run that has it is complete."""
        if trainer.global_step < trainer.max_steps:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, index)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checkpoint the last step."""
        self.save_now(trainer)

    def save_now(self, trainer: pl.Trainer) -> None:
        """Checkpoint this step, whatever `every_steps` says, unless that has just been done."""
        if not self.has_saved(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)

    def has_saved(self, trainer: pl.Trainer) -> bool:
        """Return whether this process wrote this step's checkpoint."""
        return self._last_global_step_saved == trainer.global_step
