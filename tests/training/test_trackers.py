"""Trackers: one run of each service over a resume, with the recipe; their packages and keys are checked first."""

from __future__ import annotations

import errno
import importlib.util
import json
import threading
from pathlib import Path
from types import SimpleNamespace

import offline_runs
import pytest
from small_run import Small, events
from tensorboard.summary.writer.record_writer import RecordWriter

from nemotron_h.core.errors import UserError, user_error
from nemotron_h.platform.trackers import check_trackers
from nemotron_h.training import trackers
from nemotron_h.training.trackers import IDS, Described

STEPS = 12
COMPARED = {"reduced_train_loss", "val_loss", "grad_norm", "lr"}
HAVE = [name for name in ("wandb", "mlflow") if importlib.util.find_spec(name)]
needs_wandb = pytest.mark.skipif("wandb" not in HAVE, reason="wandb is not installed: pip install -e '.[wandb]'")
needs_mlflow = pytest.mark.skipif("mlflow" not in HAVE, reason="mlflow is not installed: pip install -e '.[mlflow]'")
RUN = Described({"stage": "sft", "model": {"sources": {}}, "optim": {"lr": 1}, "sources": {}}, "text", {"a": "b"}, True)


@pytest.fixture(scope="module")
def tracked(small: Small) -> Path:
    """The folder of a run that is told to leave at step 6, and goes on."""
    (small.folder / "wandb").mkdir()
    (small.folder / "wandb" / "settings").write_text("[default]\nmode = offline\n")  # as `wandb offline` does
    chosen = ("validation_batches: 1", f"validation_batches: 1, trackers: [tensorboard, {', '.join(HAVE)}]")
    recipe = small.variant("tracked", chosen)
    assert small.train("tracked", "signal=6:0:SIGTERM", recipe=recipe, check=False).returncode == 75
    said = small.train("tracked", recipe=recipe).stdout
    assert "resumed at step 6" in said
    for line in ("tensorboard --logdir", *(f"{command} " for command in HAVE)):
        assert line in said
    return small.run_dir("tracked")


@needs_wandb
@pytest.mark.slow
def test_a_resumed_run_is_one_run_of_wandb(tracked: Path) -> None:
    files = sorted(tracked.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    runs = [offline_runs.run(file) for file in files]
    assert {run.run_id for run in runs} == {json.loads((tracked / IDS).read_text())["wandb"]}
    assert {(run.project, run.display_name) for run in runs} == {("nemotron_h", "small")}
    assert {"pretrain", "1 x CPU"} <= set(runs[-1].tags)
    assert offline_runs.config(files[-1])["model"]["pattern"] == "M-M*-"
    points: dict[str, dict[int, set[float]]] = {}
    for row in (row for file in files for row in offline_runs.history(file)):
        for name in row.keys() & COMPARED:
            points.setdefault(name, {}).setdefault(row["trainer/global_step"], set()).add(row[name])
    assert points == shown(tracked)
    assert sorted(points["grad_norm"]) == list(range(STEPS))


def shown(tracked: Path) -> dict[str, dict[int, set[float]]]:
    """Metric -> step -> the values of it in TensorBoard."""
    return {name: steps for name, steps in events(tracked).items() if name in COMPARED}


@needs_mlflow
@pytest.mark.slow
def test_a_resumed_run_is_one_run_of_mlflow(tracked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient((tracked / "mlruns").as_uri())
    (experiment,) = client.search_experiments(filter_string="name = 'nemotron_h'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == json.loads((tracked / IDS).read_text())["mlflow"]
    assert (run.info.run_name, run.info.status) == ("small", "FINISHED")
    assert (run.data.params["model.pattern"], run.data.params["optim.peak_lr"]) == ("M-M*-", "0.01")
    assert (run.data.tags["stage"], run.data.tags["hardware"]) == ("pretrain", "1 x CPU")
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["recipe.yaml"]
    for metric, steps in shown(tracked).items():
        history = client.get_metric_history(run.info.run_id, metric)
        assert {entry.step: {entry.value} for entry in history} == steps
        assert len(history) == len(steps)
    assert "tokens_per_second_per_rank" in run.data.metrics


@needs_mlflow
def test_steps_that_a_resume_repeats_are_logged_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def start(steps: range, repeats: bool) -> list[int]:
        logger = trackers.loggers(["mlflow"], "p", tmp_path, first=True)["mlflow"]
        described = Described(RUN.recipe, RUN.text, RUN.tags, repeats)
        trackers.begin(SimpleNamespace(loggers=[logger]), described, tmp_path)
        for step in steps:
            logger.log_metrics({"loss": 1.0}, step)
        return [entry.step for entry in logger.experiment.get_metric_history(logger.run_id, "loss")]

    assert start(range(4), True) == [0, 1, 2, 3]
    assert start(range(2, 6), True) == [0, 1, 2, 3, 4, 5]
    assert start(range(5, 7), False) == [0, 1, 2, 3, 4, 5, 5, 6]  # with other settings, step 5 comes to something else


@needs_wandb
def test_steps_that_a_resume_repeats_are_sent_to_wandb_once() -> None:
    """Its server tells a resumed run of the newest values alone: the last step's validation may be missing there."""
    rows: list[dict[str, float]] = []
    server = SimpleNamespace(
        resumed=True,
        summary={"loss": 2.0, "val_loss": 3.0, trackers.STEP: 5},
        config=SimpleNamespace(update=lambda values, allow_val_change: None),
        tags=("mine",),
        id="abc",
        log=rows.append,
    )
    logger = trackers.Wandb(project="p", experiment=server)
    assert logger.begin(RUN) == "abc"
    assert server.tags == ("mine", "b")
    for step in (4, 5, 6):
        logger.log_metrics({"loss": 1.0}, step)
    assert [row[trackers.STEP] for row in rows] == [5, 6]


@pytest.mark.parametrize("stated", [None, "ours"])
def test_the_project_is_the_recipe_s_or_that_of_the_variables(
    stated: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "of wandb")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "elsewhere").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    loggers = trackers.loggers(HAVE, stated, tmp_path / "run", first=True)
    if "wandb" in loggers:
        assert loggers["wandb"].name == (stated or "of wandb")
    if "mlflow" in loggers:
        client = loggers["mlflow"].experiment
        assert client.get_experiment(loggers["mlflow"].experiment_id).name == (stated or "of mlflow")
        assert (tmp_path / "elsewhere").is_dir()
    assert not (tmp_path / "run").exists()


@needs_mlflow
def test_a_run_that_the_server_does_not_know_is_an_error(tmp_path: Path) -> None:
    (tmp_path / IDS).write_text('{"mlflow": "0123456789abcdef0123456789abcdef"}')
    logger = trackers.loggers(["mlflow"], None, tmp_path, first=True)["mlflow"]
    with pytest.raises(UserError, match=r"mlflow does not begin: .*0123456789abcdef") as caught:
        trackers.begin(SimpleNamespace(loggers=[logger]), RUN, tmp_path)
    assert f"{tmp_path / IDS} names its run" in caught.value.hint


def test_ranks_but_the_first_log_to_no_service(tmp_path: Path) -> None:
    for logger in trackers.loggers(["wandb", "mlflow"], None, tmp_path, first=False).values():
        logger.log_metrics({"loss": 1.0}, 1)
    assert list(tmp_path.iterdir()) == []


class _Sink:
    """In the place of Lightning's logger."""

    def __init__(self) -> None:
        self.rows, self.down = [], False

    def log_metrics(self, metrics: dict[str, float], step: int | None) -> None:
        if self.down:
            raise OSError("no route\nto host")
        self.rows.append((step, metrics))


class _Service(trackers.Service, _Sink):
    key = "sink"


def test_a_service_that_fails_is_a_warning_and_no_end(capsys: pytest.CaptureFixture) -> None:
    service = _Service()
    for step, down in enumerate((False, True, True, False, False)):
        service.down = down
        service.log_metrics({"loss": 1.0}, float(step))
    assert [step for step, _ in service.rows] == [0, 3, 4]
    assert capsys.readouterr().out.splitlines() == [
        "warning: sink lacks metrics from step 1 on: no route",
        "sink has metrics again, from step 3 on",
    ]


@pytest.fixture
def unknown_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user whom Weights & Biases does not know."""
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("HOME", tmp_path), ("WANDB_CONFIG_DIR", tmp_path), ("NETRC", tmp_path / "netrc")):
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(tmp_path)
    wandb.teardown()  # settings are read once
    yield
    wandb.teardown()


def test_wandb_without_a_key_is_an_error(unknown_user: None) -> None:
    with pytest.raises(UserError, match=r"mine: log\.trackers has wandb, and there is no API key") as caught:
        check_trackers(["tensorboard", "wandb"], "mine: ")
    assert "WANDB_API_KEY" in caught.value.hint
    assert "WANDB_MODE=offline" in caught.value.hint


@pytest.mark.parametrize("known", ["offline", "key", "netrc"])
def test_wandb_offline_or_with_a_key_is_none(
    unknown_user: None, known: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if known == "netrc":
        host = pytest.importorskip("wandb").setup().settings.base_url.removeprefix("https://")
        (tmp_path / "netrc").write_text(f"machine {host}\n  login user\n  password {'0' * 40}\n")
    else:
        monkeypatch.setenv(*{"offline": ("WANDB_MODE", "offline"), "key": ("WANDB_API_KEY", "0" * 40)}[known])
    check_trackers(["wandb"])


def test_a_package_that_is_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "mlflow" else object())
    with pytest.raises(UserError, match=r"log\.trackers has mlflow, which is not installed") as caught:
        check_trackers(["tensorboard", "mlflow"])
    assert "pip install -e '.[mlflow]'" in caught.value.hint


def test_events_on_a_full_disk_are_one_error_that_names_their_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def log(step: int) -> None:
        logger.log_metrics({"loss": 1.0}, step)
        logger.save()

    printed: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", printed.append)
    logger = trackers.TensorBoard(save_dir=tmp_path, name="")
    log(1)
    monkeypatch.setattr(RecordWriter, "write", full)
    with pytest.raises(OSError, match="No space left") as raised:
        log(2)
    assert user_error(raised.value).message == f"{tmp_path}/version_0: No space left on device"
    assert not printed
    thread = threading.Thread(target=full)
    thread.start()
    thread.join()
    assert len(printed) == 1, "of other threads"
