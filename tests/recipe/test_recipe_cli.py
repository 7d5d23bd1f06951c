"""`nemotron-h recipe ...` as a user types it."""

from __future__ import annotations

import itertools
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from nemotron_h.cli.main import app
from nemotron_h.core.errors import UserError
from nemotron_h.planning.layouts import best, fewest_gpus
from nemotron_h.planning.plan import make_plan
from nemotron_h.recipe.compose import compose, known_recipes

Recipe = Callable[..., str]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Run the command in an empty folder; its output, or the `UserError` that it reports."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["recipe", *arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.output

    return run


def test_list_has_a_line_for_each(recipe: Recipe) -> None:
    header, *lines = recipe("list").splitlines()
    assert header.split() == ["recipe", "size", "stage", "tokens", "GPUs", "source"]
    assert sorted(line.split()[0] for line in lines) == known_recipes()
    assert max(map(len, lines)) <= 100
    by_name = {line.split()[0]: line.split()[1:] for line in lines}
    assert by_name["nemotron_h_8b/pretrain"] == ["8.1B", "pretrain", "15T", "2", "paper", "2.4"]
    assert by_name["nemotron_h_8b/sft"] == ["sft", "2B", "2", "ours"], "a model's size is said once"
    assert by_name["nemotron_h_47b/minipuzzle"][0] == "56.3B", "of the parent"
    models = [line.split("/")[0] for line in lines]
    assert len([model for model, _ in itertools.groupby(models)]) == len(set(models)), "grouped by model"
    for ends in ("15T", "2B", "655k"):  # right-aligned
        assert {line.index(f" {ends} ") + len(ends) for line in lines if f" {ends} " in line} == {
            header.index("GPUs") - 3
        }


def test_list_for_machines(recipe: Recipe) -> None:
    entries = {entry["recipe"]: entry for entry in json.loads(recipe("list", "--json"))}
    assert sorted(entries) == known_recipes()
    entry = entries["nemotron_h_8b/pretrain"]
    assert (entry["tokens"], entry["source"], entry["gpus"]) == (15 * 10**12, "paper 2.4", 2)
    assert entries["nemotron_h_47b/sft"]["stated"].startswith("ours: not published")
    larger = {entry["recipe"]: entry["gpus"] for entry in json.loads(recipe("list", "--json", "--gpu", "b200"))}
    assert larger["nemotron_h_8b/pretrain"] == 1


@pytest.mark.parametrize("name", ["nemotron_h_8b", "nemotron_h_56b/sft_lora", "nemotron_h_4b/distill"])
def test_the_fewest_gpus_of_the_list_are_those_of_sweeps(name: str) -> None:
    recipe = compose(name)
    plan = make_plan(recipe)
    fewest = fewest_gpus(plan.definition, plan.layout, plan.gpu)

    def fits(gpus: int) -> bool:
        ranks = [f"parallel.devices={gpus}", "parallel.nodes=1", "parallel.tensor=1", "parallel.sequence=false"]
        return best(make_plan(compose(name, ranks)).sweep()) is not None

    assert fits(fewest)
    assert fewest == 1 or not fits(fewest // 2)


@pytest.mark.parametrize("name", ["nemotron_h_tiny", "nemotron_h_56b", "nano_9b_v2"])
def test_plain_yaml_loads_again_as_the_same_recipe(recipe: Recipe, tmp_path: Path, name: str) -> None:
    text = recipe("show", name, "optim.beta1=0.85", "--plain")
    (tmp_path / "again.yaml").write_text(text)
    assert compose("again.yaml") == compose(name, ["optim.beta1=0.85"])
    assert recipe("show", "again.yaml", "--plain") == text


def test_show_says_where_each_value_was_written(recipe: Recipe) -> None:
    text = recipe("show", "nemotron_h_8b", "data.seed=7")
    assert yaml.safe_load(text)["model"]["hidden_size"] == 4096
    lines = {line.split(":")[0].strip(): line for line in text.splitlines()}
    assert lines["seed"].endswith("# override")
    assert "# schema default" in lines["workers"]
    assert "# configs/model/nemotron_h_8b.yaml:" in lines["hidden_size"]
    assert lines["hidden_size"].endswith("; paper table 1")
    assert "recipes/" in lines["peak_lr"]
    assert lines["peak_lr"].endswith("; paper 2.4")


def test_show_fits_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from rich.console import Console

    from nemotron_h.recipe.compose import trace
    from nemotron_h.recipe.show import show

    out = io.StringIO()
    show(trace("nemotron_h_56b"), Console(file=out, force_terminal=True, width=80, color_system=None))
    assert max(map(len, out.getvalue().splitlines())) <= 80
    assert "written in" in out.getvalue()


def test_new_composes_at_once_and_never_overwrites(recipe: Recipe, tmp_path: Path) -> None:
    out = recipe("new", "mine", "--from", "nemotron_h_8b")
    assert "nemotron_h_recipe(path=" in out
    mine, parent = compose("mine.yaml"), compose("nemotron_h_8b")
    assert mine.name == "mine"
    mine.name = parent.name
    assert mine == parent
    before = (tmp_path / "mine.yaml").read_text()
    with pytest.raises(UserError, match="exists already"):
        recipe("new", "mine", "--from", "nemotron_h_tiny")
    assert (tmp_path / "mine.yaml").read_text() == before
    # every line that is ready to edit is right once its # is removed
    edited = "\n".join(line.removeprefix("# ") if index > 1 else line for index, line in enumerate(before.splitlines()))
    (tmp_path / "mine.yaml").write_text(edited)
    again = compose("mine.yaml")
    assert again.sources["tokens"] == "ours: why"
    again.sources, again.name, parent.sources = {}, parent.name, {}
    assert again == parent

    recipe("new", "child", "--from", "mine.yaml")
    assert compose("child.yaml").optim == mine.optim
    recipe("new", "other", "--from", "nemotron_h_tiny", "--out", "somewhere.yaml")
    assert compose("somewhere.yaml").name == "other"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("new", "a/b", "--from", "nemotron_h_8b"), "is not a name"),
        (("new", "a", "--from", "nemotron_h_9b"), "Did you mean nemotron_h_8b"),
        (("new", "a", "--from", "nemotron_h_8b", "--out", "no/a.yaml"), "there is no folder no"),
        (("new", "a", "--from", "nemotron_h_8b", "--out", "a.yml"), "end in .yaml"),
        (("new", "a", "--from", "parent/own.yaml", "--out", "a.yaml"), "has to lie beside its parent"),
        (("check", "parent/own.yaml", "optim.peak_lrr=1"), "Did you mean peak_lr?"),
        (("check", "parent/own.yaml", "data.blend=sampel"), "no blend named 'sampel'"),
        (
            ("check", "parent/own.yaml", "model=nemotron_h_8b"),
            "8,192 tokens, model nemotron_h_8b a vocabulary of 131",
        ),
        (("check", "parent/own.yaml", "overrides=[trainer.max_steps]"), "'trainer.max_steps' is not a setting"),
        (("diff", "parent/own.yaml", "nowhere.yaml"), "no recipe file nowhere.yaml"),
    ],
)
def test_mistakes_are_named(recipe: Recipe, tmp_path: Path, arguments: tuple[str, ...], expected: str) -> None:
    (tmp_path / "parent").mkdir()
    (tmp_path / "parent" / "own.yaml").write_text("defaults: [/nemotron_h_tiny/pretrain, _self_]\nname: own\n")
    with pytest.raises(UserError) as caught:
        recipe(*arguments)
    assert expected in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["parent"]  # nothing was written


def test_diff_shows_both_values_and_where_they_were_written(recipe: Recipe, tmp_path: Path) -> None:
    own = "defaults:\n  - /nemotron_h_tiny/pretrain\n  - _self_\nname: own\noptim:\n  peak_lr: 0.004\n"
    (tmp_path / "own.yaml").write_text(own)
    lines = recipe("diff", "nemotron_h_tiny", "own.yaml").splitlines()
    assert lines[0] == "name"
    assert lines[-1] == "2 keys differ"
    at = lines.index("optim.peak_lr")
    assert lines[at + 1].startswith("  - 0.003  recipes/nemotron_h_tiny/pretrain.yaml:")
    assert lines[at + 2] == "  + 0.004  own.yaml:6"
    assert recipe("diff", "own.yaml", "own.yaml") == "the recipes are the same\n"


def test_check_says_what_the_recipe_comes_to(recipe: Recipe) -> None:
    out = recipe("check", "nemotron_h_8b")
    assert out.startswith("ok  nemotron_h_8b: 8,100,852,736 parameters")
    for fact in ("2,384,186 steps", "warm-up 1,319", "1,430,511", "1,907,349", "2,323,786", "not checked: data"):
        assert fact in out, out
    assert len(out.splitlines()) == 1


def test_the_command_reports_an_error_with_exit_code_2_and_starts_quickly() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = (
        "import sys; from nemotron_h.cli.main import main; sys.argv = ['nemotron-h', 'recipe', 'check', 'no[1].yaml']; "
    )
    code += "\ntry: main()\nfinally: print(sorted({'torch', 'nemo', 'megatron', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: there is no recipe file no[1].yaml\n"
    assert done.stdout == "[]\n"
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 1.5  # seconds of the processor, whatever else runs
