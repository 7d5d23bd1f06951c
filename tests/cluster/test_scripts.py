"""What would be submitted: sbatch scripts, manifests and commands of shipped recipes, through `nemo`'s command line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from typer.testing import CliRunner

from nemotron_h.launch import jobs

sys.path.insert(0, str(Path(__file__).parent))
import slurm_here

pytestmark = pytest.mark.slow

SLURM = ("executor=slurm", "executor.account=ABC", "executor.partition=batch", "executor.work_dir=/shared/me")
KUBERNETES = ("executor=kubernetes", "executor.namespace=team", "executor.image=registry/i:1", "executor.claim=work")
EIGHT = ("parallel.nodes=2", "parallel.devices=8", "parallel.tensor=2", "data.micro_batch_size=2")


@pytest.fixture(scope="module")
def app():
    """The `nemo` command, with every factory registered."""
    from nemotron_h.launch import factories  # noqa: F401 - what the entry point loads

    before, sys.argv = sys.argv, ["nemo", "llm", "pretrain"]
    try:
        from nemo_run.cli.api import create_cli

        yield create_cli()
    finally:
        sys.argv = before


@pytest.fixture
def nemo(app, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    """Run `nemo llm pretrain` in an empty folder, on a Slurm of its own; its exit code and all that it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jobs, "ASK_S", 0)
    (tmp_path / "slurm").mkdir()
    monkeypatch.setenv("PATH", slurm_here.path(tmp_path / "slurm"))
    monkeypatch.setattr("nemo_run.config._NEMORUN_HOME", str(tmp_path / ".nemo_run"))  # read when it was imported

    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["llm", "pretrain", "--factory", "nemotron_h_tiny", "--yes", *arguments])
        captured = capfd.readouterr()
        return result.exit_code, result.output + captured.out + captured.err

    return run


@pytest.fixture
def dry_run(app, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    """Run `nemo llm pretrain --factory NAME --dryrun` in an empty folder; its exit code and all that it printed."""
    monkeypatch.chdir(tmp_path)

    def run(factory: str, *arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["llm", "pretrain", "--factory", factory, "--dryrun", *arguments])
        captured = capfd.readouterr()
        return result.exit_code, result.output + captured.out + captured.err

    return run


def options(script: str) -> dict[str, str]:
    """`#SBATCH` options by name; bare ones are empty."""
    return {name: value or "" for name, value in re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script, re.MULTILINE)}


def test_sbatch_script(dry_run) -> None:
    code, script = dry_run("nemotron_h_tiny", *SLURM, *EIGHT, "executor.chain=3", "executor.sbatch.qos=high")
    assert code == 0, script
    found = options(script)
    expected = {
        "account": "ABC",
        "partition": "batch",
        "nodes": "2",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "time": "04:00:00",
    }
    assert expected.items() <= found.items()
    assert (found["signal"], found["open-mode"], found["array"]) == ("USR1@600", "append", "1-3%1")
    assert (found["requeue"], found["exclusive"], found["qos"]) == ("", "", "high")
    assert found["dependency"] == "singleton"
    assert found["job-name"] == "nemotron_h_tiny-pretrain"
    assert re.search(r"^srun .* python -m nemo_run.core.runners.fdl_runner -n pretrain \S+_fn_or_script$", script, re.M)
    assert "scancel --state=PENDING" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_one_job_is_no_chain_and_gpus_are_asked_for_as_told(dry_run) -> None:
    code, script = dry_run("nemotron_h_tiny", *SLURM, "executor.gpus=none", "executor.exclusive=false")
    assert code == 0, script
    assert options(script).keys().isdisjoint({"array", "gpus-per-node", "gres", "exclusive"})
    assert "scancel" not in script
    assert options(dry_run("nemotron_h_tiny", *SLURM, *EIGHT, "executor.gpus=gres")[1])["gres"] == "gpu:8"


def test_a_container_has_the_work_folder(dry_run) -> None:
    code, script = dry_run("nemotron_h_tiny", *SLURM, "executor.container=registry/i:1", "executor.env.TEXT=two words")
    assert code == 0, script
    assert "--container-image registry/i:1" in script
    assert "--container-mounts /shared/me:/shared/me," in script
    assert "export TEXT='two words'" in script


def test_the_56b_as_trained_resolves_to_6144_gpus(dry_run) -> None:
    code, script = dry_run("nemotron_h_56b", *SLURM)
    assert code == 0, script
    found = options(script)
    assert int(found["nodes"]) * int(found["ntasks-per-node"]) == 6144
    assert found["gpus-per-node"] == "8"


def test_a_users_file_and_every_spelling_of_the_option(dry_run, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("kind: slurm\naccount: ABC\npartition: batch\nwork_dir: /shared/me\nchain: 2\n")
    for spelling in (("executor=mine.yaml",), ("--executor", "mine.yaml"), (f"run.executor={mine}",)):
        code, script = dry_run("nemotron_h_tiny", *spelling, "executor.chain=4")
        assert code == 0, script
        assert options(script)["array"] == "1-4%1"


def test_kubernetes_manifest(dry_run) -> None:
    code, printed = dry_run("nemotron_h_tiny", *KUBERNETES, *EIGHT, "executor.memory=256Gi")
    assert code == 0, printed
    manifest = yaml.safe_load(printed[printed.index("apiVersion:") : printed.index("Dry run for")])
    trainer = manifest["spec"]["trainer"]
    assert (manifest["kind"], manifest["metadata"]["namespace"]) == ("TrainJob", "team")
    assert (trainer["numNodes"], trainer["numProcPerNode"], trainer["image"]) == (2, 8, "registry/i:1")
    assert trainer["resourcesPerNode"]["requests"] == {"memory": "256Gi", "nvidia.com/gpu": "8"}
    (override,) = manifest["spec"]["podTemplateOverrides"]
    assert override["spec"]["volumes"] == [{"name": "work", "persistentVolumeClaim": {"claimName": "work"}}]
    assert override["spec"]["containers"][0]["volumeMounts"] == [{"name": "work", "mountPath": "/workspace"}]
    launch = re.search(r"exec torchrun .*--nnodes 2 --nproc-per-node 8 .*", printed).group()
    assert launch.endswith("/code/configs/pretrain_fn_or_script")
    assert launch.split()[-1].startswith(trainer["command"][1].removesuffix("launch.sh")), "where the volume has it"


def test_local_command(dry_run) -> None:
    code, printed = dry_run("nemotron_h_tiny", "executor=local", "trainer.devices=2", "data.micro_batch_size=8")
    assert code == 0, printed
    assert re.search(r"^torchrun .*--nproc-per-node 2 ", printed, re.M)


def test_restarts_put_their_launcher_before_a_ranks_command(dry_run) -> None:
    restarts = ("executor.restarts=3", "executor.hang_after=90")
    code, printed = dry_run("nemotron_h_tiny", "executor=local", *restarts)
    assert code == 0, printed
    values = r"--run \S+/runs/nemotron_h_tiny --restarts 3 --hang-after 90 --nodes {} --devices {} "
    command = "python -m nemotron_h.launch.restarts " + values + "-m nemo_run.core.runners.fdl_runner -n pretrain "
    assert re.search("^" + command.format(1, 1), printed, re.M)
    code, script = dry_run("nemotron_h_tiny", *SLURM, *EIGHT, *restarts)
    assert code == 0, script
    assert {"nodes": "2", "ntasks-per-node": "1", "gpus-per-node": "8"}.items() <= options(script).items()
    assert re.search("^srun .* " + command.format(2, 8), script, re.M)
    assert "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    code, printed = dry_run("nemotron_h_tiny", *KUBERNETES, "executor.restarts=3")
    assert code == 2, "the cluster's runtime says how often"
    assert "restarts" in printed


def test_data_that_the_environment_names_are_those_of_a_local_job(monkeypatch: pytest.MonkeyPatch) -> None:
    from nemotron_h.launch import executors
    from nemotron_h.schema.cluster import LocalCluster

    def root() -> str:
        task = SimpleNamespace(
            log=SimpleNamespace(explicit_log_dir="runs/x"),
            data=SimpleNamespace(root=None, blend="sample_small"),
            resume=SimpleNamespace(init_checkpoint="hub:org/model@v1"),
            model=SimpleNamespace(config=SimpleNamespace(teacher="runs/teacher")),
        )
        executors._move(task, LocalCluster(kind="local", work_dir=".", env={}))
        assert task.model.config.teacher == str(Path.cwd() / "runs/teacher")
        assert task.resume.init_checkpoint == "hub:org/model@v1", "a name on the Hub is no path"
        return task.data.root

    monkeypatch.delenv("NEMOTRON_H_DATA", raising=False)
    assert root() == str(Path.cwd() / "data")
    monkeypatch.setenv("NEMOTRON_H_DATA", "/elsewhere")
    assert root() == "/elsewhere"


def test_python_and_torchrun_are_this_ones_also_in_an_environment_that_is_not_activated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemotron_h.launch import executors

    other = tmp_path / "torchrun"
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    beside = Path(sys.executable).parent
    for path in ("/nowhere", str(tmp_path)):
        monkeypatch.setenv("PATH", path)
        found = executors._path()["PATH"]
        assert found == f"{beside}{os.pathsep}{path}"
        for name in ("python", "torchrun"):
            assert shutil.which(name, path=found) == str(beside / name)
    monkeypatch.setenv("PATH", str(beside))
    assert executors._path() == {}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("executor=slurm",), ("slurm.yaml: account, partition, work_dir are placeholders", "executor.account=")),
        ((*SLURM, "executor.nodes=4"), ("executor.nodes = 4, parallel.nodes = 1", "set parallel.nodes=4")),
        ((*SLURM, "executor.devices=8"), ("executor.devices = 8, parallel.devices = 1",)),
        ((*SLURM, "executor.acount=x"), ("unknown key acount", "Did you mean account?")),
        (("executor.account=x",), ("executor.account=x without an executor", "executor=slurm")),
        (
            ("executor=local", "parallel.nodes=2", "data.micro_batch_size=8"),
            ("parallel.nodes = 2: 2 ranks", "set parallel.nodes=1"),
        ),
        ((*SLURM, "executor.setup=[source /me/nemo_run/bin/activate]"), ("executor.setup: ", "replaces /nemo_run")),
        ((*SLURM, "trainer.devices=3", EIGHT[2]), ("parallel.nodes * parallel.devices = 3 is not a multiple",)),
    ],
)
def test_mistakes_are_named_before_anything_is_submitted(dry_run, arguments, expected) -> None:
    code, output = dry_run("nemotron_h_tiny", *arguments)
    assert code == 2, output
    for text in expected:
        assert text in output.replace("\n", " "), output
    assert "Traceback" not in output


def test_jobs_meet_in_the_work_folder(app) -> None:
    """Jobs of a chain start in folders of their own; what the recipe writes and reads is the same for all."""
    from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

    from nemotron_h.launch.executors import executor
    from nemotron_h.launch.load import load
    from nemotron_h.recipe.compose import compose
    from nemotron_h.training.stages.pretrain import build

    task = build(compose("nemotron_h_tiny/pretrain"))
    executor(load("slurm", [given.removeprefix("executor.") for given in SLURM[1:]]), task, "tiny")
    sent = ZlibJSONSerializer().deserialize(ZlibJSONSerializer().serialize(task))
    assert sent.log.explicit_log_dir == "/shared/me/runs/nemotron_h_tiny"
    assert sent.data.root == "/shared/me/data"


@pytest.mark.parametrize(("code", "cancelled"), [(0, True), (2, True), (75, False), (1, False), (137, False)])
def test_a_chain_ends_when_the_run_is_complete_or_mistaken(tmp_path: Path, code: int, cancelled: bool) -> None:
    from nemotron_h.launch.executors import END_CHAIN

    fake = tmp_path / "scancel"
    fake.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/cancelled\n')
    fake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_JOB_ID": "7"}
    done = subprocess.run(["bash", "-c", f"{END_CHAIN}\n(exit {code})\nexit $?"], env=environment)
    assert done.returncode == code
    assert (tmp_path / "cancelled").exists() == cancelled
    if cancelled:
        assert (tmp_path / "cancelled").read_text().split() == ["--state=PENDING", "7"]


@pytest.mark.parametrize(
    ("code", "chain", "times", "last"),
    [
        (0, 1, 1, ""),
        (2, 3, 1, "ended with exit code 2"),
        (75, 2, 2, "ended with exit code 75"),
        (1, 1, 1, "exit code 1; its"),
    ],
)
def test_a_submitted_run_is_waited_for_and_its_exit_code_is_the_commands(
    nemo, tmp_path: Path, code: int, chain: int, times: int, last: str
) -> None:
    """nemo-run alone waits for an array for ever, and exits with 0 after a failure. The run itself is played."""
    played = tmp_path / "slurm" / "python"
    played.write_text(f"#!/bin/sh\nsleep 0.5; echo trained >> {tmp_path}/times; exit {code}\n")
    played.chmod(0o755)
    exit_code, said = nemo(*SLURM, f"executor.chain={chain}")
    assert exit_code == code, said
    assert (tmp_path / "times").read_text().split() == ["trained"] * times
    (logs,) = re.findall(r"^submitted: job 101, output in (\S+)$", said, re.MULTILINE)
    assert "job 101: RUNNING" in said
    if last:
        assert last in said
        assert f"its output is in {logs}/log-nemotron_h_tiny-pretrain_" in said


def test_a_detached_run_is_left_in_the_queue(nemo, tmp_path: Path) -> None:
    (tmp_path / "slurm" / "python").write_text("#!/bin/sh\nsleep 1\nexit 1\n")
    (tmp_path / "slurm" / "python").chmod(0o755)
    code, said = nemo(*SLURM, "--detach")
    assert code == 0, said
    job = jobs.Job.of_line(said)
    assert job.state() == "RUNNING"
    while job.state():
        time.sleep(0.1)
    assert job.exit_code() == 1


def test_a_local_run_takes_the_place_of_the_command(nemo, monkeypatch: pytest.MonkeyPatch) -> None:
    """So signals and exit codes are its own; nemo-run's wrapper returned 0 for a run that failed."""

    def become(file: str, arguments: list[str], environment: dict[str, str]) -> None:
        found = shutil.which(file, path=environment["PATH"])
        assert found == str(Path(sys.executable).parent / "python")
        assert arguments[:3] == ["python", "-m", "nemo_run.core.runners.fdl_runner"]
        assert Path(arguments[-1]).is_file()
        raise SystemExit(75)

    monkeypatch.setattr(os, "execvpe", become)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert nemo("executor=local")[0] == 75
    code, said = nemo("executor=local", "--detach")
    assert (code, "error: --detach with executor=local" in said) == (2, True)


def test_more_nodes_than_this_machine_are_refused_before_work(nemo, tmp_path: Path) -> None:
    code, said = nemo("parallel.nodes=768", "parallel.devices=8", "data.global_batch_size=98304", "tokens=1B")
    assert code == 2, said
    assert "error: parallel.nodes = 768: 6,144 ranks" in said
    assert not (tmp_path / "runs").exists()


def test_a_kubernetes_job_is_submitted(nemo, monkeypatch: pytest.MonkeyPatch) -> None:
    """nemo-run refuses classes that it does not know; the cluster itself is played."""
    from nemo_run.core.execution.kubeflow import KubeflowJobState

    from nemotron_h.launch.kubernetes import KubernetesExecutor

    ends = KubeflowJobState.SUCCEEDED
    monkeypatch.setattr(KubernetesExecutor, "package", lambda *_, **__: None)
    monkeypatch.setattr(KubernetesExecutor, "launch", lambda *_, **__: ("tiny-1", KubeflowJobState.CREATED))
    monkeypatch.setattr(KubernetesExecutor, "status", lambda *_: ends)
    monkeypatch.setattr(KubernetesExecutor, "fetch_logs", lambda *_, **__: "")
    monkeypatch.setattr(KubernetesExecutor, "cleanup", lambda *_: None)
    for arguments in ((), ("--detach",)):
        code, said = nemo(*KUBERNETES, *arguments)
        assert code == 0, said
        assert re.search(r"^submitted: kubeflow://\S+tiny-1$", said, re.MULTILINE), said
    ends = KubeflowJobState.FAILED
    code, said = nemo(*KUBERNETES)
    assert (code, "the run ended as FAILED; its output is in" in said) == (1, True)
