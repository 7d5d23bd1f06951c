"""What ships: every package is listed, every YAML is package data, every recipe composes and builds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nemotron_h.recipe.compose import compose, configs_dir, known_recipes, recipes_dir
from nemotron_h.schema.recipe import PIPELINES

ROOT = Path(__file__).parents[1]


def test_every_package_is_found() -> None:
    """With setup.py, which `pip install` runs: a folder of the library without an `__init__.py` would not ship."""
    code = "import runpy, setuptools as s; s.setup = lambda packages: print(*packages); runpy.run_path('setup.py')"
    listed = set(subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).split())
    library = ROOT / "collections" / "nemotron_h"
    modules = {".".join(("nemotron_h", *path.parent.relative_to(library).parts)) for path in library.rglob("*.py")}
    assert listed == modules | {"nemotron_h.configs", "nemotron_h.data_blends", "nemotron_h.recipes"}


def test_installed_folders_are_the_repository_s() -> None:
    assert (recipes_dir() / "base" / "pretrain.yaml").is_file()
    assert (configs_dir() / "model" / "nemotron_h_tiny.yaml").is_file()


@pytest.mark.parametrize("name", known_recipes())
def test_every_recipe_composes_and_is_a_short_diff(name: str) -> None:
    recipe = compose(name)
    # a compression's model is the parent, its folder that of the child
    assert recipe.stage in PIPELINES or recipe.model.name == name.split("/")[0]
    lines = [
        line
        for line in (recipes_dir() / f"{name}.yaml").read_text().splitlines()
        if line.strip() and not line.lstrip().startswith("#")
    ]
    assert len(lines) < 30


def test_composing_imports_no_torch() -> None:
    code = (
        "import sys; from nemotron_h.recipe.compose import compose;"
        "compose('nemotron_h_tiny/pretrain'); print('torch' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
