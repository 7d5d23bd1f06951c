"""`nemotron-h puzzle`: compress a model layer by layer, stage by stage."""

from __future__ import annotations

from typing import Annotated

import typer


def puzzle(
    name: Annotated[
        str,
        typer.Argument(metavar="RECIPE", help="A shipped recipe (nemotron_h_tiny_heads), or a YAML file."),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Values to change: puzzle.costs.parameters=3M puzzle.parent=runs/NAME parallel.devices=2; "
            "executor=FILE.yaml submits the healing."
        ),
    ] = None,
    stage: Annotated[
        str | None,
        typer.Option(
            help="Run this stage alone: importance, library, score, costs, search, compare, refine, child, "
            "heal, report."
        ),
    ] = None,
    status: Annotated[bool, typer.Option("--status", help="Say where each stage stands, and run none.")] = False,
    dryrun: Annotated[
        bool, typer.Option("--dryrun", help="Print how the healing would be started, and run nothing.")
    ] = False,
) -> None:
    """Compress a parent by Puzzle (arXiv 2411.19146): every layer becomes the variant that a search chooses for it.

    Variants are trained to do what the layer does, parallel.devices layers at a time; each is scored in its layer's
    place; an integer program finds those with the smallest sum of scores within the limits of puzzle.costs; the child
    is distilled from its parent. Run it again and it continues where it was, as nemotron-h minipuzzle does. Everything
    lies in LOG.DIR/NAME; the result is report/report.html.
    """
    from nemotron_h.cli.compression import ask, carry_out
    from nemotron_h.compression.puzzle.needs import check
    from nemotron_h.compression.puzzle.pipeline.heal import planned
    from nemotron_h.compression.puzzle.puzzle import Puzzle

    carry_out(ask("puzzle", name, overrides or ()), stage, status, planned if dryrun else None, Puzzle, check)
