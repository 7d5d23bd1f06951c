"""Runs of a sweep: how many at a time, what fails, what is written; and one of 12 runs that is killed twice."""

from __future__ import annotations

import csv
import io
import json
import signal
from pathlib import Path

import pytest
from forks import FORKS
from rich.console import Console
from small_run import Small
from test_sweep_files import sweep_of, write

from nemotron_h.core.progress import STEPS, Step
from nemotron_h.launch import capacity as capacities
from nemotron_h.launch import runs
from nemotron_h.launch.place import HERE, place_of
from nemotron_h.launch.runs import Run
from nemotron_h.launch.several import threads, train_several
from nemotron_h.platform import memory
from nemotron_h.schema.recipe import RecipeConfig
from nemotron_h.sweep.command import Sweep
from nemotron_h.sweep.points import Point
from nemotron_h.sweep.results import table
from nemotron_h.sweep.results import write as write_results
from nemotron_h.sweep.rows import groups, row_of, spread

SWEEP_IN_FORKS = Path(__file__).with_name("sweep_in_forks.py")


def finish(point: Point, losses: list[float], validation: float, at: int | None = None) -> None:
    """Write what a finished run leaves, whose validation loss is of its last step, or of step `at`."""
    point.run.folder.mkdir(parents=True, exist_ok=True)
    for number, loss in enumerate(losses, 1):
        last = number == len(losses)
        values = {"validation_loss": validation if last else float("nan"), "measured": [], "tokens_per_second": 1.0}
        measured_at = (number if at is None else at) if last else None
        times = {"time": 100.0 + number, "began": 100.0, "validation_step": measured_at}
        step = Step(step=number, steps=len(losses), loss=loss, lr=0.1, seconds_left=0.0, **values, **times)
        step.append(point.run.folder / STEPS)
    data = point.run.recipe.data
    record = {
        "recipe": {"name": point.name},
        "model": {},
        "data": {"seq_length": data.seq_length, "global_batch_size": data.global_batch_size},
        "metrics": {"val_loss": validation},
        "step": len(losses),
        "max_steps": len(losses),
        "ended": "finished",
    }
    (point.run.folder / "run.json").write_text(json.dumps(record))


class Begun:
    """A run that ends after some looks; `alive` counts those that go on."""

    alive, most = set(), 0
    again = ""

    def __init__(self, run: Run, looks: int) -> None:
        self.run, self.looks, self.code = run, looks, 0 if "bad" not in run.name else 3
        Begun.alive.add(run.name)
        Begun.most = max(Begun.most, len(Begun.alive))
        self.steps, self.output = self, self

    def over(self) -> bool:
        self.looks -= 1
        if self.looks <= 0:
            Begun.alive.discard(self.run.name)
        return self.looks <= 0

    def new(self) -> list:
        return []

    def newest(self) -> Path:
        return Path("x.log")

    def text(self) -> str:
        return "error: it is bad"


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_so_many_at_once_and_a_failure_lets_the_others_go_on(
    at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots, ended = [], {}

    def begin(run: Run, place: object, console: object, env: dict) -> Begun:
        slots.append(env["SLOT"])
        return Begun(run, 1 + len(run.name) % 3)

    monkeypatch.setattr(runs, "begin", begin)
    monkeypatch.setattr(runs, "POLL_S", 0)
    monkeypatch.setattr(runs, "is_finished", lambda run, steps: run.name not in Begun.alive and "bad" not in run.name)
    Begun.alive, Begun.most = set(), 0
    named = []
    for name in ("a", "bb", "bad", "cc", "ddd"):
        recipe = RecipeConfig(name=name)
        recipe.log.dir = str(tmp_path)
        named.append((Run(name, recipe), 4))
    said = io.StringIO()

    def told(run: Run, error: object) -> str:
        ended[run.name] = error
        return f"{run.name} over"

    assert train_several(named, at_once, Console(file=said), ended=told, env=lambda slot: {"SLOT": str(slot)})
    assert Begun.most == at_once
    assert set(slots) == {str(slot) for slot in range(at_once)}
    assert set(ended) == {"a", "bb", "bad", "cc", "ddd"}
    assert [name for name, error in ended.items() if error] == ["bad"]
    assert "exit code 3: error: it is bad" in ended["bad"].message
    assert "5 of 5" in said.getvalue()


def test_ranks_and_memory_limit_the_runs(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = [p.run.recipe for p in sweep_of(write(small, tmp_path, seeds=[1, 2, 3, 4, 5])).points]
    monkeypatch.setattr(capacities, "gpu_count", lambda: 0)
    monkeypatch.setattr(capacities.os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(capacities, "available", lambda: 2**40)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = capacities.capacity(recipes, None, HERE)
    assert (found.runs, found.why) == (5, "points")
    assert found.env(0) == {"OMP_NUM_THREADS": "1"}
    assert capacities.capacity(recipes, 3, HERE)[:2] == (3, "at_once")
    assert capacities.capacity(recipes[:2], None, HERE).env(0) == {"OMP_NUM_THREADS": "4"}
    monkeypatch.setattr(capacities, "available", lambda: int(2.5 * capacities.memory(recipes[0])))
    assert capacities.capacity(recipes, 3, HERE).runs == 2
    for recipe in recipes:
        recipe.parallel.devices = 4
    monkeypatch.setattr(capacities, "available", lambda *_: 2**40)
    assert capacities.capacity(recipes, None, HERE)[:2] == (2, "8 cores")
    monkeypatch.setattr(capacities, "gpu_count", lambda: 8)
    on_gpus = capacities.capacity(recipes, None, HERE)
    assert on_gpus[:2] == (2, "8 GPUs")
    assert on_gpus.env(1) == {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,6,5,4,3,2,1,0")
    assert capacities.capacity(recipes, None, HERE).env(1) == {"CUDA_VISIBLE_DEVICES": "3,2,1,0"}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    shared = capacities.capacity(recipes, 3, HERE)
    assert shared[:2] == (3, "at_once")
    assert [shared.env(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["0,1,2,3", "4,5,6,7", "0,1,2,3"]
    monkeypatch.setattr(capacities, "available", lambda _: int(1.9 * capacities.gpu_memory(recipes[0])))
    assert capacities.capacity(recipes, 3, HERE).runs == 2


def test_threads_are_the_users_where_he_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert threads(4) == {}
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert threads(1) == {}
    assert int(threads(2)["OMP_NUM_THREADS"]) >= 1
    assert memory.available() > 0


def test_a_validation_loss_of_another_step_is_none_of_the_finished_model(small: Small, tmp_path: Path) -> None:
    first, second = sweep_of(write(small, tmp_path, seeds=[1, 2])).points
    finish(first, [6.0, 5.0, 4.0, 3.0], 9.0, at=2)
    finish(second, [6.0, 5.0, 4.0, 3.0], float("nan"), at=0)
    rows = [row_of(point) for point in (first, second)]
    assert [(row["loss"], row["validation_loss"], row["train_loss"]) for row in rows] == [(None, None, 3), (3, None, 3)]


def test_results_are_means_over_seeds_with_their_spread(small: Small, tmp_path: Path) -> None:
    figures = [
        {"x": "optim.peak_lr", "log": ["x"]},
        {"x": "run", "y": "validation_loss", "line": "optim.peak_lr"},
        {"x": "tokens_seen", "y": "train_loss", "line": "run"},
    ]
    content = {"runs": [{"name": "a", "optim.beta1": 0.8}, {"name": "b", "optim.beta1": 0.9}], "seeds": [1, 2]}
    made = sweep_of(write(small, tmp_path, grid={"optim.peak_lr": [1e-2, 1e-3]}, figures=figures, **content))
    for number, point in enumerate(made.points[:-1]):
        finish(point, [6.0, 5.0, 4.0, 3.0 + number], 2.0 + number)
    written = write_results(made.file, made.points)
    rows = list(csv.DictReader((made.file.folder / "sweep.csv").open()))
    assert [row["state"] for row in rows] == ["finished"] * 7 + ["not finished"]
    assert [rows[1][key] for key in ("point", "run", "optim.peak_lr", "seed", "optim.beta1")] == [
        *("a_peak_lr-0.01_seed-2", "a", "0.01", "2", "0.8"),
    ]
    assert [float(rows[1][key]) for key in ("loss", "train_loss", "validation_loss", "seconds")] == [3, 4, 3, 4]
    assert int(rows[0]["tokens"]) == 2048
    (labels, members), *_ = groups(made.points, written.rows)
    assert labels == {"run": "a", "optim.peak_lr": 0.01}
    found = spread(row["validation_loss"] for row in members)
    assert (found.mean, found.deviation, found.count) == (2.5, pytest.approx(0.5**0.5), 2)
    said = io.StringIO()
    Console(file=said, width=200).print(table(made.file, made.points, written.rows))
    assert "2.5000 ± 0.7071" in said.getvalue()
    assert "1 of 2" in said.getvalue()
    for number in (1, 2, 3):
        assert (made.file.folder / f"figure-{number}.svg").read_text().startswith("<svg")
    page = (made.file.folder / "report.html").read_text()
    assert "7 of 8" in page
    assert "2.5000 ± 0.7071" in page


def test_jobs_and_results_are_in_the_folder_of_the_cluster(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = ["executor=slurm", "executor.account=a", "executor.partition=p", f"executor.work_dir={tmp_path}"]
    file = write(small, tmp_path, seeds=[1, 2, 3], dir="swept", settings={"data.root": str(small.folder / "data")})
    made = Sweep(file, place_of(slurm)[0], Console(file=io.StringIO()))
    assert {point.run.folder.parent for point in made.points} == {tmp_path / "swept" / "lr"}
    begun = []

    def begin(run: Run, place: object, console: object, env: dict) -> Begun:
        begun.append(run.name)
        finish(next(point for point in made.points if point.run is run), [4.0, 3.0, 2.0, 1.0], 1.0)
        return Begun(run, 2)

    monkeypatch.setattr(runs, "begin", begin)
    monkeypatch.setattr(runs, "POLL_S", 0)
    monkeypatch.setattr(runs, "is_finished", lambda run, steps: True)
    made.train()
    made.write()
    assert begun == ["seed-1", "seed-2", "seed-3"]
    assert "3 at a time (jobs of the cluster)" in made.console.file.getvalue()
    assert (tmp_path / "swept" / "lr" / "report.html").is_file()
    assert not made.failed


def test_checkpoints_go_where_the_file_says_so(small: Small, tmp_path: Path) -> None:
    for keep in (True, False):
        made = sweep_of(write(small, tmp_path, name=f"keep-{keep}", keep_checkpoints=keep))
        (point,) = made.points
        (point.run.folder / "checkpoints").mkdir(parents=True)
        finish(point, [4.0, 3.0, 2.0, 1.0], 1.0)
        assert made._ended(point.run, None).startswith("run finished: loss 1.0000")
        assert (point.run.folder / "checkpoints").is_dir() == keep
        made.console = Console(file=io.StringIO())
        made.train()
        assert "1 points, 1 finished already\n" in made.console.file.getvalue()


def finished_rows(folder: Path) -> list[dict[str, str]]:
    """The rows of a sweep without what differs from one machine's moment to another's."""
    rows = list(csv.DictReader((folder / "sweep.csv").open()))
    assert {row["state"] for row in rows} == {"finished"}
    return [{key: value for key, value in row.items() if key not in ("seconds", "folder")} for row in rows]


@pytest.mark.slow
def test_a_sweep_of_12_runs_killed_twice_ends_as_one_that_was_not(small: Small, tmp_path: Path) -> None:
    content = {"grid": {"optim.peak_lr": [1e-2, 3e-3, 1e-3], "optim.weight_decay": [0.1, 0.0]}, "seeds": [1, 2]}
    content |= {"at_once": 2, "keep_checkpoints": False}
    straight, killed = (write(small, tmp_path, name, **content) for name in ("straight", "killed"))

    def call(name: str, number: int, steps: int) -> tuple[int, str]:
        path = str(tmp_path / f"{name}.yaml")
        code = FORKS.run(str(SWEEP_IN_FORKS), str(number), str(steps), path, folder=tmp_path, name=name)
        return code, (tmp_path / f"{name}.out").read_text() + (tmp_path / f"{name}.err").read_text()

    code, said = call("straight", 0, 0)
    assert code == 0, said
    assert "12 points, 0 finished already" in said
    assert "12 of 12" in said
    code, said = call("killed", signal.SIGKILL, 14)
    assert code == -signal.SIGKILL, said
    code, said = call("killed", signal.SIGTERM, 30)
    assert code == runs.LEFT_EARLY, said
    assert "stopped; the same command continues" in said
    records = {file: file.stat().st_mtime_ns for file in killed.folder.glob("*/run.json")}
    finished = [file for file in records if json.loads(file.read_text())["ended"] == "finished"]
    assert 3 <= len(finished) < 12
    code, said = call("killed", 0, 0)
    assert code == 0, said
    assert f"12 points, {len(finished)} finished already" in said
    assert all(file.stat().st_mtime_ns == records[file] for file in finished), "none is run twice"
    assert finished_rows(killed.folder) == finished_rows(straight.folder)
    assert not list(killed.folder.glob("*/checkpoints"))
