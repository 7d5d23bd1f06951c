"""`nemotron-h data pictures`: images with questions whose answers are known, to train and to test on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemotron_h.core.errors import UserError


def pictures(
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    kinds: Annotated[
        str, typer.Option(help="digits, numbers, words, signs, charts, emoji, joined by commas.")
    ] = "digits,words",
    count: Annotated[int, typer.Option(min=1, help="Pictures of each kind to train on.")] = 4_000,
    test_count: Annotated[int, typer.Option(min=1, help="Pictures of each test.")] = 200,
    size: Annotated[
        int, typer.Option(min=28, max=448, help="Pixels of the squares they are made of: best those of a tile.")
    ] = 28,
    seed: Annotated[int, typer.Option(min=0, help="The same seed writes the same files.")] = 0,
) -> None:
    """Write images, conversations about them to train on, tests of others, and a blend: pictures.yaml.

    digits and numbers are of MNIST, which is downloaded once with your own pip, checked and not installed; the test
    digits_others is of another collection. Of more digits than there are the further ones are turned, resized and
    moved a little. words and signs, short ones in capitals, are made up; their tests hold out words, and words and
    fonts. emoji, with their names, are drawn by fonts of Debian, which need apt-get; the test emoji_style has another
    drawing style. Then `nemotron-h data prepare --blend OUT/pictures.yaml`. Examples:

    nemotron-h data pictures --kinds digits,words --out runs/pictures

    nemotron-h data pictures --kinds numbers,charts --count 20000 --size 32 --seed 1 --out runs/pictures
    """
    from rich.console import Console

    from nemotron_h.core.errors import naming
    from nemotron_h.evaluation.pictures.folder import write_folder

    names = [name.strip() for name in kinds.split(",") if name.strip()]
    if not names or len({*names}) < len(names):
        raise UserError(f"--kinds {kinds[:80]!r} names none, or one twice")
    with naming("--out"):
        files = write_folder(out, names, count, test_count, size, seed, Console(stderr=True))
    typer.echo("\n".join(map(str, files)))
