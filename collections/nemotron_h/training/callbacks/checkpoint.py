"""Write checkpoints by step, always at the end of a run, each with a record and checksums."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from nemo import lightning as nl
from nemo.lightning.pytorch.strategies.utils import ckpt_to_dir
from nemo.utils.callbacks.dist_ckpt_io import AsyncFinalizerCallback
from torch.distributed.checkpoint import CheckpointException

from nemotron_h.checkpoint import folders
from nemotron_h.checkpoint.finite import check_weights
from nemotron_h.core.errors import UserError, naming
from nemotron_h.core.units import gib
from nemotron_h.platform import checkpoint_writer
from nemotron_h.platform.checkpoint_writer import Written
from nemotron_h.training.callbacks.run_record import RunRecord
from nemotron_h.training.lost_ranks import GRACE_S, is_of_a_collective, lost_ranks
from nemotron_h.training.preflight import check_disk, checkpoint_bytes
from nemotron_h.training.sections import CHECKPOINTING, sections

_CONTINUE = "clear the cause and run the same command again: it continues from the newest checkpoint"


@dataclass
class Save:
    """A checkpoint that is being written, and then what it cost.

    Attributes:
        folder: of the checkpoint.
        waited: seconds that training stopped for it: to begin and to finish it.
        allocating: seconds of those in which memory for the copies was allocated, once in a process.
        bytes: of all its files.
        writing: seconds from the copy until the last file of any rank was on the disk.
    """

    folder: Path
    waited: float = 0.0
    allocating: float = 0.0
    bytes: int = 0
    writing: float = 0.0

    @property
    def step(self) -> int:
        """Return the step that it is of."""
        return folders.step_of(self.folder)

    def line(self) -> str:
        """Return what it cost, for the run's output."""
        once = f" ({self.allocating:.1f} s of it to allocate memory, once)" if self.allocating >= 0.05 else ""
        return (
            f"checkpoint step {self.step:,}: {gib(self.bytes)}, training waited {self.waited:.1f} s{once}, written in "
            f"{self.writing:.1f} s ({self.bytes / max(self.writing, 1e-9) / 1e9:.2g} GB/s)"
        )

    def record(self) -> dict[str, float]:
        """Return what it cost, for the run's record."""
        return {
            "step": self.step,
            "bytes": self.bytes,
            "waited_seconds": round(self.waited, 3),
            "allocating_seconds": round(self.allocating, 3),
            "writing_seconds": round(self.writing, 3),
        }


class StepCheckpoint(nl.ModelCheckpoint, AsyncFinalizerCallback):
    """NeMo's checkpoint callback: `checkpoints/step-000100`, the newest `keep`, optimizer always included.

    Training waits until each rank knows what it writes. Its shards are copied into host memory beside the next step,
    and threads write the copies (`platform.checkpoint_writer`). At the end of the step in which the last rank has
    written, the checkpoint is made whole, its marker removed, and then the oldest one removed. Until then the run has
    the checkpoint of before. NeMo's strategy leaves that to an `AsyncFinalizerCallback`, which this is too, so that an
    error has its message.

    Args:
        every_steps: steps between checkpoints; the last step of the run always writes one.
        keep: how many of the newest stay; -1 keeps all.

    Attributes beyond NeMo's:
        seconds: that training has stopped for them in this process.
        save: the one that is being written.
        last: the last one that was finished.
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
        self.save: Save | None = None
        self.last: Save | None = None
        self._removal: threading.Thread | None = None

    def setup(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Remove what was not written to its end and say so, as NeMo does; name what nothing reads; take up others."""
        run_dir = Path(self.dirpath).parent
        if trainer.is_global_zero:
            folders.remove_late_marks(run_dir)
            for path in folders.unfinished(run_dir):
                print(f"removed {path}: it was not written to its end", flush=True)
            for path, problem in folders.torn(run_dir).items():
                print(f"checkpoint {path} {problem}; remove it when it is not needed", flush=True)
        super().setup(trainer, *args, **kwargs)
        self.nemo_topk_check_previous_run()
        if trainer.is_global_zero and self.save_top_k > 0:  # more than that: of a process that was killed, or kept more
            for path in folders.finished(run_dir)[self.save_top_k :]:
                self.set_checkpoint_unfinished_marker(path)
                _remove(path)
                print(f"removed {path}: checkpoint.keep is {self.save_top_k}", flush=True)

    def nemo_topk_check_previous_run(self) -> None:
        """Take up the checkpoints that an earlier process of this run left."""
        found = folders.finished(Path(self.dirpath).parent)
        if self.save_top_k > 0:
            found = found[: self.save_top_k]  # Lightning removes none where there are too many
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
        """Begin to write a checkpoint, once that of before is finished, or raise one error on all ranks.

        Errors:
            UserError: the disk has no room for it, or is full; its folder is there already, or cannot be written; a
                weight is not finite; that of before could not be written.
        """
        folder = Path(ckpt_to_dir(filepath))
        if self.save is not None:
            before, began = self.save.folder.name, time.monotonic()
            self.finish(trainer)
            if trainer.is_global_zero:
                print(f"{folder.name} waited {time.monotonic() - began:.1f} s for {before} to be written", flush=True)
        save = Save(folder)
        with self._clock(save), _errors(folder):
            if self._removal is not None:
                self._removal.join()  # its bytes are free then
            problem = self._problem(trainer, folder) if trainer.is_global_zero else None
            problem = trainer.strategy.broadcast(problem)
            if problem is not None:
                raise problem
            self._check_finite(trainer, folder)
            super()._save_checkpoint(trainer, filepath)
            if trainer.is_global_zero:
                for record in (cb for cb in trainer.callbacks if isinstance(cb, RunRecord)):
                    record.write(trainer, folder / folders.RECORD)
            self.save = save  # not before: without its record it is never finished

    def finish(self, trainer: pl.Trainer, wait: bool = True) -> None:
        """Finish the checkpoint that is being written, on all ranks together.

        Args:
            wait: until it is written; else nothing is done where a rank still writes.
        Errors:
            UserError: it could not be written, on every rank; the first one says why.
        """
        save = self.save
        if save is None:
            return
        with self._clock(save), _errors(save.folder):
            try:
                if not trainer.strategy.checkpoint_io.maybe_finalize_save_checkpoint(blocking=wait):
                    return
            except BaseException:
                self._leave()
                raise
        self.save, self.last = None, save
        if trainer.is_global_zero:
            print(save.line(), flush=True)
        if wait and self._removal is not None:
            self._removal.join()

    def end(self, trainer: pl.Trainer, error: BaseException | None) -> None:
        """Finish the checkpoint that is being written where the process is about to end and all ranks get here; else
        leave it unfinished, and with its marker: the next start removes it and has the one of before.

        Args:
            error: that ends the process. A second ctrl-c waits for nothing.
        """
        if self.save is None:
            return
        apart = isinstance(error, KeyboardInterrupt) or (error is not None and is_of_a_collective(error))
        if not apart and not (trainer.world_size > 1 and lost_ranks(GRACE_S, place="end of a save")):
            try:
                self.finish(trainer)
                return
            except Exception as failure:
                said = failure.message if isinstance(failure, UserError) else f"{type(failure).__name__}: {failure}"
                print(f"checkpoint not finished: {said}", flush=True)
        self._leave()

    def _leave(self) -> None:
        """Leave what is being written as it is."""
        self.save = None
        checkpoint_writer.abandon()

    @contextlib.contextmanager
    def _clock(self, save: Save) -> Iterator[None]:
        began = time.monotonic()
        try:
            with sections.within(CHECKPOINTING):
                yield
        finally:
            self.seconds += time.monotonic() - began
            save.waited += time.monotonic() - began

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
            parts: list[Written] | None = [Written()] * trainer.world_size if trainer.is_global_zero else None
            dist.gather_object(checkpoint_writer.take_written(folder / folders.WEIGHTS), parts)
            if parts is not None:
                self._describe(folder, parts)
            finish()

        return finalize

    def _describe(self, folder: Path, parts: list[Written]) -> None:
        """Write the integrity file of a checkpoint: of what the ranks have written, only other files are read."""
        described = {f"{folders.WEIGHTS}/{name}": entry for part in parts for name, entry in part.files.items()}
        others = [name for name in folders.content(folder) if name not in described]
        described |= folders.describe(folder, others)
        folders.write_integrity(folder, described)
        self.save.bytes = sum(size for size, _ in described.values())
        self.save.writing = max(part.seconds for part in parts)
        self.save.allocating = max(part.allocating for part in parts)

    def _remove_checkpoint(self, trainer: pl.Trainer, filepath: str, override_async: bool = False) -> None:
        """Remove an old checkpoint when the newer one is finished, in a thread; NeMo would remove its marker at once.

        Args:
            override_async: the newer one is finished.
        """
        if not override_async:
            super()._remove_checkpoint(trainer, filepath)
        elif trainer.is_global_zero:
            self.set_checkpoint_unfinished_marker(filepath)
            if self._removal is not None:
                self._removal.join()
            self._removal = threading.Thread(target=_remove, args=(Path(ckpt_to_dir(filepath)),))
            self._removal.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Checkpoint as NeMo does; the last step only once it is validated: a run that has it is complete."""
        self.finish(trainer, wait=False)
        if trainer.global_step < trainer.max_steps:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, index)

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Finish what has been written by now: a validation can take far longer than a step."""
        self.finish(trainer, wait=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checkpoint the last step."""
        self.save_now(trainer)

    def save_now(self, trainer: pl.Trainer) -> None:
        """Have a whole checkpoint of this step, whatever `every_steps` says, before this returns."""
        if not self.has_saved(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
        self.finish(trainer)

    def has_saved(self, trainer: pl.Trainer) -> bool:
        """Return whether this process has begun to write this step's checkpoint."""
        return self._last_global_step_saved == trainer.global_step


@contextlib.contextmanager
def _errors(folder: Path) -> Iterator[None]:
    """Raise errors of the file system, where a checkpoint is written, as errors that a user can act on."""
    with naming(f"checkpoint {folder} cannot be written", hint=_CONTINUE):
        try:
            yield
        except CheckpointException as error:
            reasons = [f"rank {rank}: {failure}" for rank, (failure, _) in sorted(error.failures.items())]
            if any("[Errno" not in reason for reason in reasons):
                raise
            said = reasons[0] if reasons else "the first rank says why"  # failures are known there alone
            raise UserError(f"checkpoint {folder} cannot be written: {said}", hint=_CONTINUE) from error


def _remove(folder: Path) -> None:
    """Remove a folder, the file that says that it is whole first, and then the marker beside it."""
    try:
        (folder / folders.INTEGRITY).unlink(missing_ok=True)
        shutil.rmtree(folder)
    except OSError as error:
        print(f"{folder} was not removed: {error}; the next start tries again", flush=True)
    else:
        StepCheckpoint.remove_checkpoint_unfinished_marker(folder)
