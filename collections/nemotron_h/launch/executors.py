"""A cluster configuration as the nemo-run executor that takes a run there."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

import nemo_run as run
from nemo_run.config import RUNDIR_NAME, get_nemorun_home
from nemo_run.core.packaging.base import Packager

from nemotron_h.core.errors import UserError
from nemotron_h.core.hub import is_hub
from nemotron_h.launch.kubernetes import KubernetesExecutor
from nemotron_h.launch.place import check_agrees, folder_of, root_at
from nemotron_h.launch.restarting import Restarting
from nemotron_h.launch.restarts import LEAVE
from nemotron_h.platform.ranks import check_here
from nemotron_h.schema.cluster import Cluster, KubernetesCluster, LocalCluster, SlurmCluster

# Ends a chain early. A run that is complete exits with 0, a mistake of the user with 2: the next job would do the same.
# Every other code (75: a checkpoint is written and steps remain; a crash; a kill) leaves the chain as it is.
END_CHAIN = """trap 'case $? in 0|2) scancel --state=PENDING "$SLURM_ARRAY_JOB_ID" ;; esac' EXIT"""


def executor(cluster: Cluster, task: run.Partial, recipe: str) -> run.Config:
    """Return the executor of a built recipe, and move the recipe's paths to the cluster's `work_dir`.

    Args:
        cluster: from `load`.
        task: `llm.pretrain` with every override applied; its relative paths are made absolute in place.
        recipe: name for the job.
    Errors:
        UserError: nodes or devices of the cluster file are not those of the recipe; more than one node on this machine.
    """
    nodes, devices = task.trainer.num_nodes, task.trainer.devices
    check_agrees(cluster, nodes, devices, ("parallel.nodes", "parallel.devices"))
    _move(task, cluster)
    if isinstance(cluster, SlurmCluster):
        return _slurm(cluster, task, recipe)
    if isinstance(cluster, KubernetesCluster):
        return _kubernetes(cluster, nodes, devices, recipe)
    assert isinstance(cluster, LocalCluster)
    check_here(nodes, devices)
    launcher = _restarting(cluster, task) or ("torchrun" if devices > 1 else None)
    return run.Config(
        run.LocalExecutor, ntasks_per_node=devices, launcher=launcher, env_vars={**_path(), **cluster.env}
    )


def _restarting(cluster: LocalCluster | SlurmCluster, task: run.Partial) -> run.Config[Restarting] | None:
    """Return the launcher of a run that starts itself again, where the cluster file says so."""
    if not cluster.restarts:
        return None
    return run.Config(
        Restarting,
        folder=task.log.explicit_log_dir,
        restarts=cluster.restarts,
        hang_after=cluster.hang_after,
        nodes=task.trainer.num_nodes,
        devices=task.trainer.devices,
    )


def _path() -> dict[str, str]:
    """Return PATH with this Python and its torchrun first; nothing where they are, as in an activated environment."""
    beside, path = Path(sys.executable).parent, os.environ.get("PATH", os.defpath)
    commands = [name for name in ("python", "torchrun") if (beside / name).is_file()]
    if all(shutil.which(name) == str(beside / name) for name in commands):
        return {}
    return {"PATH": f"{beside}{os.pathsep}{path}"}


def _move(task: run.Partial, cluster: Cluster) -> None:
    """Make the recipe's paths absolute: jobs start in folders of their own and have to meet in one place."""
    here = folder_of(cluster)
    task.data.root = root_at(cluster, here) if task.data.root is None else str(here / task.data.root)
    for part, key in (
        (task.log, "explicit_log_dir"),
        (task.resume, "init_checkpoint"),
        (task.resume, "resume_from_path"),
        (task.model.config, "teacher"),
        (task.model.config, "teacher_logits"),
    ):
        if getattr(part, key, None) and not is_hub(getattr(part, key)):
            setattr(part, key, str(here / getattr(part, key)))
    if task.data.blend.endswith((".yaml", ".yml")):
        task.data.blend = str(Path(task.data.blend).expanduser().resolve())


def _slurm(cluster: SlurmCluster, task: run.Partial, recipe: str) -> run.Config[run.SlurmExecutor]:
    """Start one task per device by srun: Lightning and NeMo read the ranks from Slurm, and signals reach Python. With
    restarts it is one task per node, `launch.restarts`, which passes them on.

    torchrun in between would end at SIGUSR1 itself. A chain is an array with one job at a time: one submission, no
    rights needed beyond `sbatch`'s, and each job follows the one before whatever that one's exit code.
    """
    _check_paths(cluster)
    nodes, devices, restarting = task.trainer.num_nodes, task.trainer.devices, _restarting(cluster, task)
    leave = {LEAVE: str(cluster.leave_before_end)} if restarting else {}
    return run.Config(
        run.SlurmExecutor,
        account=cluster.account,
        partition=cluster.partition,
        job_name_prefix=f"{recipe}-",
        nodes=nodes,
        ntasks_per_node=1 if restarting else devices,
        launcher=restarting,
        gpus_per_node=devices if cluster.gpus == "gpus_per_node" else None,
        gres=f"gpu:{devices}" if cluster.gpus == "gres" else None,
        time=cluster.time,
        signal=f"USR1@{cluster.leave_before_end}",
        array=f"1-{cluster.chain}%1" if cluster.chain > 1 else None,
        exclusive=True if cluster.exclusive else None,
        container_image=cluster.container,
        container_mounts=_mounts(cluster),
        env_vars={key: shlex.quote(value) for key, value in (leave | cluster.env).items()},
        setup_lines="\n" + "\n".join([*cluster.setup, *([END_CHAIN] if cluster.chain > 1 else [])]),
        # requeue: after a node failed or a job of higher rank came; singleton: two submissions never write one run
        additional_parameters={"requeue": True, "dependency": "singleton", **cluster.sbatch},
        srun_args=list(cluster.srun) or None,
        poll_estimated_start_time=False,  # jobs are watched by launch/jobs.py
        tunnel=run.Config(run.LocalTunnel, job_dir=""),
        packager=run.Config(Packager),
    )


def _check_paths(cluster: SlurmCluster) -> None:
    """Refuse what nemo-run 0.11.1 would rewrite: in a script without a container it replaces every `/nemo_run` by the
    job's folder, in the middle of a path too.
    """
    word = f"/{RUNDIR_NAME}"
    texts = {"NEMORUN_HOME": [get_nemorun_home()], "executor.setup": cluster.setup, "executor.srun": cluster.srun}
    texts |= {"executor.env": cluster.env.values(), "executor.sbatch": map(str, cluster.sbatch.values())}
    for key, values in texts.items():
        found = next((value for value in values if word in value), None)
        if found is not None and not cluster.container:
            raise UserError(
                f"{key}: {found}: nemo-run replaces {word} in scripts", hint="name that folder otherwise: .nemo_run"
            )


def _mounts(cluster: SlurmCluster) -> list[str]:
    """Return the container's mounts, with the work folder under its own path."""
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
        env_vars={**cluster.env, LEAVE: str(cluster.leave_before_end)},
        launcher="torchrun",
        packager=run.Config(Packager),
    )
