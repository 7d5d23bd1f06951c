"""`nemotron-h plan`: parameters, FLOPs, memory, schedule and cost of a recipe, in under a second and without torch."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer


def plan(
    name: Annotated[str, typer.Argument(help="A shipped recipe (nemotron-h recipe list), or the path of a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Values to change: parallel.tensor=4 recompute.ffn=layer.")
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(help="GPUs; the data-parallel size follows.", show_default="the recipe's")
    ] = None,
    gpu: Annotated[str, typer.Option(help="Which GPU; see configs/gpus.yaml.")] = "h100",
    mfu: Annotated[
        float | None, typer.Option(help="Utilisation of the peak, 0.4 is 40 %.", show_default="a published run's")
    ] = None,
    start: Annotated[datetime | None, typer.Option(help="Date of the first step; phases get dates.")] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens per sequence in inference.", show_default="as in training")
    ] = None,
    storage: Annotated[
        float | None, typer.Option(help="GB/s that a node writes to the checkpoints' disk.", show_default="1")
    ] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Tabulate layouts on these GPUs and mark the best.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write a picture of the memory: plan.png.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Say what a recipe needs before a GPU is touched: parameters, FLOPs, memory, schedule, cost, sizes."""
    from nemotron_h.planning.plan import make_plan
    from nemotron_h.recipe.compose import compose

    # how GPUs are spread over nodes changes nothing here
    ranks = [] if gpus is None else ["parallel.nodes=1", f"parallel.devices={gpus}"]
    made = make_plan(compose(name, [*(overrides or ()), *ranks], trains=False), gpu, mfu, start, context, storage)
    rows = made.sweep() if sweep else []
    if json_:
        import dataclasses
        import json

        from nemotron_h.planning.layouts import best

        chosen = best(rows)
        table = [{**dataclasses.asdict(row), "best": row is chosen} for row in rows]
        typer.echo(json.dumps({**made.as_dict(), **({"sweep": table} if sweep else {})}, indent=2))
    else:
        from rich.console import Console

        from nemotron_h.planning.show import show, show_sweep

        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = 140  # a pipe has no width of its own
        show_sweep(made, rows, console) if sweep else show(made, console)
    if out is not None:
        from nemotron_h.planning.figure import plot

        plot(made, out)
