"""Start the runs of a comparison through `nemo llm pretrain`. A finished one is not repeated, one
that was killed continues from its checkpoint. Imports no torch.
"""

from __future__ import annotations

import dataclasses

from rich.console import Console

from nemotron_h.comparison.runs import Comparison
from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import leaves, typed
from nemotron_h.core.strict_yaml import read_config
from nemotron_h.launch import runs
from nemotron_h.launch.place import HERE, Place
from nemotron_h.launch.runs import Run
from nemotron_h.schema.recipe import RecipeConfig


def train(comparison: Comparison, console: Console, at_once: int = 1, place: Place = HERE) -> None:
    """Train what is not finished yet.

    Args:
        at_once: runs at a time; of several no steps are shown.
        place: where they run.
    Errors:
        UserError: the folder holds runs of another comparison, or a run fails.
    """
    for run in comparison.runs:
        check_same(run)
    if at_once > 1:
        runs.train_several([(run, comparison.steps) for run in comparison.runs], at_once, console, place=place)
        return
    for number, run in enumerate(comparison.runs, 1):
        title = f"run {number} of {len(comparison.runs)}: {run.name}"
        if runs.is_finished(run, comparison.steps):
            console.print(f"{title}: finished already, in {run.folder}", highlight=False, soft_wrap=True, markup=False)
            continue
        runs.train(run, title, comparison.steps, console, place)


def check_same(run: Run) -> None:
    """Refuse a folder whose run was another.

    Errors:
        UserError: names the keys that differ.
    """
    if not run.recipe_file.is_file():
        return
    # typed: a key that a later release added has its default
    written = typed(RecipeConfig, read_config(run.recipe_file), str(run.recipe_file))
    there, now = (dict(leaves(dataclasses.asdict(recipe))) for recipe in (written, run.recipe))
    changed = [
        f"{key}: {there.get(key)} there, {now.get(key)} now"
        for key in {**there, **now}
        if there.get(key) != now.get(key) and key != "log.dir"  # the same folder by another path
    ]
    if changed:
        raise UserError(
            f"{run.recipe_file} is of another comparison: {'; '.join(changed[:4])}",
            hint="choose another --out, or remove that folder",
        )
