"""Parts that the commands of pipelines share: which recipe, where it runs, its stages and how they stand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from nemotron_h.launch.place import Place
    from nemotron_h.launch.runs import Run
    from nemotron_h.launch.stages import Pipeline
    from nemotron_h.schema.recipe import RecipeConfig


@dataclass(frozen=True)
class Asked:
    """Request of a command line.

    Attributes:
        recipe: of the pipeline; its paths are not yet the cluster's.
        origin: its file.
        place: where its trainings run.
    """

    recipe: RecipeConfig
    origin: str
    place: Place
    console: Console


def ask(kind: str, name: str, overrides: Sequence[str]) -> Asked:
    """Read a recipe of a stage of `PIPELINES`.

    Args:
        kind: the stage, also the name of a shipped recipe after its model's.
        name: a shipped recipe or a file.
    Errors:
        UserError: it is of another stage; and as `compose`.
    """
    from rich.console import Console

    from nemotron_h.core.errors import UserError
    from nemotron_h.launch.place import place_of
    from nemotron_h.recipe.compose import compose, known_recipes, locate

    full = f"{name}/{kind}" if f"{name}/{kind}" in known_recipes() else name
    place, values = place_of(overrides)
    recipe = compose(full, values)
    if recipe.stage != kind:
        known = ", ".join(known for known in known_recipes() if compose(known).stage == kind)
        raise UserError(f"{name} is a recipe of stage {recipe.stage}", hint=f"recipes of this stage: {known}")
    return Asked(recipe, locate(full)[2], place, Console(highlight=False, soft_wrap=True))


def carry_out(
    asked: Asked,
    stage: str | None,
    status: bool,
    planned: Callable[[RecipeConfig], Sequence[Run]] | None,
    make: Callable[..., Any],
    check_needs: Callable[..., None] | None = None,
    key: str = "parent",
) -> None:
    """Run the stages of a pipeline, or say how they stand.

    Args:
        stage: this one alone.
        status: say where each stands, and run none.
        planned: the runs of a dry run, which prints how they would be started and runs nothing; None is no dry run.
        make: the compression or the rounds, of recipe, console, origin and place.
        check_needs: of a compression: refuses stages that this machine cannot hold; see `compression/needs.py`.
        key: of the recipe's part, that names the checkpoint which is there before.
    """
    from nemotron_h.launch.place import check_shared

    place, console, origin = asked.place, asked.console, asked.origin
    if not status:
        place.check(asked.recipe, origin)
    recipe = place.moved(asked.recipe)
    if planned:
        from nemotron_h.launch.runs import dry_run

        for run in planned(recipe):
            console.print(dry_run(run, place), markup=False)
        return
    check_shared(place)
    if not status:
        from nemotron_h.export.hub_import import obtain

        obtain(getattr(getattr(recipe, recipe.stage), key), f"{origin}: {recipe.stage}.{key}")
    made = make(recipe, console, origin=origin, place=place)
    if status:
        console.print(_table(made.pipeline, stage), markup=False)
        return
    if check_needs:
        waiting = [title for title, state in made.pipeline.states().items() if state.word != "done"]
        check_needs(recipe, made.definition, [stage] if stage else waiting, made.parent.device, origin)
    made.pipeline.run(stage)


def _table(pipeline: Pipeline, stage: str | None) -> Any:
    """Return where each stage stands, as a table for a terminal.

    Args:
        stage: this one alone.
    Errors:
        UserError: there is no such stage.
    """
    if stage is not None:
        pipeline.stage(stage)
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("stage", "state", "seconds", "result"):
        table.add_column(heading, justify="right" if heading == "seconds" else "left")
    for title, state in pipeline.states().items():
        if stage in (None, title):
            seconds = f"{state.seconds:,.0f}" if state.seconds else ""
            table.add_row(title, state.word, seconds, state.result or state.why)
    return table
