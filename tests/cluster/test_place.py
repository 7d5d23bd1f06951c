"""The place of runs, and what is refused there before any work: keys, numbers, fixes. Imports no NeMo."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemotron_h.core.errors import UserError
from nemotron_h.launch.place import HERE, check_shared, place_of
from nemotron_h.platform.ranks import RANKS, check_here, is_rank
from nemotron_h.recipe.compose import compose, known_recipes

SLURM = ("executor=slurm", "executor.account=ABC", "executor.partition=batch")


@pytest.mark.parametrize(
    ("nodes", "devices", "gpus", "said"),
    [
        (96, 8, 0, "r: parallel.nodes = 96: 768 ranks, and this command starts them on one machine"),
        (2, 1, 8, "r: parallel.nodes = 2: 2 ranks"),
        (1, 8, 1, "r: parallel.devices = 8, this machine has 1 GPU\n"),
        (1, 8, 8, None),
        (1, 8, 0, None),
    ],
)
def test_what_one_command_cannot_start(nodes: int, devices: int, gpus: int, said: str | None) -> None:
    if said is None:
        check_here(nodes, devices, "r: ", gpus)
        return
    with pytest.raises(UserError, match=said) as raised:
        check_here(nodes, devices, "r: ", gpus)
    assert "executor=FILE.yaml" in raised.value.hint


@pytest.mark.parametrize(("name", "value"), [*((name, "16") for name in RANKS), ("NODE_RANK", "1")])
def test_a_rank_is_known_by_its_launcher(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_rank(16)
    monkeypatch.setenv(name, value)
    assert is_rank(16)
    assert is_rank(8) == (name == "NODE_RANK"), "another number: a shell in an allocation, not a rank of this run"


def test_pipelines_of_the_paper_are_refused_here_and_taken_by_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*RANKS, "NODE_RANK"):  # a pipeline is no rank, in an allocation neither
        monkeypatch.setenv(name, "768")
    place, _ = place_of([*SLURM, "executor.work_dir=/shared/me"])
    several = {}
    for name in known_recipes("minipuzzle"):
        recipe = compose(name)
        place.check(recipe, name)
        if recipe.parallel.nodes == 1:
            HERE.check(recipe, name)
            continue
        several[name] = recipe.parallel.nodes
        with pytest.raises(UserError, match=rf"{name}: parallel\.nodes = {recipe.parallel.nodes}: "):
            HERE.check(recipe, name)
    assert several == {"nemotron_h_47b/minipuzzle": 96, "nemotron_h_4b/minipuzzle_minitron_ssm": 48}


def test_paths_of_a_recipe_start_in_the_work_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = compose("nemotron_h_tiny/minipuzzle", ["init.checkpoint=null"])
    place, values = place_of([*SLURM, f"executor.work_dir={tmp_path}", "tokens=2M"])
    assert values == ["tokens=2M"]
    moved = place.moved(recipe)
    assert (moved.log.dir, moved.data.root) == (str(tmp_path / "runs"), str(tmp_path / "data"))
    assert moved.minipuzzle.parent == str(tmp_path / "runs" / "nemotron_h_tiny")
    assert (recipe.log.dir, recipe.data.root) == ("runs", None), "the recipe itself stays"
    assert HERE.moved(recipe) is recipe
    recipe.data.root, recipe.minipuzzle.parent = "/data", "/elsewhere/parent"
    moved = place.moved(recipe)
    assert (moved.data.root, moved.minipuzzle.parent) == ("/data", "/elsewhere/parent")
    recipe.minipuzzle.parent = "hub:nvidia/Nemotron-H-8B-Base-8K@v1"
    assert place.moved(recipe).minipuzzle.parent == recipe.minipuzzle.parent, "a name on the Hub is no path"
    monkeypatch.setenv("NEMOTRON_H_DATA", "/of/this/shell")
    recipe.data.root = None
    assert place.moved(recipe).data.root == str(tmp_path / "data"), "jobs do not have this shell's environment"
    assert place_of(["executor=local"])[0].moved(recipe).data.root == "/of/this/shell"


def test_runs_of_a_command_here_start_themselves_again_where_the_executor_says_so() -> None:
    assert place_of(["executor=local"])[0].launcher == HERE.launcher == ()
    assert place_of(["executor=local", "executor.restarts=2"])[0].launcher == ("executor=local", "executor.restarts=2")
    assert place_of([*SLURM, "executor.work_dir=/shared", "executor.restarts=2"])[0].launcher == (), (
        "jobs have all of their executor's keys"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["executor=kubernetes", "executor.namespace=t", "executor.image=i", "executor.claim=c"], "are waited for"),
        (["executor=my_factory"], "executor=my_factory: this command takes local, slurm, or the path"),
        (["executor.time=01:00:00"], r"executor\.time=01:00:00 without an executor"),
    ],
)
def test_executors_that_a_pipeline_cannot_wait_for(arguments: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        place_of(arguments)


def test_numbers_of_the_cluster_file_and_its_folder_are_held_against_the_recipe(tmp_path: Path) -> None:
    recipe = compose("nemotron_h_tiny/minipuzzle")
    place, _ = place_of([*SLURM, f"executor.work_dir={tmp_path}/absent", "executor.nodes=4"])
    with pytest.raises(UserError, match=r"executor\.nodes = 4, parallel\.nodes = 1"):
        place.check(recipe, "r")
    with pytest.raises(UserError, match=r"executor\.work_dir = .*absent is no folder of this machine"):
        check_shared(place)
    check_shared(HERE)
