"""Trackers, which a run's metrics go to beside its record: TensorBoard, Weights & Biases and MLflow, by Lightning's
loggers. A resumed run goes on in the same run of each service: `trackers.json` in its folder has their ids.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger, rank_zero_experiment
from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread

from nemotron_h.core.errors import UserError
from nemotron_h.core.files import write_json
from nemotron_h.core.strict import leaves

IDS = "trackers.json"
PROJECT = "nemotron_h"
#: that Weights & Biases draws metrics over, as Lightning names it
STEP = "trainer/global_step"


@dataclass(frozen=True)
class Described:
    """Description of a run for its trackers.

    Attributes:
        recipe: resolved, as plain containers.
        text: the same as a recipe's file.
        tags: stage, hardware and commit.
        repeats: the steps that a resume repeats come to what they came to before.
    """

    recipe: dict[str, Any]
    text: str
    tags: dict[str, str]
    repeats: bool

    @property
    def config(self) -> dict[str, Any]:
        """Return the recipe's values, without their sources."""
        values = {key: value for key, value in self.recipe.items() if key != "sources"}
        return {**values, "model": {key: value for key, value in values["model"].items() if key != "sources"}}


class TensorBoard(TensorBoardLogger):
    """Events in the run's folder. A thread of TensorBoard's writes them, and the next call raises what it met: a full
    disk is then an error that names the folder, once, without that thread's traceback.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        others = threading.excepthook

        def hook(thrown: threading.ExceptHookArgs) -> None:
            if not isinstance(thrown.thread, _AsyncWriterThread):
                others(thrown)

        threading.excepthook = hook

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.filename = error.filename or self.log_dir
            raise

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics."""
        with self._naming():
            super().log_metrics(metrics, step)

    def save(self) -> None:
        """Write what was logged."""
        with self._naming():
            super().save()

    def finalize(self, status: str) -> None:
        """Close the file."""
        with self._naming():
            super().finalize(status)


class Service:
    """Logger of a service. It never ends a run that has begun: what cannot be logged is a warning.

    Args:
        known: where the id of its run was read; empty for a new run.
    Attributes:
        key: as in `log.trackers`.
        logged: metric -> last step that the service has; a resume that repeats such steps does not log them twice.
    """

    key = ""
    failing = False

    def __init__(self, *args: Any, known: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.known = known
        self.logged: dict[str, int] = {}

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Return the service's run, or its client; the first call reaches the service.

        Errors:
            UserError: it cannot be reached, or does not know the run.
        """
        try:
            return super().experiment
        except Exception as error:
            raise UserError(
                f"log.trackers: {self.key} does not begin: {_first_line(error)}",
                hint=f"{self.known} names its run: restore the service's address, or remove the file for a new run"
                if self.known
                else f"leave {self.key} out of log.trackers to train without it",
            ) from error

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log what the service has not; say once that it fails, and once that it is back."""
        step = None if step is None else int(step)  # NeMo logs it as a float, which MLflow's files do not take
        new = {name: value for name, value in metrics.items() if step is None or step > self.logged.get(name, -1)}
        if not new:
            return
        try:
            super().log_metrics(new, step)
        except Exception as error:
            if not self.failing:
                print(f"warning: {self.key} lacks metrics from step {step} on: {_first_line(error)}", flush=True)
            self.failing = True
        else:
            if self.failing:
                print(f"{self.key} has metrics again, from step {step} on", flush=True)
            self.failing = False

    def finalize(self, status: str) -> None:
        """End the service's run; where that fails, say so."""
        try:
            super().finalize(status)
        except Exception as error:
            print(f"warning: {self.key} does not know that the run has ended: {_first_line(error)}", flush=True)

    def begin(self, run: Described) -> str:
        """Begin the service's run, or go on with it; return its id."""
        raise NotImplementedError

    def view(self) -> str:
        """Return the command or address that shows the run."""
        raise NotImplementedError


class Wandb(Service, WandbLogger):
    """Run of Weights & Biases: on its server, or with `WANDB_MODE=offline` below `wandb` in the run's folder."""

    key = "wandb"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        del self._wandb_init["anonymous"]  # Lightning always sends it, and wandb warns of it

    def begin(self, run: Described) -> str:
        """Begin the run, with the recipe as its config."""
        experiment = self.experiment
        if run.repeats and experiment.resumed:  # offline, nobody knows what was logged
            values = dict(experiment.summary)
            # a validation is logged after its step, and may be missing
            self.logged = dict.fromkeys(values, int(values.get(STEP, 0)) - 1)
        experiment.config.update(run.config, allow_val_change=True)
        experiment.tags = tuple(dict.fromkeys((*(experiment.tags or ()), *run.tags.values())))
        return experiment.id

    def view(self) -> str:
        """Return its address, or the command that sends what was written offline."""
        if not self.experiment.offline:
            return self.experiment.url
        return f"wandb sync {Path(self.experiment.dir).parents[1]}/offline-run-*"


class Mlflow(Service, MLFlowLogger):
    """Run of MLflow: on `$MLFLOW_TRACKING_URI`, or in `mlruns` of the run's folder."""

    key = "mlflow"

    def finalize(self, status: str) -> None:
        """End the run in a state that MLflow knows: a run that left early is `KILLED`."""
        super().finalize(status if status in ("success", "finished", "failed") else "KILLED")

    def begin(self, run: Described) -> str:
        """Begin the run. Its params are those of the first start, as MLflow never changes one; `recipe.yaml` is of the
        newest.
        """
        resumed, client = self._run_id is not None, self.experiment
        data = client.get_run(self.run_id).data
        if resumed:
            client.update_run(self.run_id, status="RUNNING")
            if run.repeats:
                self.logged = {
                    name: max(entry.step for entry in client.get_metric_history(self.run_id, name))
                    for name in data.metrics
                }
        self.log_hyperparams({key: value for key, value in leaves(run.config) if key not in data.params})
        for name, value in run.tags.items():
            client.set_tag(self.run_id, name, value)
        try:
            client.log_text(self.run_id, run.text, "recipe.yaml")
        except Exception as error:  # a server's store of artifacts may need a package or rights of its own
            print(f"warning: mlflow does not store recipe.yaml: {_first_line(error)}", flush=True)
        return self.run_id

    def view(self) -> str:
        """Return the command that shows a local store, or the server's address."""
        uri = self._tracking_uri
        return f"MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri {uri}" if uri.startswith("file:") else uri


def loggers(names: Sequence[str], project: str | None, folder: Path, *, first: bool) -> dict[str, Logger]:
    """Return tracker -> logger; nothing is sent before `begin`.

    Args:
        names: as `log.trackers`.
        project: as `log.project`.
        folder: of the run, whose name the services show.
        first: this is the rank that logs; the others' loggers of services do nothing.
    Errors:
        UserError: MLflow refuses its address.
    """
    makers = {
        "tensorboard": lambda ids: TensorBoard(save_dir="tensorboard", name=""),
        "wandb": lambda ids: _wandb(project, folder, ids),
        "mlflow": lambda ids: _mlflow(project, folder, ids),
    }
    ids = _ids(folder) if first else {}
    return {name: makers[name](ids) if first or name == "tensorboard" else DummyLogger() for name in names}


def _wandb(project: str | None, folder: Path, ids: Mapping[str, str]) -> Wandb:
    project = project or os.environ.get("WANDB_PROJECT") or PROJECT
    known = str(folder / IDS) if "wandb" in ids else ""
    return Wandb(project=project, name=folder.name, save_dir=str(folder.resolve()), id=ids.get("wandb"), known=known)


def _mlflow(project: str | None, folder: Path, ids: Mapping[str, str]) -> Mlflow:
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        uri = (folder.resolve() / "mlruns").as_uri()
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # newer releases ask for a database
    try:
        return Mlflow(
            experiment_name=project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT,
            run_name=folder.name,
            tracking_uri=uri,
            run_id=ids.get("mlflow"),
            known=str(folder / IDS) if "mlflow" in ids else "",
        )
    except Exception as error:
        raise UserError(f"log.trackers: mlflow: MLFLOW_TRACKING_URI={uri}: {_first_line(error)}") from error


def _ids(folder: Path) -> dict[str, str]:
    file = folder / IDS
    if not file.is_file():
        return {}
    try:
        ids = json.loads(file.read_text())
        return {name: ids[name] for name in ids if isinstance(ids[name], str)}
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} is damaged: {error}", hint="remove it: the trackers then begin new runs") from error


def begin(trainer: pl.Trainer, run: Described, folder: Path) -> None:
    """Begin the services' runs, or go on with them, and keep their ids; rank 0 alone calls it.

    Errors:
        UserError: a service refuses.
    """
    services = [logger for logger in trainer.loggers if isinstance(logger, Service)]
    ids = _ids(folder) if services else {}
    for logger in services:
        try:
            begun = logger.begin(run)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"log.trackers: {logger.key} does not begin: {_first_line(error)}",
                hint=f"leave {logger.key} out of log.trackers to train without it",
            ) from error
        if ids.get(logger.key) != begun:
            ids[logger.key] = begun
            write_json(folder / IDS, ids)


def views(trainer: pl.Trainer, folder: str) -> list[str]:
    """Return a line for each tracker: what shows the run.

    Args:
        folder: of the run, quoted for a shell.
    """
    return [
        logger.view() if isinstance(logger, Service) else f"tensorboard --logdir {folder}"
        for logger in trainer.loggers
        if isinstance(logger, Service | TensorBoard)
    ]


def hardware(ranks: int) -> str:
    """Return how many of which device a run takes."""
    return f"{ranks} x {torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
