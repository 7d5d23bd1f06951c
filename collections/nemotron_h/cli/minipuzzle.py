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
    from nemotron_h.cli.compression import ask, carry_out
    from nemotron_h.core.errors import UserError

    asked = ask("minipuzzle", name, overrides or ())
    evaluate = asked.recipe.minipuzzle.evaluate
    typed = any(override.startswith("minipuzzle.evaluate=") for override in overrides or ())
    if evaluate and not (allow_evaluate or typed or status or dryrun):
        raise UserError(
            f"{name}: minipuzzle.evaluate is a command, which would run as your user: {evaluate}",
            hint="read it, then add --allow-evaluate; or leave it out: minipuzzle.evaluate=null",
        )
    from nemotron_h.compression.distillations import planned
    from nemotron_h.compression.minipuzzle import MiniPuzzle
    from nemotron_h.compression.needs import check

    carry_out(asked, stage, status, planned if dryrun else None, MiniPuzzle, check)
