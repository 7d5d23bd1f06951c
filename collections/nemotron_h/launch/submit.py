"""A built recipe on its way: as a process in place of this one, as a job of Slurm, or as a TrainJob.

nemo-run 0.11.1 exits with 0 when the run that it waited for failed, waits for a job array for ever, and starts the
`python` that is first on PATH.
"""

from __future__ import annotations

import functools
import os
import time

import nemo_run
from torchx.specs import AppState

from nemotron_h.core.errors import UserError
from nemotron_h.launch.jobs import Job, Watch
from nemotron_h.launch.restarting import Restarting


def submit(task: nemo_run.Partial, executor: nemo_run.Executor, name: str, detach: bool) -> None:
    """Start a run, and unless `detach` wait for its end.

    Errors:
        UserError: `detach` on this machine; Slurm cannot be asked.
        SystemExit: the run failed: with its exit code, or 1 where that is not known.
    """
    local, slurm = (isinstance(executor, kind) for kind in (nemo_run.LocalExecutor, nemo_run.SlurmExecutor))
    if local and detach:
        raise UserError("--detach with executor=local", hint="leave it out; to leave the terminal: nohup nemo ... &")
    with nemo_run.Experiment(
        name,
        executor=executor,
        clean_mode=True,
        enable_goodbye_message=False,
        skip_status_at_exit=True,
        log_level="WARNING",
    ) as experiment:
        experiment.add(task, name=name, tail_logs=True)
        (job,) = experiment.jobs
        if local:
            experiment.dryrun(log=False, delete_exp_dir=False)
            become(job)
        experiment.run(detach=detach or slurm)
    if slurm:
        submitted = Job(job.handle.rpartition("/")[2].partition(";")[0], job.executor.job_details.folder)
        print(submitted.line(), flush=True)
        if not detach:
            wait(submitted)
        return
    print(f"submitted: {job.handle}", flush=True)
    if not detach and job.state is not AppState.SUCCEEDED:
        print(f"the run ended as {job.state.name}; its output is in {job.executor.job_dir}")
        raise SystemExit(1)


def become(job: nemo_run.run.job.Job) -> None:
    """Turn this process into the prepared run: signals reach it, and its exit code is this command's."""
    command = command_of(job)
    os.execvpe(command[0], command, {**os.environ, **job.executor.env_vars})


def command_of(job: nemo_run.run.job.Job) -> list[str]:
    """Return the command line of a prepared run on this machine; nemo-run has launchers change those of jobs alone."""
    (role,) = job._executable.roles
    command, launcher = [role.entrypoint, *role.args], job.executor.get_launcher()
    return [command[0], *launcher.arguments(command)] if isinstance(launcher, Restarting) else command


def wait(job: Job) -> None:
    """Wait for a job, saying where it stands when that changes.

    Errors:
        UserError: Slurm cannot be asked.
        SystemExit: it failed.
    """
    watch = Watch(job, functools.partial(print, flush=True))
    while not watch.over():
        time.sleep(1)
    code = job.exit_code()
    if code != 0:
        ended = "without an exit code: killed, or out of time" if code is None else f"with exit code {code}"
        print(f"job {job.id} ended {ended}; its output is in {job.log() or job.logs}")
        raise SystemExit(1 if code is None else code)
