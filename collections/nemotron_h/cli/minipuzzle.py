"""`nemotron-h minipuzzle`: compress a model, stage by stage."""

from __future__ import annotations

from typing import Annotated

import typer


def minipuzzle(
    name: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A shipped recipe (nemotron_h_tiny), or the path of a YAML file.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Values to change: minipuzzle.budget.parameters=9M tokens=2M minipuzzle.parent=runs/NAME; "
            "executor=FILE.yaml submits the distillations."
        ),
    ] = None,
    stage: Annotated[
        str | None,
        typer.Option(help="Run this stage alone: importance, candidates, score, short-distil, select, distil, export."),
    ] = None,
    status: Annotated[bool, typer.Option("--status", help="Say where each stage stands, and run none.")] = False,
    allow_evaluate: Annotated[
        bool, typer.Option("--allow-evaluate", help="Run the command that the recipe names in minipuzzle.evaluate.")
    ] = False,
    dryrun: Annotated[
        bool, typer.Option("--dryrun", help="Print how the distillations would be started, and run nothing.")
    ] = False,
) -> None:
    """Compress a parent by pruning and distillation (paper 3): seven stages, one command.

    Run it again and it continues: a finished stage is skipped, an interrupted one goes on where it was, and a changed
    input (checkpoint, text, key of the recipe) runs again what depends on it. Everything lies in LOG.DIR/NAME; the
    result is export/report.html.
    """
    from rich.console import Console
    from rich.table import Table

    from nemotron_h.core.errors import UserError
    from nemotron_h.launch.place import check_shared, place_of
    from nemotron_h.recipe.compose import compose, known_recipes, locate

    full = f"{name}/minipuzzle"
    place, values = place_of(overrides or ())
    recipe = compose(full if full in known_recipes() else name, values)
    if recipe.stage != "minipuzzle":
        known = ", ".join(known for known in known_recipes() if compose(known).stage == "minipuzzle")
        raise UserError(f"{name} is a recipe of stage {recipe.stage}", hint=f"recipes of this stage: {known}")
    origin, console = locate(full if full in known_recipes() else name)[2], Console(highlight=False, soft_wrap=True)
    typed = any(override.startswith("minipuzzle.evaluate=") for override in overrides or ())
    if recipe.minipuzzle.evaluate and not (allow_evaluate or typed or status or dryrun):
        raise UserError(
            f"{name}: minipuzzle.evaluate is a command, which would run as your user: {recipe.minipuzzle.evaluate}",
            hint="read it, then add --allow-evaluate; or leave it out: minipuzzle.evaluate=null",
        )
    if not status:
        place.check(recipe, origin)
    recipe = place.moved(recipe)
    if dryrun:
        from nemotron_h.compression.distillations import planned
        from nemotron_h.launch.runs import dry_run

        for run in planned(recipe):
            console.print(dry_run(run, place), markup=False)
        return
    check_shared(place)
    from nemotron_h.compression.minipuzzle import MiniPuzzle
    from nemotron_h.compression.needs import check

    if not status:
        from nemotron_h.export.hub_import import obtain

        obtain(recipe.minipuzzle.parent, f"{origin}: minipuzzle.parent")
    made = MiniPuzzle(recipe, console, origin=origin, place=place)
    if not status:
        waiting = [title for title, state in made.pipeline.states().items() if state.word != "done"]
        check(recipe, made.definition, [stage] if stage else waiting, made.parent.device, origin)
        made.pipeline.run(stage)
        return
    if stage is not None:
        made.pipeline.stage(stage)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("stage", "state", "seconds", "result"):
        table.add_column(heading, justify="right" if heading == "seconds" else "left")
    for title, state in made.pipeline.states().items():
        if stage in (None, title):
            seconds = f"{state.seconds:,.0f}" if state.seconds else ""
            table.add_row(title, state.word, seconds, state.result or state.why)
    console.print(table, markup=False)
