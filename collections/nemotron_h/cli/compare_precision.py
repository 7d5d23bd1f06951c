"""`nemotron-h compare-precision`: train a pair that differs in precision alone, and plot the relative loss gap."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def compare_precision(
    name: Annotated[str, typer.Argument(help="A shipped recipe (nemotron-h recipe list), or the path of a YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Values to change in all runs: optim.warmup_tokens=40960. executor=FILE.yaml submits."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of each run; the learning rate's schedule ends there.")] = ...,
    precision: Annotated[
        str | None, typer.Option(help="What is compared.", show_default="the recipe's FP8, or fp8_current_scaling")
    ] = None,
    against: Annotated[str, typer.Option(help="The reference.")] = "bf16",
    seeds: Annotated[
        int, typer.Option(help="Initial weights that the reference is trained from; from 2 on they show the noise.")
    ] = 1,
    pairs: Annotated[
        int, typer.Option(help="Of those, from so many the FP8 run is trained too; several give a mean and its error.")
    ] = 1,
    jobs: Annotated[int, typer.Option(help="Runs at a time, where the machine has room for them.", min=1)] = 1,
    window: Annotated[
        int | None,
        typer.Option(help="Steps that training losses are averaged over.", show_default="a twentieth of the run"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of runs and results.", show_default="runs/NAME-precision")
    ] = None,
    dryrun: Annotated[bool, typer.Option("--dryrun", help="Print what would be started, and start nothing.")] = False,
) -> None:
    """Train a recipe twice, on the same batches from the same weights, and compare the losses (paper 2.3, figure 5).

    Each run has its folder under OUT; run the command again and a finished one is not repeated, a killed one
    continues. Writes gap.png, casts-RUN.png and comparison.json there.
    """
    import json

    from rich.console import Console

    from nemotron_h.comparison.results import results
    from nemotron_h.comparison.runs import comparison
    from nemotron_h.core.errors import UserError
    from nemotron_h.launch.place import check_shared, place_of
    from nemotron_h.launch.runs import dry_run
    from nemotron_h.launch.several import check_same, train_several

    place, values = place_of(overrides or ())
    made = comparison(name, steps, precision, against, seeds, out, values, pairs, place)
    window = max(1, steps // 20) if window is None else window
    if not 1 <= window <= steps:
        raise UserError(f"--window {window} is not between 1 and the {steps} steps of the run")
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, 110)  # the table's rows stay whole
    if dryrun:
        for run in made.runs:
            console.print(dry_run(run, place), markup=False)
        return
    check_shared(place)
    for run in made.runs:
        check_same(run, "choose another --out, or remove that folder")
    train_several([(run, made.steps) for run in made.runs], jobs, console, place=place)
    found = results(made, window)
    from nemotron_h.comparison.figure import plot_casts, plot_gap

    written = [made.out / "gap.png", made.out / "comparison.json"]
    plot_gap(found, written[0])
    written[1].write_text(json.dumps(found.as_dict(), indent=1))
    for run, casts in found.casts.items():
        written.append(made.out / f"casts-{run}.png")
        plot_casts(f"{made.recipe}, {run}", casts, written[-1])
    console.print(found.table())
    for line in [*found.missing_lines(), *found.cast_lines(), f"written: {', '.join(map(str, written))}"]:
        console.print(line, markup=False)
