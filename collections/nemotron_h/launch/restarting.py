"""nemo-run's launcher for runs that start themselves again: `launch.restarts` in front of a rank's command.

nemo-run's own (`FaultTolerance`) knows no sections, and its script for Slurm ends with 0 when the run failed.
"""

from __future__ import annotations

from dataclasses import dataclass

import nemo_run as run


@dataclass(kw_only=True)
class Restarting(run.SlurmTemplate):
    """Launcher of one process per node; a `SlurmTemplate` because nemo-run asks no other to change a command.

    Args:
        folder: of the run.
        restarts, hang_after: of the cluster file.
        nodes, devices: of the recipe.
    """

    folder: str
    restarts: int
    hang_after: int
    nodes: int
    devices: int

    def __post_init__(self) -> None:
        """Take no template."""

    def arguments(self, command: list[str]) -> list[str]:
        """Return the arguments of `python` for the command of a rank, which starts with `python`."""
        values = {"run": self.folder, "restarts": self.restarts, "hang-after": self.hang_after}
        values |= {"nodes": self.nodes, "devices": self.devices}
        options = [text for name, value in values.items() for text in (f"--{name}", str(value))]
        return ["-m", "nemotron_h.launch.restarts", *options, *command[1:]]

    def transform(self, cmd: list[str]) -> run.Script:
        """Return the command of a job."""
        _, module, *arguments = self.arguments(cmd)
        return run.Script(path=module, m=True, entrypoint="python", args=arguments)
