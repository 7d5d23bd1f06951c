"""Commands of README, Makefile and docs compose; the new size of `docs/new_size.md` is made as the page says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

from nemotron_h.cli.main import app
from nemotron_h.data.blend import load_blend
from nemotron_h.recipe.check import examine
from nemotron_h.recipe.compose import compose, factory_of, known_recipes, stage_of
from nemotron_h.recipe.overrides import parts, split
from nemotron_h.schema.nemo_names import SAME
from nemotron_h.schema.recipe import STAGES
from nemotron_h.sweep.file import locate, read_sweep

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "new_size.md"
RECIPES = {(STAGES.get(stage_of(name)), factory_of(name)): name for name in known_recipes()}
COMMAND = re.compile(r"nemo llm (\w+) --factory (\w+)((?: [^\s#`]+)*)")


def commands() -> list[tuple[str, str]]:
    """Return (recipe, arguments) of every `nemo llm` with a shipped recipe that the pages show."""
    pages = "".join(page.read_text() for page in (ROOT / "README.md", ROOT / "Makefile", *ROOT.glob("docs/**/*.md")))
    shown = sorted(set(COMMAND.findall(re.sub(r" \\\n +", " ", pages))))
    return [(RECIPES[command, name], arguments) for command, name, arguments in shown if (command, name) in RECIPES]


def test_a_command_of_the_pages_composes_and_names_values_by_the_recipe_s_keys() -> None:
    assert len(commands()) > 10
    for recipe, arguments in commands():
        settings = [argument for argument in arguments.split() if parts(argument)[0]]
        assert not [setting for setting in settings if parts(setting)[0] in SAME], arguments
        values, others = split([setting for setting in settings if not setting.startswith("executor")])
        if values:
            compose(recipe, values)
        beside = {"resume.resume_from_path", "resume.must_exist", "trainer.max_steps", "data.horizon_steps"}
        assert {parts(setting)[0] for setting in others} <= beside, arguments


def test_the_new_size_of_the_page_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text()
    model, recipe = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert len(recipe.splitlines()) < 15
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "hybrid_30m.yaml").write_text(model)
    (tmp_path / "hybrid_30m.yaml").write_text(recipe)
    promised = re.search(r"^    (ok  hybrid_30m: .*), \.\.\.$", text, re.MULTILINE).group(1)
    assert examine("hybrid_30m.yaml").line().startswith(promised)


def own_commands() -> list[list[str]]:
    """Return the arguments of every `nemotron-h` command in the pages' blocks of code and in the Makefile."""
    pages = "".join(page.read_text() for page in (ROOT / "README.md", ROOT / "Makefile", *ROOT.glob("docs/**/*.md")))
    pages = re.sub(r" *\\\n\s*", " ", pages)
    shown = re.findall(r"^(?: {4}(?:\$ )?|\t@\$\(BIN\)/)nemotron-h (\S.*)$", pages, re.MULTILINE)
    parsed = {tuple(shlex.split(line.replace("$'", "'"), comments=True)) for line in shown}
    return [list(arguments) for arguments in sorted(parsed)]


@pytest.mark.parametrize("arguments", own_commands(), ids=" ".join)
def test_a_command_of_the_pages_has_the_arguments_that_it_says(arguments: list[str]) -> None:
    """Parsed as the command would, up to where it begins to work; recipes and blends that ship are there too."""
    command, rest = typer.main.get_command(app), arguments
    while isinstance(command, TyperGroup):  # of typer's own copy of click
        command, rest = command.commands[rest[0]], rest[1:]
    parsed = command.make_context("nemotron-h", list(rest)).params
    assert parsed or not rest
    recipe, settings = parsed.get("recipe") or parsed.get("name"), parsed.get("overrides") or []
    if recipe in known_recipes() and all("=" in setting for setting in settings):
        compose(recipe, [setting for setting in settings if not setting.startswith("executor")])
    if command.name == "sweep" and not parsed["file"].endswith(".yaml"):  # likewise
        assert read_sweep(locate(parsed["file"]))
    if parsed.get("blend") and not parsed["blend"].endswith(".yaml"):  # a file of the reader's own
        assert load_blend(parsed["blend"])
