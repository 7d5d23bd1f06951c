"""`executor=NAME executor.key=value` on the command line of `nemo`, for recipes of this project.

nemo-run takes executors as Python factories (`run.executor=`), which know nothing of the task's nodes and cannot be
given a file, its `--dryrun` shows no script, and its submission loses how a run ended (`launch.submit`).
`RunContext.cli_execute` and `RunContext.parse_fn` are wrapped (patched): names of cluster files are read here, any
other executor is nemo-run's own affair.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run
from nemo_run.cli.api import RunContext

from nemotron_h.core.errors import UserError
from nemotron_h.launch.executors import executor
from nemotron_h.launch.load import load
from nemotron_h.launch.nemo_cli import fail
from nemotron_h.launch.place import take
from nemotron_h.launch.show import dry_run
from nemotron_h.launch.submit import submit
from nemotron_h.training.preflight import check_split
from nemotron_h.training.strategy import NemotronHTrainer


def install() -> None:
    """Wrap the two methods of `RunContext`, once."""
    if getattr(RunContext.cli_execute, "cluster", False):
        return
    execute, parse = RunContext.cli_execute, RunContext.parse_fn

    @functools.wraps(execute)
    def cli_execute(self: RunContext, fn: Any, args: list[str], entrypoint_type: str = "task") -> None:
        shown, started = nemo_run.dryrun_fn, nemo_run.run
        try:
            name, overrides, args = take(args)
            if name is not None:
                self.cluster = load(name, overrides)
                if self.dryrun:
                    nemo_run.dryrun_fn = lambda task, executor: print(dry_run(task, executor, self.name))
                nemo_run.run = lambda fn_or_script, executor, name, detach, **_: submit(
                    fn_or_script, executor, name, detach
                )
            execute(self, fn, args, entrypoint_type)
        except UserError as error:
            fail(error)
        finally:
            nemo_run.dryrun_fn, nemo_run.run = shown, started

    @functools.wraps(parse)
    def parse_fn(self: RunContext, fn: Any, args: list[str], **defaults: Any) -> nemo_run.Partial:
        task = parse(self, fn, args, **defaults)
        cluster = getattr(self, "cluster", None)
        if cluster is not None:
            if fdl.get_callable(task.trainer) is not NemotronHTrainer:
                raise UserError(
                    f"executor={cluster.kind} takes this project's recipes; for others use run.executor=NAME"
                )
            trainer = task.trainer
            definition = fdl.build(task.model.config).definition()
            check_split(definition, trainer.strategy, trainer.devices * trainer.num_nodes)
            self.executor = fdl.build(executor(cluster, task, Path(task.log.explicit_log_dir).name))
        return task

    cli_execute.cluster = True  # type: ignore[attr-defined]
    RunContext.cli_execute, RunContext.parse_fn = cli_execute, parse_fn
