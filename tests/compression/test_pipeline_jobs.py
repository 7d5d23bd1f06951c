"""Distillations as jobs of a Slurm that is played: the queue by files, each job by a run in a fork."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_pipeline import Tiny
from typer.testing import CliRunner, Result

sys.path.insert(0, str(Path(__file__).parents[1] / "cluster"))
import slurm_here

from nemotron_h.cli.main import app
from nemotron_h.compression import needs
from nemotron_h.core.errors import UserError
from nemotron_h.launch import jobs, runs
from nemotron_h.launch.jobs import Job
from nemotron_h.launch.place import Place, place_of
from nemotron_h.launch.runs import Run
from nemotron_h.platform import memory

pytestmark = pytest.mark.slow

CLUSTER = "kind: slurm\naccount: a\npartition: p\nwork_dir: {folder}\ngpus: none\n"


class Queue:
    """Takes submissions in place of `nemo ... --detach`, and trains one after the other.

    Attributes:
        submitted: names of the runs, in order.
    """

    def __init__(self, tiny: Tiny, folder: Path) -> None:
        self.tiny, self.folder, self.one = tiny, folder, threading.Lock()
        self.submitted: list[str] = []
        self.threads: list[threading.Thread] = []

    def submit(self, run: Run, place: Place) -> Job:
        runs.write_recipe(run)
        self.submitted.append(run.name)
        job = Job(str(len(self.submitted)), str(self.folder / run.name))
        Path(job.logs).mkdir(exist_ok=True)
        queued = self.folder / f"{job.id}.queued"
        queued.touch()
        thread = threading.Thread(target=self._train, args=(run, job, queued))
        self.threads.append(thread)
        thread.start()
        return job

    def _train(self, run: Run, job: Job, queued: Path) -> None:
        code = 0
        try:
            with self.one:  # the forks take one order at a time
                self.tiny.train(run.recipe_file, *self.tiny.options.get(run.name, []))
        except UserError as error:
            code = int(error.message.split("exit code ")[1].split(":")[0])
        finally:
            shutil.copy(run.recipe_file.with_suffix(".out"), Path(job.logs) / f"log-{run.name}_{job.id}_0.out")
            script = Path(job.logs) / f"sbatch_{run.name}_{job.id}.out"
            script.write_text(f"job exited with code {code}\n" if code >= 0 else "Killed\n")
            queued.unlink()


@pytest.fixture
def queue(compressed: tuple[Tiny, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Queue]:
    """The pipeline before its short distillations, and a queue for them; afterwards all is as it was."""
    tiny, _ = compressed
    stages = ("short-distil", "select", "distil", "export")
    for stage in stages:
        shutil.move(tiny.root / stage, tmp_path / stage)
    tiny.options.clear()
    (tmp_path / "slurm").mkdir()
    played = Queue(tiny, tmp_path / "slurm")
    monkeypatch.setenv("PATH", slurm_here.path(played.folder))
    monkeypatch.setattr(runs, "_submit", played.submit)
    monkeypatch.setattr(runs, "POLL_S", 0.05)
    monkeypatch.setattr(jobs, "ASK_S", 0.05)
    (tiny.folder / "cluster.yaml").write_text(CLUSTER.format(folder=tiny.folder))
    yield played
    for thread in played.threads:
        thread.join()
    for stage in stages:
        shutil.rmtree(tiny.root / stage, ignore_errors=True)
        shutil.move(tmp_path / stage, tiny.root / stage)


def test_jobs_come_to_what_processes_come_to(queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it waits, the command waits for the same jobs again; all are in the queue at once."""
    tiny = queue.tiny
    place, _ = place_of([f"executor={tiny.folder}/cluster.yaml"])
    with monkeypatch.context() as patch:

        def interrupted(_: jobs.Watch) -> bool:
            raise KeyboardInterrupt

        patch.setattr(jobs.Watch, "over", interrupted)
        first = tiny.made(place=place)
        with pytest.raises(KeyboardInterrupt):
            first.pipeline.run("short-distil")
    assert sorted(queue.submitted) == sorted(first.read("score", "ranking.json")["chosen"])
    assert "job 1 goes on" in first.console.file.getvalue()
    again = tiny.made(place=place)
    for stage in ("short-distil", "select", "distil"):
        again.pipeline.run(stage)
    assert queue.submitted[2:] == ["small"], "the first two were waited for, not submitted again"
    said = again.console.file.getvalue()
    assert "small: job 3: RUNNING" in said
    assert "step 8/8" in said
    for stage in ("short-distil", "select", "distil"):
        before, after = (json.loads((folder / stage / "stage.json").read_text()) for folder in (tmp_path, tiny.root))
        assert after["outputs"] == before["outputs"]
    assert not list(tiny.root.rglob("*.job.json")), "of runs that are over nothing is waited for"


def test_a_job_that_fails_is_named_with_its_log(queue: Queue) -> None:
    tiny, (name, _) = queue.tiny, queue.tiny.made().read("score", "ranking.json")["chosen"]
    tiny.options[name] = ["kill=3"]
    arguments = ["minipuzzle", str(tiny.recipe_file), f"executor={tiny.folder}/cluster.yaml", "--stage", "short-distil"]
    with pytest.raises(UserError, match=f"^{name} was killed or cancelled: .*step [12]") as raised:
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert raised.value.hint == f"see {queue.folder}/{name}/log-{name}_1_0.out"
    tiny.options.clear()
    said = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert queue.submitted.count(name) == 2, "it goes on from its checkpoint"
    assert "step 4/4" in said.stdout


def test_what_does_not_fit_is_refused_before_work(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: str) -> str:
        with pytest.raises(UserError) as raised:
            CliRunner().invoke(app, ["minipuzzle", str(tiny.recipe_file), *arguments], catch_exceptions=False)
        return raised.value.message

    elsewhere = f"log.dir={tiny.folder}/refused"
    assert refused("parallel.nodes=8", "data.micro_batch_size=1", elsewhere).startswith(
        f"{tiny.recipe_file}: parallel.nodes = 8: 8 ranks"
    )
    (tiny.folder / "away.yaml").write_text(CLUSTER.format(folder="/nowhere"))
    assert "executor.work_dir = /nowhere is no folder" in refused(elsewhere, f"executor={tiny.folder}/away.yaml")
    # 62,344 parameters and a candidate of at most 52,000, in float32
    monkeypatch.setattr(memory, "available", lambda device: 62_344 * 4)
    assert "stage score holds tiny and what replaces parts of it: up to 0.0 GiB of weights in float32" in refused(
        elsewhere
    )
    assert not (tiny.folder / "refused").exists()


def test_what_the_paper_needs() -> None:
    """56,324,350,464 weights, and once more those of 54 FFNs, of which candidates have narrower ones."""
    from nemotron_h.recipe.checks import definition_of
    from nemotron_h.recipe.compose import compose

    recipe = compose("nemotron_h_47b/minipuzzle")
    definition = definition_of(recipe, "")
    held = {device: needs.stage_bytes(recipe, definition, device) for device in ("cuda", "cpu")}
    ffns = 54 * (2 * 8192 * 32768 + 8192)
    assert (held["cuda"]["importance"], held["cuda"]["score"]) == (2 * 56_324_350_464, 2 * (56_324_350_464 + ffns))
    assert held["cpu"]["score"] == 2 * held["cuda"]["score"]
    arguments = ["recipe", "check", "nemotron_h_47b/minipuzzle"]
    said = CliRunner().invoke(app, arguments, catch_exceptions=False).stdout
    assert "the parent, 104.9 GiB on a GPU, 209.8 GiB without one" in said
    assert "in score with a candidate up to 158.9 GiB, 317.8 GiB" in said


def test_dryrun_shows_what_would_be_started(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent stands for the candidates; nothing is written. Scripts themselves: tests/cluster/test_scripts.py."""
    script = "import sys; print('Configuring global options', sys.argv[1:], open(sys.argv[1]).read(), sep='\\n')"
    monkeypatch.setattr(runs, "command_of", lambda run: [sys.executable, "-c", script, str(run.recipe_file)])
    arguments = ["minipuzzle", str(tiny.recipe_file), "--dryrun", f"log.dir={tiny.folder}/refused"]
    (tiny.folder / "cluster.yaml").write_text(CLUSTER.format(folder=tiny.folder))
    said = CliRunner().invoke(app, [*arguments, f"executor={tiny.folder}/cluster.yaml"], catch_exceptions=False).stdout
    assert said.count(f"'executor={tiny.folder}/cluster.yaml', '--dryrun']") == 2
    assert "name: CANDIDATE\nstage: distill\ntokens: '1024'" in said
    assert "name: small\nstage: distill\ntokens: '2048'" in said
    assert "Configuring" not in said
    here = CliRunner().invoke(app, arguments, catch_exceptions=False).stdout
    assert here.count(sys.executable) == 2
    assert not (tiny.folder / "refused").exists()
