"""Continue a run from its newest checkpoint, or say exactly why that is not possible."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from nemo import lightning as nl
from nemo.utils.app_state import AppState

from nemotron_h.checkpoint import folders
from nemotron_h.checkpoint.adapters import adapter_record, find_base
from nemotron_h.checkpoint.definition import read_definition
from nemotron_h.checkpoint.reader import find_checkpoint, read_record
from nemotron_h.core.errors import UserError
from nemotron_h.data.feed.datamodule import BlendDataModule
from nemotron_h.export.hub_import import obtain
from nemotron_h.inference.trained_tokenizer import check_data
from nemotron_h.recipe.checks import check_blend_change, check_optimizer_change
from nemotron_h.training.callbacks import run_report
from nemotron_h.training.callbacks.embedding_rows import EmbeddingRows
from nemotron_h.training.callbacks.run_record import plain
from nemotron_h.training.preflight import check_layout


class DeclareBlendChange(pl.Callback):
    """Tell the data module, which the trainer knows only once it fits, that other data is meant."""

    def __init__(self, blend_change: str) -> None:
        self.blend_change = blend_change

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Declare the change before the checkpoint is loaded."""
        if not isinstance(trainer.datamodule, BlendDataModule):
            raise UserError(f"resume.blend_change is for BlendDataModule, not {type(trainer.datamodule).__name__}")
        trainer.datamodule.blend_change = self.blend_change


class StandAtStep(pl.Callback):
    """Have Lightning's loop stand where the trainer's step says, as in a run that was never stopped.

    Lightning writes a checkpoint before it counts the batch as done, and NeMo's loop leaves out the validation of a
    restart: each resume would come to its validations a step later, log them at the step before, and never make the one
    that was due when the checkpoint was written.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the loop's counts, once the checkpoint is loaded, and have the validation made that is due."""
        loop, step = trainer.fit_loop.epoch_loop, trainer.global_step
        for tracker in (loop.batch_progress.total, loop.batch_progress.current):
            tracker.ready = tracker.started = tracker.processed = tracker.completed = step
        loop.skip_val_on_restart = loop.val_loop.restarting = False
        due = loop._should_check_val_fx(trainer.fit_loop._data_fetcher)
        loop._batches_that_stepped = step - due  # the step that validations are logged at; the loop counts it after


class CheckTokenizer(pl.Callback):
    """Refuse data that was prepared with another tokenizer than the initial weights were trained with.

    Args:
        checkpoint: of the initial weights, as `find_checkpoint` returns it.
        key: of the recipe, that names it.
    """

    def __init__(self, checkpoint: Path, key: str = "init.checkpoint") -> None:
        self.checkpoint, self.key = checkpoint, key

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the data before any weight is loaded.

        Errors:
            UserError: the tokenizers differ.
        """
        warning = check_data(self.checkpoint, trainer.datamodule.manifest, self.key)
        if warning and trainer.global_rank == 0:
            print(f"warning: {warning}")


@dataclass(kw_only=True)
class ResumeRun(nl.AutoResume):
    """NeMo's resume over `checkpoints/step-*`, with checks before anything is loaded.

    Attributes beyond NeMo's:
        resume_from_path: continue from this checkpoint, of this run or another, and set this run's newer ones aside.
        must_exist: a run that has no checkpoint is an error, not a start from scratch.
        blend_change: null, or `from_step`: the data may be another blend, seed, seq_length or global_batch_size than
            the checkpoint's, from its step on.
        optimizer_change: null, or `from_step`: the optimizer may be another than the checkpoint's, from its step on.
        init_checkpoint: a run's folder or a checkpoint, whose weights a run without checkpoints of its own starts from;
            one of the Hub is fetched then.
        repair_embeddings: replace the outliers among the rows of those weights' embedding.
    """

    resume_if_exists: bool = True
    resume_ignore_no_checkpoint: bool = True
    must_exist: bool = False
    blend_change: str | None = None
    optimizer_change: str | None = None
    init_checkpoint: str | None = None
    repair_embeddings: bool = False

    def __post_init__(self) -> None:
        check_blend_change(self.blend_change)
        check_optimizer_change(self.optimizer_change)
        if self.restore_config is not None:
            raise UserError(
                "resume.restore_config is NeMo's, and builds what a checkpoint's context names",
                hint="init.checkpoint=CHECKPOINT takes its weights",
            )

    def setup(self, trainer: pl.Trainer, model: Any = None) -> None:
        """Check the layout, choose the checkpoint and check it.

        Errors:
            UserError: impossible layout; damaged checkpoint; checkpoint of another model.
            SystemExit: with code 0, the run is complete.
        """
        try:
            self._setup(trainer, model)
        except Exception as error:  # no callback hears of it: nothing fits yet
            run_report.note(trainer, error=error)
            raise

    def _setup(self, trainer: pl.Trainer, model: Any) -> None:
        check_layout(trainer, model)
        self._rank, self._ranks = trainer.global_rank, trainer.world_size
        super().setup(trainer, model)
        path = Path(str(trainer.ckpt_path)) if trainer.ckpt_path else None
        if path is None:
            if self.must_exist:
                raise UserError(f"{AppState().log_dir} has no finished checkpoint and resume.must_exist is set")
            if self.init_checkpoint is not None:
                obtain(self.init_checkpoint, "init.checkpoint", self._rank)
                self._start_from(find_checkpoint(Path(self.init_checkpoint).expanduser()), trainer, model)
            elif model.config.adapter is not None:
                raise UserError(
                    "an adapter needs the weights that it changes: init.checkpoint is not set",
                    hint="name a run or a checkpoint: init.checkpoint=RUN",
                )
            return
        elsewhere = "restore the recipe, or write this run elsewhere: log.dir=DIR"
        self._check_model(path, model, elsewhere)
        self._check_initial_weights(path, trainer, model, elsewhere)
        self._check_adapter(path, model, elsewhere)
        self._check_frozen(path, model, elsewhere)
        self._leave_if_complete(path, trainer)
        if model.config.adapter is not None:
            if self.init_checkpoint is not None:
                obtain(self.init_checkpoint, "init.checkpoint", self._rank)
            self._freeze(find_base(path, self.init_checkpoint), trainer)
        trainer.strategy.optimizer_change = self.optimizer_change
        trainer.callbacks.append(StandAtStep())
        if self.blend_change is not None:
            trainer.callbacks.append(DeclareBlendChange(self.blend_change))

    def _start_from(self, checkpoint: Path, trainer: pl.Trainer, model: Any) -> None:
        """Have the strategy load these weights, and nothing else of the checkpoint, before the first step."""
        problems = self._damage(checkpoint)
        if problems:
            raise UserError(f"init.checkpoint: {checkpoint} is damaged: {'; '.join(problems[:3])}")
        self._check_model(checkpoint, model, "name a checkpoint of this model, or take the recipe of the checkpoint's")
        if adapter_record(checkpoint) is not None:
            raise UserError(
                f"init.checkpoint: {checkpoint} holds an adapter alone",
                hint=f"make a whole checkpoint of it first: nemotron-h merge-adapter {checkpoint} OUT",
            )
        if model.config.adapter is not None:
            self._freeze(checkpoint, trainer)
        trainer.strategy.init_checkpoint = self.init_checkpoint
        trainer.strategy.repair_embeddings = self.repair_embeddings
        trainer.strategy.restore_config = nl.RestoreConfig(path=str(checkpoint), load_optim_state=False)
        trainer.callbacks += [CheckTokenizer(checkpoint), EmbeddingRows(checkpoint, self.repair_embeddings)]
        if self._rank == 0:
            print(f"weights from {checkpoint}")

    def _freeze(self, base: Path, trainer: Any) -> None:
        """Read the frozen weights from this checkpoint."""
        problems = self._damage(base)
        if problems:
            raise UserError(f"the adapter's base {base} is damaged: {'; '.join(problems[:3])}")
        trainer.strategy.adapter_base = base

    @staticmethod
    def _check_adapter(path: Path, model: Any, hint: str) -> None:
        """Refuse to go on with another adapter; its dropout may change, which no weight depends on."""
        recorded, adapter = adapter_record(path) or {"kind": "none"}, model.config.adapter
        current = {"kind": "none"} if adapter is None else plain(dataclasses.asdict(adapter))
        changed = [
            f"{key}: {recorded.get(key, 'not set')} in the checkpoint, {current.get(key, 'not set')} now"
            for key in ("kind", "rank", "alpha", "targets")
            if recorded.get(key) != current.get(key)
        ]
        if changed:
            raise UserError(f"checkpoint {path} is of another adapter: {'; '.join(changed)}", hint=hint)

    @staticmethod
    def _check_frozen(path: Path, model: Any, hint: str) -> None:
        """Refuse to go on with other parts frozen: the optimizer has no state of those that were."""
        recorded = read_record(path).get("settings", {}).get("optim.frozen", [])
        if sorted(recorded) != sorted(model.config.frozen):
            raise UserError(
                f"checkpoint {path} was trained with optim.frozen = {recorded}, which is {model.config.frozen} now",
                hint=f"{hint}; or begin a run of these weights: init.checkpoint={path}",
            )

    def _find_trainer_ckpt_path(self) -> Path | None:
        run_dir = Path(AppState().log_dir)
        newest = folders.newest(run_dir)
        if newest is None:
            return None
        problems = self._damage(newest)
        if problems:
            whole = next((p for p in folders.finished(run_dir)[1:] if not self._damage(p)), None)
            raise UserError(
                f"checkpoint {newest} is damaged: {'; '.join(problems[:3])}",
                hint=(
                    f"the newest whole one is {whole}; to continue from it add resume.resume_from_path={whole}"
                    if whole
                    else "no whole checkpoint is left: remove the run's folder to start anew"
                ),
            )
        return newest

    def get_trainer_ckpt_path(self, model: Any = None) -> Path | None:
        """Return the checkpoint that was named, or the run's newest."""
        if not self.resume_from_path:
            return self._find_trainer_ckpt_path()
        chosen = Path(self.resume_from_path)
        if not (chosen / folders.INTEGRITY).is_file():
            raise UserError(f"resume.resume_from_path={chosen} is not a finished checkpoint of this project")
        problems = self._damage(chosen)
        if problems:
            raise UserError(f"checkpoint {chosen} is damaged: {'; '.join(problems[:3])}")
        if self._rank == 0:
            self._set_newer_aside(folders.step_of(chosen))
        return chosen

    def _damage(self, checkpoint: Path) -> list[str]:
        """Return the damage in this rank's part; a rank that finds some stops, and the launcher stops the others."""
        return folders.damage(checkpoint, self._rank, self._ranks)

    @staticmethod
    def _set_newer_aside(step: int) -> None:
        """Rename this run's checkpoints of later steps: they would be taken for its newest. Nothing is deleted, and
        another run, whose checkpoint this one may continue from, keeps its own.
        """
        for newer in (Path(AppState().log_dir) / "checkpoints").glob("step-*"):
            if not newer.is_dir() or folders.step_of(newer) <= step:
                continue
            names = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
            paths = (newer.with_name(f"aside-{newer.name}{name}") for name in names)
            newer.rename(next(path for path in paths if not path.exists()))

    def _check_initial_weights(self, path: Path, trainer: pl.Trainer, model: Any, hint: str) -> None:
        """Refuse other initial weights than the run began with; an adapter's frozen ones may have been moved."""
        now = {
            "init_seed": model.config.init_seed,
            "init.checkpoint": self.init_checkpoint,
            "init.repair_embeddings": self.repair_embeddings,
        }
        recorded = {**now, "init.repair_embeddings": False, **read_record(path).get("settings", {})}
        trainer.strategy.init_checkpoint = recorded["init.checkpoint"]
        trainer.strategy.repair_embeddings = recorded["init.repair_embeddings"]
        if self.init_checkpoint is None or model.config.adapter is not None:
            del now["init.checkpoint"]
        changed = [
            f"{key}: {recorded[key]} in the checkpoint, {value} now"
            for key, value in now.items()
            if recorded[key] != value
        ]
        if changed:
            raise UserError(f"checkpoint {path} began with other weights: {'; '.join(changed)}", hint=hint)

    @staticmethod
    def _check_model(path: Path, model: Any, hint: str) -> None:
        record = read_record(path)
        recorded = read_definition(record, f"checkpoint {path}")
        unnamed = ("name",) if "hub" in (record.get("imported") or {}) else ()  # there it is the repository's
        changed = recorded.differences(model.config.definition(), "in the checkpoint", "now", but=unnamed)
        if recorded.encoder is None and model.config.vision is not None:
            hint = (
                f"put an encoder in front of it first: nemotron-h import vision {path} {model.config.vision.name} OUT"
            )
        if changed:
            raise UserError(f"checkpoint {path} is of another model: {'; '.join(changed)}", hint=hint)

    @staticmethod
    def _leave_if_complete(path: Path, trainer: pl.Trainer) -> None:
        """Exit with code 0 where the run has all its steps, so that the last job of a chain does."""
        step = folders.step_of(path)
        if step >= trainer.max_steps:
            if trainer.global_rank == 0:
                print(
                    f"the run in {AppState().log_dir} is complete: step {step} of {trainer.max_steps}\n"
                    f"to train on, raise tokens; for a new run use log.dir=DIR"
                )
            raise SystemExit(0)
