"""Cluster files: strict keys, placeholders, impossible values, a file of the user's own. Imports no NeMo."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemotron_h.core.errors import UserError
from nemotron_h.core.units import seconds_of
from nemotron_h.launch.load import load, shipped_dir
from nemotron_h.schema.cluster import KINDS, KubernetesCluster, SlurmCluster

GIVEN = {
    "local": [],
    "slurm": ["account=ABC", "partition=batch", "work_dir=/shared/me"],
    "kubernetes": ["namespace=team", "image=registry/nemotron:1", "claim=work"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_shipped_file_has_every_key_and_loads_when_its_placeholders_are_given(kind: str) -> None:
    cluster = load(kind, GIVEN[kind])
    assert type(cluster) is KINDS[kind]
    written = {line.split(":")[0] for line in (shipped_dir() / f"{kind}.yaml").read_text().splitlines()}
    assert set(KINDS[kind].__dataclass_fields__) - {"nodes", "devices"} <= written


@pytest.mark.parametrize("kind", ["slurm", "kubernetes"])
def test_placeholders_are_named_with_file_and_fix(kind: str) -> None:
    keys = sorted(given.split("=")[0] for given in GIVEN[kind])
    with pytest.raises(UserError) as raised:
        load(kind)
    assert str(shipped_dir() / f"{kind}.yaml") in raised.value.message
    assert ", ".join(keys) in raised.value.message
    assert f"executor.{keys[0]}=" in raised.value.hint
    with pytest.raises(UserError, match=rf"{keys[-1]} is a placeholder"):
        load(kind, [given for given in GIVEN[kind] if not given.startswith(keys[-1])])


def test_shipped_files_name_no_site() -> None:
    for kind in ("slurm", "kubernetes"):
        read = (shipped_dir() / f"{kind}.yaml").read_text()
        for key in ("account", "partition", "namespace", "image", "claim"):
            for line in read.splitlines():
                assert not line.startswith(f"{key}:") or line == f"{key}: ???"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("acount=ABC", r"unknown key acount(.|\n)*Did you mean account\?"),
        ("chain=0", "chain = 0"),
        ("chain=many", "chain"),
        ("time=four hours", "time: 'four hours' is not a duration"),
        ("time=00:10:00", "leave_before_end = 600 s, the whole job has 600 s"),
        ("leave_before_end=0", "leave_before_end = 0"),
        ("gpus=gre", r"gpus = 'gre'(.|\n)*Did you mean gres\?"),
        ("work_dir=runs", "work_dir = runs"),
        ("mounts=[/a:/b]", "mounts without a container"),
    ],
)
def test_mistakes_are_named(override: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        load("slurm", [*GIVEN["slurm"], override])


def test_a_file_of_the_users_own_states_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "kind: slurm\naccount: ABC\npartition: batch\nwork_dir: /shared/me\nsbatch: {qos: high}\nchain: 3\n"
    )
    cluster = load(str(path), ["chain=5", "sbatch.mail-type=END"])
    assert isinstance(cluster, SlurmCluster)
    assert (cluster.account, cluster.chain, cluster.time) == ("ABC", 5, "04:00:00")
    assert cluster.sbatch == {"qos": "high", "mail-type": "END"}
    path.write_text("kind: kubernetes\nnamespace: team\nimage: i\nclaim: c\nclam: d\n")
    with pytest.raises(UserError, match=r"mine.yaml: unknown key clam"):
        load(str(path))
    path.write_text("kind: slrum\n")
    with pytest.raises(UserError, match=r"mine.yaml: kind = 'slrum'(.|\n)*Did you mean slurm\?"):
        load(str(path))
    with pytest.raises(UserError, match=r"no cluster file .*other.yaml"):
        load(str(tmp_path / "other.yaml"))


def test_lists_of_mappings_are_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "kind: kubernetes\nnamespace: team\nimage: i\nclaim: c\ntolerations: [{key: gpu, operator: Exists}]\n"
    )
    cluster = load(str(path))
    assert isinstance(cluster, KubernetesCluster)
    assert cluster.tolerations == [{"key": "gpu", "operator": "Exists"}]


@pytest.mark.parametrize(("text", "seconds"), [("00:01:30", 90), ("2-01:00:00", 176_400), ("100:00:00", 360_000)])
def test_durations(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["90", "1:2:3", "00:60:00", ""])
def test_other_forms_of_duration_are_errors(text: str) -> None:
    with pytest.raises(UserError, match="HH:MM:SS"):
        seconds_of(text)
