"""The keys of a cluster file, one dataclass per kind. The values that a key has by default are in `configs/cluster`.

A recipe says what is trained, a cluster file where: accounts, partitions, images and folders are here alone. Nodes and
devices per node are the recipe's; a cluster file may repeat them as a check.
"""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from nemotron_h.core.strict import number
from nemotron_h.schema.ranges import COUNT


@dataclass
class Cluster:
    """Keys that every kind of cluster has.

    Attributes:
        kind: `local`, `slurm` or `kubernetes`.
        work_dir: folder of `runs/` and `data/`, the same on every node; relative paths of a recipe start there.
        nodes, devices: null takes the recipe's; a number has to agree with it.
        env: environment variables of the run.
    """

    kind: str = MISSING
    work_dir: str = MISSING
    nodes: int | None = number(None, least=1, most=2**20)
    devices: int | None = number(None, least=1, most=2**20)
    env: dict[str, str] = MISSING


@dataclass
class LocalCluster(Cluster):
    """Process of its own on this machine (torchrun for more than one device).

    Attributes:
        restarts: how often the run is started again after a crash or a hang of a rank, from its newest checkpoint; 0
            ends it there.
        hang_after: with restarts, the least limit in seconds of a part of a run (docs/clusters.md); a part that takes
            longer than its limit is a hang.
    """

    restarts: int = number(least=0, most=10_000)
    hang_after: int = number(least=1, most=COUNT)


@dataclass
class SlurmCluster(Cluster):
    """A Slurm cluster, submitted to from one of its login nodes.

    Attributes:
        account, partition: as `sbatch` takes them.
        time: limit of one job, `HH:MM:SS` or `D-HH:MM:SS`.
        leave_before_end: seconds before that limit at which the run is told to write a checkpoint and leave.
        chain: how many jobs may follow each other until the run is complete.
        restarts, hang_after: as of `LocalCluster`, in each job.
        gpus: how GPUs are asked for: `gpus_per_node`, `gres`, or `none` (whole nodes, or no GPUs).
        exclusive: whether to ask for whole nodes.
        container: image for Pyxis; null runs on the node itself.
        mounts: `host:container` paths for the container.
        setup: shell lines before the run, such as the activation of a virtual environment.
        sbatch: further `#SBATCH` options by name; true writes the bare option.
        srun: further arguments of `srun`.
    """

    account: str = MISSING
    partition: str = MISSING
    time: str = MISSING
    leave_before_end: int = number(least=1, most=COUNT)
    chain: int = number(least=1, most=10_000)
    restarts: int = number(least=0, most=10_000)
    hang_after: int = number(least=1, most=COUNT)
    gpus: str = MISSING
    exclusive: bool = MISSING
    container: str | None = MISSING
    mounts: list[str] = MISSING
    setup: list[str] = MISSING
    sbatch: dict[str, str | bool] = MISSING  # type: ignore[valid-type]
    srun: list[str] = MISSING


@dataclass
class KubernetesCluster(Cluster):
    """A Kubernetes cluster with Kubeflow's training operator (TrainJob); needs `kubectl` access from here.

    Attributes:
        namespace: where the job is created.
        image: container image that has this package.
        claim: persistent volume claim, readable and writable from all nodes, mounted at `work_dir`.
        runtime: the ClusterTrainingRuntime; its failure policy decides how often a job that left is started again.
        gpus: whether to ask for one `nvidia.com/gpu` per device.
        cpu, memory: requests per node, such as `32` and `256Gi`; null asks for none.
        leave_before_end: seconds that a pod has between SIGTERM and its end; the runtime's
            `terminationGracePeriodSeconds` has to be at least that.
        pull_secrets: names of image pull secrets.
        tolerations: as in a pod's specification.
        labels: of the job.
    """

    namespace: str = MISSING
    image: str = MISSING
    claim: str = MISSING
    runtime: str = MISSING
    gpus: bool = MISSING
    cpu: str | None = MISSING
    memory: str | None = MISSING
    leave_before_end: int = number(least=1, most=COUNT)
    pull_secrets: list[str] = MISSING
    tolerations: list[dict[str, str]] = MISSING
    labels: dict[str, str] = MISSING


KINDS: dict[str, type[Cluster]] = {"local": LocalCluster, "slurm": SlurmCluster, "kubernetes": KubernetesCluster}
