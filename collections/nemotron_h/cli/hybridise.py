"""`nemotron-h hybridise`: a hybrid of a Transformer in rounds, stage by stage."""

from __future__ import annotations

from typing import Annotated

import typer


def hybridise(
    name: Annotated[
        str,
        typer.Argument(metavar="RECIPE", help="A shipped recipe (llama_tiny), or a YAML file."),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Values to change: hybridise.attention=[0.5,0.0] hybridise.parent=runs/NAME tokens=2M; "
            "executor=FILE.yaml submits the training runs."
        ),
    ] = None,
    stage: Annotated[
        str | None,
        typer.Option(
            help="Run this stage alone: mixers-1, distil-1, and so for each round, then-1, ..., generation, report."
        ),
    ] = None,
    status: Annotated[bool, typer.Option("--status", help="Say where each stage stands, and run none.")] = False,
    dryrun: Annotated[
        bool, typer.Option("--dryrun", help="Print how the training runs would be started, and run nothing.")
    ] = False,
) -> None:
    """Make a hybrid of a Transformer in rounds (Mamba in the Llama, arXiv 2408.15237; MOHAWK, arXiv 2408.10189).

    nemotron-h hybridise llama_tiny

    nemotron-h hybridise llama_tiny hybridise.start=random name=llama_tiny_control

    In each round fewer attention layers stay. The others become Mamba-2 layers that begin from their weights and train
    by themselves, parallel.devices layers at a time; then the model is distilled from the parent, first with its mixers
    alone, then as a whole. Recipes of fine-tuning and preference may follow (hybridise.then). Run it again and it
    continues where it was, as nemotron-h minipuzzle does. Everything lies in LOG.DIR/NAME; the result is
    report/report.html.
    """
    from functools import partial

    from nemotron_h.cli.compression import ask, carry_out
    from nemotron_h.compression.hybridise.hybridise import Hybridise
    from nemotron_h.compression.hybridise.needs import check
    from nemotron_h.compression.hybridise.rounds import planned
    from nemotron_h.recipe.stages.hybridise import following

    asked = ask("hybridise", name, overrides or ())
    if not status:
        for then in asked.recipe.hybridise.then:
            asked.place.check(following(then, asked.origin), f"{asked.origin}: hybridise.then: {then}")
    carry_out(asked, stage, status, partial(planned, place=asked.place) if dryrun else None, Hybridise, check)
