"""`nemotron-h data retrieval`: documents that ask for what stands in them, to train on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemotron_h.cli.ruler import TextsOption


def retrieval(
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    tasks: Annotated[
        str, typer.Option(help="Of nemotron-h ruler, but qa_1 and qa_2; joined by commas.")
    ] = "needle,phonebook",
    count: Annotated[int, typer.Option(min=1, help="Documents of each task.")] = 10_000,
    length: Annotated[int, typer.Option(min=1, help="Tokens of the largest document.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="The same seed writes the same files.")] = 0,
    texts: TextsOption = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Folder of a prepared tokenizer.", show_default="a BPE of 512 tokens, trained on them"),
    ] = None,
) -> None:
    """Write long-context items of all sizes with their answers as documents to train on, and a blend of them.

    They are none of those that nemotron-h ruler asks for, whatever the seeds. --out gets train/TASK.jsonl, a tokenizer
    and the blend, retrieval.yaml. Example:

    nemotron-h data retrieval --tasks needle,phonebook --count 20000 --out runs/retrieval
    """
    from nemotron_h.core.errors import naming
    from nemotron_h.data.tokenizer import load_tokenizer
    from nemotron_h.evaluation.long_context.tasks import tasks_named
    from nemotron_h.evaluation.long_context.texts import Texts
    from nemotron_h.evaluation.long_context.training import write_folder

    known = None if tokenizer is None else load_tokenizer(tokenizer)
    with naming("--out"):
        files = write_folder(out, tasks_named(tasks), count, length, seed, Texts(texts, typer.echo), known)
    typer.echo("\n".join(map(str, files)))
