"""`nemotron-h incidents`: how the processes of a run ended, and what share of their time was training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def show_incidents(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder: runs/NAME. It may still be training.")],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object, with all that is known.")] = False,
) -> None:
    """Show when and why each process of a run ended, spikes, skipped steps, transient faults, restarts, slow ranks,
    the time lost, and goodput.

    Goodput is the share of the wall time, restarts included, that was training of steps that count: not trained again
    after a restart. Failures are ends other than `finished` and `preemption`. Exit code 0, whatever happened to the
    run.
    """
    from nemotron_h.core.errors import UserError
    from nemotron_h.core.incidents import INCIDENTS
    from nemotron_h.report.incidents import as_json, processes, summary, table, words
    from nemotron_h.report.ranks import read_ranks
    from nemotron_h.report.ranks import words as words_of_ranks

    of = processes(run)
    if not of:
        raise UserError(
            f"{run / INCIDENTS} has no incidents: no run, or of an earlier version", "name a run's folder: runs/NAME"
        )
    if json:
        print(as_json(of))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    shown = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("when", "step", "kind", "evidence", "time lost"):
        right = name in ("step", "time lost")
        shown.add_column(name, justify="right" if right else "left", no_wrap=name != "evidence", overflow="fold")
    for row in table(of):
        shown.add_row(*map(Text, row))  # text: messages have brackets
    console.print(shown)
    console.print()
    times = read_ranks(run)
    ranks = [("ranks", words_of_ranks(times))] if times else []
    for name, value in [*words(summary(of)), *ranks]:
        console.print(f"{name:>9}  {value}", markup=False, soft_wrap=True)
