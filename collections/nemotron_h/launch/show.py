"""Submission as text, without submitting it: the sbatch script, the manifest, or the command."""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path
from typing import Any

import nemo_run as run
import yaml

from nemotron_h.launch.submit import command_of


def dry_run(task: run.Partial, executor: run.Executor, name: str) -> str:
    """Prepare a submission as nemo-run does, in a folder that is removed again, and return what it would send.

    `nemo ... --dryrun` of nemo-run 0.11.1 shows values and no script.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        # messages and progress are for experiments that run
        run.Experiment(
            name, executor=executor, base_dir=folder, clean_mode=True, enable_goodbye_message=False, log_level="WARNING"
        ) as experiment,
    ):
        experiment.add(task, name=name)
        experiment.dryrun(log=False, delete_exp_dir=False)
        (job,) = experiment.jobs
        return _text(job)


def _text(job: Any) -> str:
    executor = job.executor
    if isinstance(executor, run.SlurmExecutor):
        request = job._dryrun_info.request
        return f"# {' '.join(request.launch_cmd)} SCRIPT\n{request.materialize()}"
    if isinstance(executor, run.KubeflowExecutor):
        body = executor.get_job_body(job.id, job._dryrun_info.request.cmd)
        script = (Path(executor.job_dir) / "launch.sh").read_text()
        commented = "".join(f"# {line}\n" for line in script.splitlines())
        return f"{yaml.safe_dump(body, sort_keys=False)}\n# launch.sh:\n{commented}"
    return shlex.join(command_of(job))
