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
    from nemotron_h.cli.compression import ask, carry_out

    asked = ask("reason", name, overrides or ())
    from nemotron_h.reasoning.rounds import Rounds, planned

    carry_out(asked, stage, status, planned if dryrun else None, Rounds, key="start")
