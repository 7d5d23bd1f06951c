"""A cluster configuration as the nemo-run executor that takes a run there."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

import nemo_run as run
from nemo_run.core.packaging.base import Packager

from nemotron_h.cluster.kubernetes import KubernetesExecutor
from nemotron_h.cluster.schema import Cluster, KubernetesCluster, LocalCluster, SlurmCluster
from nemotron_h.data.manifest import ROOT_VARIABLE, data_root
from nemotron_h.errors import UserError

# Ends a chain early. A run that is complete exits with 0, a mistake of the user with 2: the next job would do the same.
# Every other code (75: a checkpoint is written and steps remain; a crash; a kill) leaves the chain as it is.
END_CHAIN = """trap 'case $? in 0|2) scancel --state=PENDING "$SLURM_ARRAY_JOB_ID" ;; esac' EXIT"""


def executor(cluster: Cluster, task: run.Partial, recipe: str) -> run.Config:
    """The executor of a built recipe, and the recipe's paths moved to the cluster's `work_dir`.

    Args:
        cluster: from `load`.
        task: `llm.pretrain` with every override applied; its relative paths are made absolute in place.
        recipe: name for the job.
    Errors:
        UserError: nodes or devices of the cluster file are not those of the recipe; more than one node on this machine.
    """
    nodes, devices = task.trainer.num_nodes, task.trainer.devices
    for key, given, wanted, setting in (
        ("nodes", cluster.nodes, nodes, "trainer.num_nodes"),
        ("devices", cluster.devices, devices, "trainer.devices"),
    ):
        if given is not None and given != wanted:
            raise UserError(
                f"executor.{key} = {given}, {setting} = {wanted}",
                hint=f"set {setting}={given}, or leave executor.{key} out: it is the recipe's",
            )
    _move(task, cluster)
    if isinstance(cluster, SlurmCluster):
        return _slurm(cluster, nodes, devices, recipe)
    if isinstance(cluster, KubernetesCluster):
        return _kubernetes(cluster, nodes, devices, recipe)
    assert isinstance(cluster, LocalCluster)
    if nodes != 1:
        raise UserError(f"executor=local has one node, trainer.num_nodes = {nodes}", hint="set trainer.num_nodes=1")
    launcher = "torchrun" if devices > 1 else None
    env = {**_path_of_torchrun(), **cluster.env} if launcher else dict(cluster.env)
    return run.Config(run.LocalExecutor, ntasks_per_node=devices, launcher=launcher, env_vars=env)


def _path_of_torchrun() -> dict[str, str]:
    """PATH with this Python's own torchrun first; nothing where it is, as in an activated environment."""
    beside, path = Path(sys.executable).parent, os.environ.get("PATH", os.defpath)
    if not (beside / "torchrun").is_file() or shutil.which("torchrun") == str(beside / "torchrun"):
        return {}
    return {"PATH": f"{beside}{os.pathsep}{path}"}


def _move(task: run.Partial, cluster: Cluster) -> None:
    """Jobs start elsewhere than this command, each in a folder of its own, and have to meet in one place."""
    here = Path(cluster.work_dir).expanduser().resolve() if cluster.kind == "local" else Path(cluster.work_dir)
    task.log.explicit_log_dir = str(here / task.log.explicit_log_dir)
    if task.data.root is not None:
        task.data.root = str(here / task.data.root)
    elif ROOT_VARIABLE not in cluster.env:
        task.data.root = str(here / (data_root() if cluster.kind == "local" else "data"))
    if task.resume.init_checkpoint is not None:
        task.resume.init_checkpoint = str(here / task.resume.init_checkpoint)
    if getattr(task.model.config, "teacher", None):
        task.model.config.teacher = str(here / task.model.config.teacher)
    if task.data.blend.endswith((".yaml", ".yml")):
        task.data.blend = str(Path(task.data.blend).expanduser().resolve())


def _slurm(cluster: SlurmCluster, nodes: int, devices: int, recipe: str) -> run.Config[run.SlurmExecutor]:
    """One task per device, started by srun: Lightning and NeMo read the ranks from Slurm, and signals reach Python.

    torchrun in between would end at SIGUSR1 itself. A chain is an array with one job at a time: one submission, no
    rights needed beyond `sbatch`'s, and each job follows the one before whatever that one's exit code.
    """
    return run.Config(
        run.SlurmExecutor,
        account=cluster.account,
        partition=cluster.partition,
        job_name_prefix=f"{recipe}-",
        nodes=nodes,
        ntasks_per_node=devices,
        gpus_per_node=devices if cluster.gpus == "gpus_per_node" else None,
        gres=f"gpu:{devices}" if cluster.gpus == "gres" else None,
        time=cluster.time,
        signal=f"USR1@{cluster.leave_before_end}",
        array=f"1-{cluster.chain}%1" if cluster.chain > 1 else None,
        exclusive=True if cluster.exclusive else None,
        container_image=cluster.container,
        container_mounts=_mounts(cluster),
        env_vars={key: shlex.quote(value) for key, value in cluster.env.items()},
        setup_lines="\n" + "\n".join([*cluster.setup, *([END_CHAIN] if cluster.chain > 1 else [])]),
        # requeue: after a node failed or a job of higher rank came; singleton: two submissions never write one run
        additional_parameters={"requeue": True, "dependency": "singleton", **cluster.sbatch},
        srun_args=list(cluster.srun) or None,
        tunnel=run.Config(run.LocalTunnel, job_dir=""),
        packager=run.Config(Packager),
    )


def _mounts(cluster: SlurmCluster) -> list[str]:
    """The work folder is in the container, under the same path."""
    if not cluster.container or any(mount.split(":")[-1] == cluster.work_dir for mount in cluster.mounts):
        return list(cluster.mounts)
    return [*cluster.mounts, f"{cluster.work_dir}:{cluster.work_dir}"]


def _kubernetes(cluster: KubernetesCluster, nodes: int, devices: int, recipe: str) -> run.Config[KubernetesExecutor]:
    volume = "work"
    return run.Config(
        KubernetesExecutor,
        namespace=cluster.namespace,
        image=cluster.image,
        runtime_ref=cluster.runtime,
        train_job_basename=recipe,
        num_nodes=nodes,
        nprocs_per_node=devices,
        gpus_per_node=devices if cluster.gpus else None,
        cpu_requests=cluster.cpu,
        memory_requests=cluster.memory,
        workdir_pvc=cluster.claim,
        workdir_pvc_path=cluster.work_dir,
        volumes=[{"name": volume, "persistentVolumeClaim": {"claimName": cluster.claim}}],
        volume_mounts=[{"name": volume, "mountPath": cluster.work_dir}],
        image_pull_secrets=list(cluster.pull_secrets),
        tolerations=list(cluster.tolerations),
        labels=dict(cluster.labels),
        env_vars={**cluster.env, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(cluster.leave_before_end)},
        launcher="torchrun",
        packager=run.Config(Packager),
    )
