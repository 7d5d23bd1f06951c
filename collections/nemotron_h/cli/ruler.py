"""`nemotron-h ruler`: what models find, track and count in long texts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from nemotron_h.cli.generate import DeviceOption, DtypeOption
from nemotron_h.core.errors import UserError

if TYPE_CHECKING:
    from nemotron_h.evaluation.long_context.item import Item
    from nemotron_h.evaluation.long_context.make import ItemSettings
    from nemotron_h.evaluation.long_context.results import Answered

TextsOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder with texts of your own: essays.txt, squad.json, hotpotqa.json, adjectives.txt, nouns.txt, "
        "verbs.txt. What it lacks is read out of packages."
    ),
]


def ruler(
    runs: Annotated[
        list[Path] | None, typer.Argument(metavar="[RUN]...", help="Checkpoints, or runs: their newest checkpoints.")
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Tokens of prompt and answer, joined by commas: 4096,8192,16384.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="ruler (all 13 of RULER), niah_single_1 to _3, niah_multikey_1 to _3, niah_multivalue, "
            "niah_multiquery, vt, cwe, fwe, qa_1, qa_2; needle and phonebook, by depth; joined by commas.",
            show_default="ruler",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Items of each task and length; RULER has 500.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Of the items.")] = 42,
    texts: TextsOption = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask in the chat template that came with each checkpoint.")
    ] = False,
    export: Annotated[Path | None, typer.Option(help="Write the items to this file, and run no model.")] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Of an --export without a run: the folder whose tokens are counted, Hugging Face's too."),
    ] = None,
    items: Annotated[Path | None, typer.Option(help="File of an earlier --export, in place of new items.")] = None,
    answers: Annotated[
        Path | None, typer.Option(help="Score this file, in which another engine answered --items, and run no model.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences at once.", show_default="what half of the free memory holds")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of items, answers, tables, figures and page.")] = Path("runs/ruler"),
    dtype: DtypeOption = None,
    device: DeviceOption = None,
) -> None:
    """Measure models on RULER's 13 long-context tasks, and on needles and phonebooks by depth of the answer.

    Models run in this project's engine, greedily. Answers are kept in --out: the same command continues after a stop,
    and other tasks, lengths or more samples run what is new. Another engine continues each `input` of an --export by at
    most `max_tokens` tokens, and its file has a line of `key` and `answer` for each. Examples:

    nemotron-h ruler runs/hybrid runs/mamba2 --lengths 4096,8192,16384

    nemotron-h ruler runs/hybrid --tasks needle,phonebook --lengths 512,1024 --samples 50 --out runs/depths

    nemotron-h ruler --tokenizer DIR --lengths 4096 --export items.jsonl

    nemotron-h ruler --items items.jsonl --answers answers.jsonl --out runs/endpoint
    """
    chosen = {"--lengths": lengths, "--tasks": tasks, "--texts": texts, "--export": export}
    if items is not None and (named := [option for option, value in chosen.items() if value is not None]):
        raise UserError(f"{named[0]} is for new items, and --items names a file of some", hint="leave one of them out")
    if tokenizer is not None and (export is None or runs):
        raise UserError("--tokenizer is for an --export without a run", hint="a run has its own: leave it out")
    if answers is not None and (items is None or runs):
        raise UserError("--answers needs --items, and no run", hint="name the file of the items that were answered")
    if answers is None and export is None and not runs:
        raise UserError("there is no run to measure", hint="name runs or checkpoints, or --export, or --answers")

    from nemotron_h.evaluation.long_context.item import read_items
    from nemotron_h.evaluation.long_context.make import ItemSettings

    if items is not None:
        source: list[Item] | ItemSettings = read_items(items)
    else:
        source = ItemSettings.of(tasks or "ruler", lengths, samples, seed, texts)
    if export is not None:
        _export(export, source, runs or [], tokenizer, chat)
    elif answers is not None:
        _score(source, answers, out)
    else:
        _measure(source, runs, chat, batch, dtype, device, out)


def _console() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True)


def _export(file: Path, source: ItemSettings, runs: list[Path], tokenizer: Path | None, chat: bool) -> None:
    """Write items whose lengths are in the tokens of a run or a tokenizer."""
    from nemotron_h.data.tokenizer import META_FILE, load_tokenizer
    from nemotron_h.evaluation.long_context.answers import answerers
    from nemotron_h.evaluation.long_context.make import write_items

    if len(runs) + (tokenizer is not None) != 1:
        raise UserError("--export counts the tokens of one tokenizer", hint="name one run, or --tokenizer DIR")
    if runs:
        count = answerers(runs, chat)[0].count
    else:
        text = load_tokenizer(tokenizer, None if (tokenizer / META_FILE).exists() else "huggingface")

        def count(prompt: str, prefix: str) -> int:
            return len(text.text_to_ids(prompt + prefix))

    items = source.items(count, _console())
    write_items(file, items)
    typer.echo(f"wrote {len(items):,} items to {file}")


def _score(items: list[Item], answers: Path, out: Path) -> None:
    """Score the answers of another engine."""
    from nemotron_h.core.locks import locked
    from nemotron_h.evaluation.long_context.answers import read_answers
    from nemotron_h.evaluation.long_context.results import Answered

    answered = {answers.stem: Answered(items, read_answers(answers, items))}
    with locked(out, "written", "--out"):
        _report(answered, {"answers": str(answers)}, f"answers of {answers.name}", out)


def _measure(
    source: list[Item] | ItemSettings,
    runs: list[Path],
    chat: bool,
    batch: int | None,
    dtype: str | None,
    device: str | None,
    out: Path,
) -> None:
    """Have models answer, and score them."""
    from nemotron_h.core.locks import locked
    from nemotron_h.evaluation.long_context.answers import answered, answerers
    from nemotron_h.evaluation.long_context.make import write_items
    from nemotron_h.evaluation.long_context.results import Answered
    from nemotron_h.inference.opening import dtype_and_device

    dtype, device = dtype_and_device(dtype, device)
    models, console = answerers(runs, chat), _console()
    with locked(out, "written", "--out"):
        asked: dict[tuple[str, str], list[Item]] = {}  # models that read the same tokens share their items
        for model in models:
            if model.way not in asked:
                asked[model.way] = source if isinstance(source, list) else source.items(model.count, console)
                write_items(out / "items" / f"{model.name}.jsonl", asked[model.way])
            model.check(asked[model.way])
        found = {}
        for model in models:
            kept = answered(model, asked[model.way], batch, dtype, device, out / "answers", console)
            found[model.name] = Answered(asked[model.way], {each.key: each.answer for each in kept.records})
        words = f"{'chat template' if chat else 'plain text'}, greedy; {dtype} on {device}"
        _report(found, {"dtype": dtype, "device": device, "chat": chat}, words, out)


def _report(answered: dict[str, Answered], settings: dict[str, Any], words: str, out: Path) -> None:
    from nemotron_h.evaluation.long_context import report
    from nemotron_h.evaluation.long_context.results import results_of

    results = results_of(answered)
    files = report.write(results, settings, words, out)
    screen = Console(highlight=False)
    screen.width = max(screen.width, 140)  # rows stay whole
    screen.print(report.table(results))
    for remark in report.remarks(results):
        screen.print(remark, markup=False)
    typer.echo(f"wrote {', '.join(map(str, files))}")
