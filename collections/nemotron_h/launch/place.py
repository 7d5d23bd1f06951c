"""The place of a command's runs: this machine, or that of a cluster file; and the check that a recipe fits there.

Imports no NeMo and no torch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemotron_h.core.errors import UserError
from nemotron_h.core.hub import is_hub
from nemotron_h.data.manifest import ROOT_VARIABLE, data_root
from nemotron_h.launch.load import is_cluster, load
from nemotron_h.platform.ranks import check_here
from nemotron_h.platform.trackers import check_trackers
from nemotron_h.schema.cluster import Cluster, KubernetesCluster, SlurmCluster
from nemotron_h.schema.recipe import STARTS, RecipeConfig

#: of a recipe, beside `data.root`: relative paths that start in the cluster's `work_dir`
PATHS = (
    *("log.dir", "init.checkpoint", "distill.teacher", "distill.teacher_logits"),
    *(f"{stage}.{key}" for stage, key in STARTS.items()),
    *("preference.reference", "reason.problems"),
)


def take(args: Sequence[str]) -> tuple[str | None, list[str], list[str]]:
    """Split a command line.

    Args:
        args: `executor=NAME`, `--executor NAME`, `run.executor=NAME`, their `executor.key=value`, and all the rest.
    Returns:
        the name of a cluster file or None, the overrides of its keys, and what is nemo-run's.
    Errors:
        UserError: a key of the executor without an executor, or an option without a name.
    """
    name, keys, rest = None, [], []
    waiting = False
    for argument in args:
        bare = argument.removeprefix("run.") if argument.startswith("run.executor") else argument.removeprefix("--")
        if waiting:
            name, waiting = argument, False
        elif argument == "--executor":
            waiting = True
        elif bare.startswith("executor="):
            name = bare.removeprefix("executor=")
        elif bare.startswith("executor."):
            keys.append(bare.removeprefix("executor."))
        else:
            rest.append(argument)
    if waiting or (keys and name is None):
        raise UserError(
            f"{'executor.' + keys[0] if keys else '--executor'} without an executor",
            hint="add executor=slurm, executor=kubernetes, executor=local or executor=FILE.yaml",
        )
    if name is not None and not is_cluster(name):
        return None, [], [f"run.executor={name}", *(f"run.executor.{key}" for key in keys), *rest]
    return name, keys, rest


def check_agrees(cluster: Cluster, nodes: int, devices: int, keys: tuple[str, str]) -> None:
    """Refuse a cluster file that repeats other numbers than the run's; `keys` are the run's names of the two.

    Errors:
        UserError: names both keys and both numbers.
    """
    for key, stated, wanted, setting in zip(
        ("nodes", "devices"), (cluster.nodes, cluster.devices), (nodes, devices), keys, strict=True
    ):
        if stated is not None and stated != wanted:
            raise UserError(
                f"executor.{key} = {stated}, {setting} = {wanted}",
                hint=f"set {setting}={stated}, or leave executor.{key} out: it is the recipe's",
            )


def root_at(cluster: Cluster, folder: Path) -> str | None:
    """Return the folder of prepared data of a recipe that names none; None where the run's environment names it."""
    if ROOT_VARIABLE in cluster.env:
        return None
    return str(folder / (data_root() if cluster.kind == "local" else "data"))


def folder_of(cluster: Cluster) -> Path:
    """Return the folder that relative paths of a recipe start in."""
    return Path(cluster.work_dir).expanduser().resolve() if cluster.kind == "local" else Path(cluster.work_dir)


@dataclass(frozen=True)
class Place:
    """The place where a command that starts several runs starts them.

    Attributes:
        cluster: None is this machine.
        arguments: the same for a command line of `nemo`.
    """

    cluster: Cluster | None = None
    arguments: tuple[str, ...] = ()

    @property
    def submits(self) -> bool:
        """Tell whether runs are jobs, which are waited for; else they are processes here."""
        return isinstance(self.cluster, SlurmCluster)

    @property
    def env(self) -> dict[str, str]:
        """Return the environment variables that a process here gets beside those of this process."""
        return {} if self.cluster is None else dict(self.cluster.env)

    @property
    def launcher(self) -> tuple[str, ...]:
        """Return what a process here is started with beside its recipe: the executor that starts it again, if any."""
        return self.arguments if not self.submits and getattr(self.cluster, "restarts", 0) else ()

    def check(self, recipe: RecipeConfig, origin: str) -> None:
        """Refuse a recipe that cannot start there.

        Errors:
            UserError: more nodes or GPUs than this machine has, without a cluster that has them; a cluster file that
                states other numbers; a tracker that this machine lacks.
        """
        parallel = recipe.parallel
        if self.cluster is not None:
            check_agrees(self.cluster, parallel.nodes, parallel.devices, ("parallel.nodes", "parallel.devices"))
        if not self.submits:
            check_here(parallel.nodes, parallel.devices, f"{origin}: ")
            check_trackers(recipe.log.trackers, f"{origin}: ")

    def moved(self, recipe: RecipeConfig) -> RecipeConfig:
        """Return the recipe with paths that mean the same here and in the jobs: they start in `work_dir`."""
        if self.cluster is None:
            return recipe
        recipe, folder = copy.deepcopy(recipe), folder_of(self.cluster)
        for key in PATHS:
            part, name = key.split(".")
            value = getattr(getattr(recipe, part), name, None)
            if value is not None and not is_hub(value):
                setattr(getattr(recipe, part), name, str(folder / Path(value).expanduser()))
        root = recipe.data.root or self.cluster.env.get(ROOT_VARIABLE) or root_at(self.cluster, folder)
        recipe.data.root = str(folder / Path(root).expanduser())
        if recipe.data.blend.endswith((".yaml", ".yml")):
            recipe.data.blend = str(Path(recipe.data.blend).expanduser().resolve())
        return recipe


#: this machine
HERE = Place()


def place_of(arguments: Sequence[str]) -> tuple[Place, list[str]]:
    """Read where runs go off a command line, and return the rest of it.

    Errors:
        UserError: as `take` and `load`; an executor whose runs cannot be waited for; `work_dir` is not on this machine.
    """
    name, keys, rest = take(arguments)
    if name is None:
        others = [argument for argument in rest if argument.startswith("run.executor")]
        if others:
            raise UserError(
                f"{others[0].removeprefix('run.')}: this command takes local, slurm, or the path of a cluster file"
            )
        return HERE, rest
    cluster = load(name, keys)
    if isinstance(cluster, KubernetesCluster):
        raise UserError(
            f"executor={name}: runs of this command are waited for, which it can on Slurm and on this machine alone",
            hint="start each run by itself: nemo llm ... executor=kubernetes",
        )
    return Place(cluster, (f"executor={name}", *(f"executor.{key}" for key in keys))), rest


def check_shared(place: Place) -> None:
    """Refuse a cluster whose `work_dir` is not here: what runs write is read by the command that waits for them.

    Errors:
        UserError: there is no such folder.
    """
    if place.submits and not Path(place.cluster.work_dir).is_dir():
        raise UserError(
            f"executor.work_dir = {place.cluster.work_dir} is no folder of this machine, and this command reads there "
            "what its runs write",
            hint="start it on a machine that shares the folder with the cluster's nodes, such as a login node",
        )
