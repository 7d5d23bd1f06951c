"""`nemotron-h data questions`: conversations about long documents, whose answers the documents tell."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemotron_h.core.errors import UserError
from nemotron_h.core.units import parse_count

if TYPE_CHECKING:
    from rich.console import Console

    from nemotron_h.evaluation.long_questions.folder import Summary


def long_questions(
    blend: Annotated[str, typer.Option("--blend", help="Blend of texts: a shipped one's name, or a YAML file.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    lengths: Annotated[
        str,
        typer.Option(help="Tokens of a conversation, joined by commas; with shares of all tokens: 32768:3,131072:1."),
    ] = "32768",
    tokens: Annotated[
        str | None, typer.Option(help="Most tokens of all conversations: 50M.", show_default="what the texts give")
    ] = None,
    questions: Annotated[int, typer.Option(min=4, help="Of a conversation; as many as fit into short ones.")] = 8,
    kinds: Annotated[
        str, typer.Option(help="where, next, fact, chain, count, order; joined by commas.")
    ] = "where,next,fact,chain,count,order",
    absent: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share of questions whose answer the documents do not have.")
    ] = 0.1,
    validation: Annotated[float, typer.Option(min=0, max=0.5, help="Share of documents that are held out.")] = 0.02,
    seed: Annotated[int, typer.Option(min=0, help="The same seed and texts write the same files.")] = 0,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Folder of a tokenizer, Hugging Face's too.", show_default="that of the prepared blend"),
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option(envvar="NEMOTRON_H_DATA", help="Where the blend is prepared.", show_default="./data"),
    ] = None,
) -> None:
    """Write conversations about documents joined to long contexts; the text alone tells whether an answer is right.

    Texts are read as `nemotron-h data prepare` reads them. --out gets questions.jsonl, questions.yaml, a blend of it
    for fine-tuning, and items.jsonl, the questions about held-out documents, which `nemotron-h ruler --items` asks and
    scores. Examples:

    nemotron-h data questions --blend books.yaml --lengths 32768:3,131072:1 --out runs/questions

    nemotron-h data questions --blend sample_small --lengths 4096 --kinds where,fact --absent 0.2 --out runs/questions

    nemotron-h ruler runs/sft --chat --items runs/questions/items.jsonl --out runs/questions_asked
    """
    from rich.console import Console

    from nemotron_h.core.errors import naming
    from nemotron_h.core.locks import locked
    from nemotron_h.data.blend import load_blend
    from nemotron_h.data.manifest import load_manifest
    from nemotron_h.data.tokenizer import load_tokenizer
    from nemotron_h.evaluation.long_questions.folder import lengths_of, write_folder
    from nemotron_h.evaluation.long_questions.kinds import kinds_named
    from nemotron_h.evaluation.long_questions.making import Plan
    from nemotron_h.evaluation.subject import Subject

    try:
        most = None if tokens is None else parse_count(tokens)
    except ValueError as error:
        raise UserError(f"--tokens: {error}") from error
    plan = Plan(lengths_of(lengths), questions, kinds_named(kinds), absent, validation, most, seed)
    texts = load_blend(blend)
    if tokenizer is None:
        known = load_tokenizer(load_manifest(root, texts.name).tokenizer_path())
    else:
        known = Subject.served(tokenizer).tokenizer
    with naming("--out"), locked(out, "written", "--out"):
        summary = write_folder(out, texts, known, plan, Console(stderr=True))
    show(summary, Console(highlight=False))
    typer.echo("\n".join(map(str, summary.files)))


def show(summary: Summary, screen: Console) -> None:
    """Print tables of contexts by length and questions by kind, to train on and held out, and what was left out."""
    from rich.table import Table

    for heading, rows in (
        ("tokens", [(f"{length:,}", summary.contexts, summary.tokens, length) for length in _first(summary.contexts)]),
        ("kind", [(kind, summary.asked, summary.lacking, kind) for kind in _first(summary.asked)]),
    ):
        table = Table(box=None, padding=(0, 2, 0, 0))
        names = ("contexts", "tokens") if heading == "tokens" else ("questions", "not answered")
        table.add_column(heading)
        for part in ("", ", held out"):
            for name in names:
                table.add_column(name + part, justify="right")
        for label, counts, others, key in rows:
            cells = [f"{each[key, part]:,}" for part in (False, True) for each in (counts, others)]
            table.add_row(label, *cells)
        screen.print(table)
    for reason, number in summary.skipped.items():
        if number:
            screen.print(f"left out: {number:,}: {reason}", markup=False)


def _first(counts: dict) -> list:
    """Return the first parts of keys, each once, in order."""
    return sorted({key[0] for key in counts})
