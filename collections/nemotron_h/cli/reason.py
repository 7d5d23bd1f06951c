"""`nemotron-h reason`: rounds of preference training on a model's own solutions."""

from __future__ import annotations

from typing import Annotated

import typer


def reason(
    name: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A shipped recipe (nemotron_h_tiny), or the path of a YAML file.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Values to change: reason.start=runs/NAME reason.rounds=3 tokens=200_000; executor=FILE.yaml submits "
            "the trainings."
        ),
    ] = None,
    stage: Annotated[
        str | None, typer.Option(help="Run this stage alone: measure-0, sample-1, pairs-1, train-1, measure-1, report.")
    ] = None,
    status: Annotated[bool, typer.Option("--status", help="Say where each stage stands, and run none.")] = False,
    dryrun: Annotated[
        bool, typer.Option("--dryrun", help="Print how the first training would be started, and run nothing.")
    ] = False,
) -> None:
    """Sample solutions of problems, train on pairs of right and wrong ones, measure, and do it again.

    Run it again and it continues: a finished stage is skipped, an interrupted one goes on where it was, and a changed
    input runs again what depends on it. Rounds end where no problem has right and wrong solutions. Everything lies in
    LOG.DIR/NAME; the result is report/report.html. Examples:

    nemotron-h reason nemotron_h_tiny

    nemotron-h reason mine.yaml reason.rounds=3 preference.loss=rpo_bwd_kl --status
    """
    from nemotron_h.cli.compression import ask, status_table
    from nemotron_h.launch.place import check_shared

    asked = ask("reason", name, overrides or ())
    place, console, origin = asked.place, asked.console, asked.origin
    if not status:
        place.check(asked.recipe, origin)
    recipe = place.moved(asked.recipe)
    from nemotron_h.reasoning.rounds import Rounds, planned

    if dryrun:
        from nemotron_h.launch.runs import dry_run

        for run in planned(recipe):
            console.print(dry_run(run, place), markup=False)
        return
    check_shared(place)
    if not status:
        from nemotron_h.export.hub_import import obtain

        obtain(recipe.reason.start, f"{origin}: reason.start")
    made = Rounds(recipe, console, origin=origin, place=place)
    if status:
        console.print(status_table(made.pipeline, stage), markup=False)
    else:
        made.pipeline.run(stage)
