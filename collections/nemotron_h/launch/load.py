"""A cluster by name or path, with overrides, as a checked configuration."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from omegaconf import OmegaConf

from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import merged, nearest, typed
from nemotron_h.core.strict_yaml import parse_settings, read_config
from nemotron_h.core.units import seconds_of
from nemotron_h.schema.cluster import KINDS, Cluster, SlurmCluster

GPU_REQUESTS = ("gpus_per_node", "gres", "none")


def shipped_dir() -> Path:
    """Return the folder of the cluster files that ship with the package, one per kind."""
    return Path(str(files("nemotron_h.configs"))) / "cluster"


def is_cluster(name_or_path: str) -> bool:
    """Tell whether the name of an executor is meant for `load`."""
    return name_or_path in KINDS or name_or_path.endswith((".yaml", ".yml"))


def load(name_or_path: str, overrides: Sequence[str] = ()) -> Cluster:
    """Read a cluster file over the shipped one of its kind, and overrides over both.

    Args:
        name_or_path: `local`, `slurm`, `kubernetes`, or the path of a file of your own.
        overrides: `account=NAME`, by dotted key.
    Errors:
        UserError: no such file; unknown kind or key; placeholders that are not filled in; impossible value.
    """
    if name_or_path in KINDS:
        path = shipped_dir() / f"{name_or_path}.yaml"
    else:
        path = Path(name_or_path).expanduser()
        if not path.is_file():
            raise UserError(
                f"there is no cluster file {path}", hint=f"Known: {', '.join(KINDS)}; or the path of a file"
            )
    written = read_config(path)
    kind = written.get("kind")
    if kind not in KINDS:
        hint = f"{nearest(str(kind), KINDS)}Known: {', '.join(KINDS)}."
        raise UserError(f"{path}: kind = {kind!r}", hint=hint)
    base = read_config(shipped_dir() / f"{kind}.yaml")
    given = parse_settings(overrides, "executor")
    content = merged(KINDS[kind], (base, kind), (written, str(path)), (given, "executor"))
    missing = sorted(OmegaConf.missing_keys(content))
    if missing:
        given_on_line = " ".join(f"executor.{key}=..." for key in missing)
        raise UserError(
            f"{path}: {', '.join(missing)} {'is a placeholder' if len(missing) == 1 else 'are placeholders'}",
            hint=f"fill in a cluster file of your own (kind: {kind}) and give executor=FILE, or add {given_on_line}",
        )
    cluster = typed(KINDS[kind], content, str(path))
    _check(cluster, str(path))
    return cluster


def _check(cluster: Cluster, origin: str) -> None:
    if cluster.kind != "local" and not cluster.work_dir.startswith("/"):
        raise UserError(f"{origin}: work_dir = {cluster.work_dir}", hint="write an absolute path: all nodes go there")
    if not isinstance(cluster, SlurmCluster):
        return
    if cluster.gpus not in GPU_REQUESTS:
        hint = f"{nearest(cluster.gpus, GPU_REQUESTS)}Known: {', '.join(GPU_REQUESTS)}."
        raise UserError(f"{origin}: gpus = {cluster.gpus!r}", hint=hint)
    if cluster.mounts and not cluster.container:
        raise UserError(f"{origin}: mounts without a container", hint="set container to an image, or remove mounts")
    limit = seconds_of(cluster.time, f"{origin}: time: ")
    if cluster.leave_before_end >= limit:
        raise UserError(
            f"{origin}: leave_before_end = {cluster.leave_before_end} s, the whole job has {limit} s (time)",
            hint="leave room for steps: raise time, or lower leave_before_end",
        )
