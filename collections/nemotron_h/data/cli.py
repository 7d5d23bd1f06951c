"""`nemotron-h data ...`: prepare and verify blends."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nemotron_h.data.blend import load_blend

app = typer.Typer(no_args_is_help=True, help="Prepare and verify data blends.", rich_markup_mode=None)

BlendOption = Annotated[
    str, typer.Option("--blend", help="Name of a shipped blend (sample_small, sample, nemotron_h) or a YAML file.")
]
RootOption = Annotated[
    Path | None,
    typer.Option("--root", envvar="NEMOTRON_H_DATA", help="Where prepared data lives.", show_default="./data"),
]


@app.command()
def prepare(
    blend: BlendOption,
    root: RootOption = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes.", show_default="all cores")] = None,
    force: Annotated[bool, typer.Option("--force", help="Rebuild everything, the tokenizer included.")] = False,
) -> None:
    """Fetch, tokenise and index a blend. Run it again at any time: it continues, or does nothing when all is up to
    date.
    """
    from nemotron_h.data.prepare import prepare as run

    run(load_blend(blend), root, workers=workers, force=force, console=Console())


@app.command()
def verify(blend: BlendOption, root: RootOption = None) -> None:
    """Compare prepared data with its manifest: counts, hashes, structure, and a decoded sample of every source."""
    from nemotron_h.data.verify import verify as run

    run(load_blend(blend), root, console=Console())
