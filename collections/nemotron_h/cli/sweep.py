"""`nemotron-h sweep`: runs that differ in keys of a recipe, and what they come to."""

from __future__ import annotations

from typing import Annotated

import typer


def sweep(
    file: Annotated[
        str,
        typer.Argument(
            metavar="SWEEP",
            help="A sweep file (docs/sweeps.md), or one of recipes/sweeps, such as trio, phases, muon, width.",
        ),
    ],
    executor: Annotated[
        list[str] | None, typer.Argument(help="Where its runs go: executor=FILE.yaml submits them to Slurm.")
    ] = None,
    dryrun: Annotated[bool, typer.Option("--dryrun", help="Check all points, print them, and start nothing.")] = False,
) -> None:
    """Train a recipe over a grid or list of values, several runs at a time, and write table, figures and fits.

    All points are checked before the first starts. Stop it at any moment (ctrl-c and SIGTERM have the runs write a
    checkpoint, exit code 75) and start it again: finished points are not repeated, the others continue. Writes
    sweep.csv, figure-N.svg and report.html beside the runs, in DIR/NAME of the file.
    """
    from rich.console import Console

    from nemotron_h.core.errors import UserError
    from nemotron_h.launch.place import check_shared, place_of
    from nemotron_h.launch.runs import LEFT_EARLY
    from nemotron_h.sweep.command import Sweep
    from nemotron_h.sweep.file import locate, read_sweep

    place, rest = place_of(executor or ())
    if rest:
        raise UserError(f"{rest[0]}: a sweep takes its values from its file", hint="write them under `settings:`")
    console = Console(highlight=False, soft_wrap=True)
    swept = Sweep(read_sweep(locate(file)), place, console)
    if dryrun:
        for line in swept.planned():
            console.print(line, markup=False)
        return
    check_shared(place)
    try:
        swept.train()
    except (KeyboardInterrupt, SystemExit):
        console.print("stopped; the same command continues")
        raise typer.Exit(LEFT_EARLY) from None
    console.width = max(console.width, 140)  # the table's rows stay whole
    swept.write()
    if swept.failed:
        raise typer.Exit(1)
