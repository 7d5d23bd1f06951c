"""Sweep files: points and their names, and every mistake before the first run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from small_run import Small
from typer.testing import CliRunner

from nemotron_h.cli.main import app
from nemotron_h.core.errors import UserError
from nemotron_h.launch.place import HERE
from nemotron_h.launch.runs import write_recipe
from nemotron_h.recipe.compose import recipes_dir
from nemotron_h.schema.sweep import FitSchema
from nemotron_h.sweep import fits
from nemotron_h.sweep.command import Sweep
from nemotron_h.sweep.file import SweepFile, read_sweep
from nemotron_h.sweep.points import others, points_of

PAGE = Path(__file__).parents[2] / "docs" / "sweeps.md"


def write(small: Small, folder: Path, name: str = "lr", **content: object) -> SweepFile:
    """A sweep over `base.yaml`, whose folder is in `folder`."""
    path = folder / f"{name}.yaml"
    whole = {"recipe": str(small.folder / "base.yaml"), "dir": str(folder / "runs"), **content}
    path.write_text(yaml.safe_dump(whole, sort_keys=False))
    return read_sweep(path)


def sweep_of(sweep: SweepFile) -> Sweep:
    """The sweep with its points checked."""
    from rich.console import Console

    return Sweep(sweep, HERE, Console())


def test_points_are_runs_by_grid_by_seeds(small: Small, tmp_path: Path) -> None:
    wide = {"name": "wide", "model.ffn_hidden_size": 128}
    deep = {"model.pattern": "M-M*-M-"}
    sweep = write(
        small,
        tmp_path,
        settings={"tokens": 1024, "optim.final_lr": 1e-5},
        runs=[wide, deep],
        grid={"optim.peak_lr": [0.01, 0.001], "rate": [{"name": "slow", "optim.warmup_tokens": 512}]},
        seeds=[1, 2],
    )
    points = points_of(sweep, HERE)
    assert len(points) == 8
    assert [p.name for p in points][:3] == [
        "wide_peak_lr-0.01_slow_seed-1",
        "wide_peak_lr-0.01_slow_seed-2",
        "wide_peak_lr-0.001_slow_seed-1",
    ]
    assert points[-1].name == "pattern-M-M--M-fb42_peak_lr-0.001_slow_seed-2"
    first, last = points[0], points[-1]
    assert first.labels == {"run": "wide", "optim.peak_lr": 0.01, "rate": "slow", "seed": 1}
    recipe = first.run.recipe
    assert (recipe.init_seed, recipe.data.seed, recipe.optim.peak_lr, recipe.tokens) == (1, 1, 0.01, "1024")
    assert (first.steps, first.tokens) == (2, 1024)
    assert first.run.folder == tmp_path / "runs" / "lr" / first.name
    assert (recipe.model.ffn_hidden_size, recipe.model.expect.parameters) == (128, 163376 + 2 * 2 * 64 * 32)
    assert (last.run.recipe.model.expect.mamba, last.run.recipe.model.expect.ffn) == (3, 3)
    assert first.parameters == recipe.model.expect.parameters
    assert first.flops > 0


def test_a_sweep_without_axes_is_one_run(small: Small, tmp_path: Path) -> None:
    assert [point.name for point in points_of(write(small, tmp_path), HERE)] == ["run"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"grid": {"optim.peak_lrr": [1]}}, ["lr.yaml: grid.optim.peak_lrr: unknown recipe key", "optim.peak_lr?"]),
        ({"runs": [{"optm.peak_lr": 1}]}, ["runs: unknown recipe key optm.peak_lr"]),
        ({"settings": {"trainer.max_steps": 3}}, ["settings: unknown recipe key trainer.max_steps"]),
        ({"settings": {"name": "x"}}, ["settings: name is no key to sweep"]),
        ({"grid": {"optim.peak_lr": 1e-3}}, ["grid.optim.peak_lr = 0.001 is no list of values"]),
        ({"grid": {"optim.peak_lr": []}}, ["is no list of values"]),
        ({"grid": {"optim.peak_lr": [1e-3, 0.001]}}, ["grid.optim.peak_lr has peak_lr-0.001 twice"]),
        ({"seeds": [1, 1]}, ["seed has seed-1 twice"]),
        ({"seeds": [-1]}, ["seeds", "is below 0"]),
        ({"seeds": [1], "grid": {"init_seed": [2]}}, ["init_seed is set by `seeds` too"]),
        ({"runs": [{"optim.peak_lr": 1}], "grid": {"optim.peak_lr": [2]}}, ["is set by run and optim.peak_lr"]),
        ({"runs": [3]}, ["runs has 3, which is no mapping"]),
        ({"runs": [{"name": "a/b", "init_seed": 1}]}, ["name = 'a/b' is no name"]),
        ({"gridd": {}}, ["unknown key gridd", "Did you mean grid?"]),
        ({"at_once": 0}, ["at_once = 0 is below 1"]),
        ({"grid": {"loss": [{"name": "a", "init_seed": 1}]}}, ["loss is a column of what is measured"]),
        ({"grid": {"optim.peak_lr": ["fast"]}}, ["optim.peak_lr", "(point fast)"]),
        ({"grid": {"tokens": [512, 2048]}}, ["optim.warmup_tokens (512) is not shorter", "(point tokens-512)"]),
        ({"grid": {"model.num_query_groups": [2, 3]}}, ["num_query_groups = 3", "(point num_query_groups-3)"]),
        ({"recipe": "nemotron_h_tinny"}, ["there is no recipe 'nemotron_h_tinny'"]),
        ({"recipe": "nemotron_h_tiny/minipuzzle"}, ["is of stage minipuzzle, which is no run"]),
        ({"settings": {"parallel.nodes": 2}}, ["parallel.nodes = 2"]),
        ({"settings": {"data.root": "/nowhere"}}, ["not prepared"]),
        ({"figures": [{"x": "optim.peak_l"}]}, ["figures[0].x = 'optim.peak_l' is no column", "Columns: "]),
        ({"figures": [{"x": "tokens_seen", "y": "flops"}]}, ["figures[0].y = 'flops' over tokens_seen"]),
        ({"figures": [{"x": "tokens", "log": ["z"]}]}, ["figures[0].log has 'z'"]),
        ({"figures": [{"y": "loss"}]}, ["x", "missing"]),
        ({"fits": [{"name": "pwer"}]}, ["fits: there is no fit 'pwer'"]),
    ],
)
def test_a_mistake_names_file_key_and_fix(small: Small, tmp_path: Path, content: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        sweep_of(write(small, tmp_path, **content))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert not (tmp_path / "runs").exists()


def test_all_mistakes_are_told_at_once(small: Small, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 mistakes") as error:
        write(small, tmp_path, settings={"optim.beta": 1}, grid={"optim.peak": [1]})
    assert "settings: unknown recipe key optim.beta" in error.value.message
    assert "grid.optim.peak: unknown recipe key optim.peak" in error.value.message
    sweep = write(small, tmp_path, grid={"optim.peak_lr": [20.0, 1e-2], "data.micro_batch_size": [2, 3]})
    with pytest.raises(UserError, match="mistakes") as error:
        points_of(sweep, HERE)
    assert "optim.peak_lr = 20" in error.value.message
    assert "data.global_batch_size = 8 is not a multiple" in error.value.message


def test_a_fit_with_too_few_points_is_refused_before_a_run(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def line(rows: list[dict]) -> str:
        if len({row["x"] for row in rows}) < 3:
            raise UserError("line: 2 different x, it takes 3", hint="add values")
        seen.append([row["loss"] for row in rows])
        return "y = x"

    monkeypatch.setitem(fits.FITS, "line", line)
    fit = {"name": "line", "columns": {"x": "optim.peak_lr"}}
    with pytest.raises(UserError, match=r"lr\.yaml: fits: line: line: 2 different x, it takes 3"):
        sweep_of(write(small, tmp_path, grid={"optim.peak_lr": [1e-2, 1e-3]}, fits=[fit]))
    with pytest.raises(UserError, match=r"there is no column 'optim\.beta1'"):
        sweep_of(write(small, tmp_path, grid={"optim.peak_lr": [1e-2]}, fits=[{**fit, "line": "optim.beta1"}]))
    made = sweep_of(write(small, tmp_path, grid={"optim.peak_lr": [1e-2, 2e-3, 1e-3]}, fits=[fit]))
    assert len(seen[-1]) == 3
    rows = [{"loss": 1.0, "flops": 1.0, **point.swept} for point in made.points]
    named = FitSchema("line", {"x": "optim.peak_lr"})
    assert list(fits.fitted(named, rows)) == [("line", "y = x")]


def test_a_folder_of_another_recipe_is_refused_and_former_points_are_named(small: Small, tmp_path: Path) -> None:
    first = write(small, tmp_path, grid={"optim.peak_lr": [1e-2, 1e-3]})
    for point in points_of(first, HERE):
        write_recipe(point.run)
        point.run.folder.mkdir()
        (point.run.folder / "run.json").write_text("{}")
    assert not points_of(first, HERE)[0].is_finished()
    changed = write(small, tmp_path, grid={"optim.peak_lr": [1e-2, 2e-3]})
    assert others(points_of(changed, HERE)) == ["peak_lr-0.001"]
    shared = write(small, tmp_path, settings={"optim.weight_decay": 0.2}, grid={"optim.peak_lr": [1e-2]})
    with pytest.raises(UserError, match=r"optim\.weight_decay: 0\.1 there, 0\.2 now") as error:
        points_of(shared, HERE)
    assert "rename lr.yaml" in error.value.hint


def test_a_recipe_that_ends_its_runs_elsewhere_is_refused(small: Small, tmp_path: Path) -> None:
    text = (small.folder / "base.yaml").read_text()
    (tmp_path / "ends.yaml").write_text(f"{text}overrides: [trainer.max_steps=3]\n")
    with pytest.raises(UserError, match=r"overrides has trainer\.max_steps=3"):
        points_of(write(small, tmp_path, recipe=str(tmp_path / "ends.yaml")), HERE)


@pytest.mark.parametrize("name", sorted(file.stem for file in (recipes_dir() / "sweeps").glob("*.yaml")))
def test_a_shipped_sweep_checks_as_far_as_its_data_is_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemotron_h.sweep.points._check_data", lambda points, origin: None)
    result = CliRunner().invoke(app, ["sweep", name, "--dryrun"], catch_exceptions=False)
    assert result.exit_code == 0
    assert len(result.output.splitlines()) >= 6


def test_the_trio_has_equal_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemotron_h.sweep.points._check_data", lambda points, origin: None)
    points = points_of(read_sweep(recipes_dir() / "sweeps" / "trio.yaml"), HERE)
    sizes = [point.parameters for point in points]
    assert max(sizes) / min(sizes) < 1.003
    assert {point.tokens for point in points} == {327_680}


def test_the_file_of_the_page_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemotron_h.sweep.points._check_data", lambda points, origin: None)
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    path = tmp_path / "lr.yaml"
    path.write_text(text)
    assert "peak_lr-0.002_wide_seed-1" in [p.name for p in sweep_of(read_sweep(path)).points]


def test_values_of_a_sweep_are_in_its_file(small: Small, tmp_path: Path) -> None:
    path = write(small, tmp_path).path
    result = CliRunner().invoke(app, ["sweep", str(path), "optim.peak_lr=1"])
    assert "a sweep takes its values from its file" in str(result.exception)
    result = CliRunner().invoke(app, ["sweep", "triio"])
    assert "Did you mean trio?" in str(result.exception)
