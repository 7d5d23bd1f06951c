"""`nemotron-h report`: draw a run's report from its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder: runs/NAME. It may still be training.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the report.", show_default="the run's", metavar="DIR")
    ] = None,
) -> None:
    """Draw report.html and loss.svg of a run, as its end does: losses, rates, matmuls, versions, data, commands.

    Every run draws them when it ends or stops. Draw them again for a run that was killed, trains still, or is older.
    """
    from rich.console import Console

    from nemotron_h.report.page import write

    console = Console(highlight=False, soft_wrap=True)
    written = write(run, out)
    for note in written.notes:
        console.print(f"note: {note}", style="yellow", markup=False)
    console.print(f"report: {written.page}", markup=False)
    if written.picture:
        console.print(f"loss:   {written.picture}", markup=False)
