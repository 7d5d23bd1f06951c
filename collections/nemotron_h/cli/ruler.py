"""`nemotron-h ruler`: what models find, track and count in long texts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from nemotron_h.cli.generate import DeviceOption, DtypeOption
from nemotron_h.core.errors import UserError

if TYPE_CHECKING:
    from nemotron_h.evaluation.continuing import Engine
    from nemotron_h.evaluation.long_context.answers import Answerer
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
        typer.Option(help="Of an --export or --endpoint without a run: folder of the tokenizer, Hugging Face's too."),
    ] = None,
    items: Annotated[Path | None, typer.Option(help="File of an earlier --export, in place of new items.")] = None,
    answers: Annotated[
        Path | None, typer.Option(help="Score this file, in which another engine answered --items, and run no model.")
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(help="Address of an OpenAI-compatible server that answers: http://HOST:PORT/v1.", metavar="URL"),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Its model, as the server names it.", metavar="NAME")] = None,
    at_once: Annotated[int, typer.Option(min=1, help="Requests to it at a time.")] = 8,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences at once.", show_default="what half of the free memory holds")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of items, answers, tables, figures and page.")] = Path("runs/ruler"),
    dtype: DtypeOption = None,
    device: DeviceOption = None,
) -> None:
    """Measure models on RULER's 13 long-context tasks, and on needles and phonebooks by depth of the answer.

    Models run in this project's engine, greedily, or behind an --endpoint, which is sent the same tokens. Answers are
    kept in --out: the same command continues after a stop, and other tasks, lengths or more samples run what is new.
    Another engine continues each `input` of an --export by at most `max_tokens` tokens, and its file has a line of
    `key` and `answer` for each. Examples:

    nemotron-h ruler runs/hybrid runs/mamba2 --lengths 4096,8192,16384

    nemotron-h ruler runs/hybrid --tasks needle,phonebook --lengths 512,1024 --samples 50 --out runs/depths

    nemotron-h ruler --tokenizer DIR --lengths 4096 --export items.jsonl

    nemotron-h ruler --items items.jsonl --answers answers.jsonl --out runs/elsewhere

    nemotron-h ruler --endpoint http://localhost:8000/v1 --model NAME --tokenizer DIR --chat --lengths 4096,32768
    """
    chosen = {"--lengths": lengths, "--tasks": tasks, "--texts": texts, "--export": export}
    if items is not None and (named := [option for option, value in chosen.items() if value is not None]):
        raise UserError(f"{named[0]} is for new items, and --items names a file of some", hint="leave one of them out")
    if tokenizer is not None and ((export is None and endpoint is None) or runs):
        raise UserError(
            "--tokenizer is for an --export or --endpoint without a run", hint="a run has its own: leave it out"
        )
    if answers is not None and (items is None or runs):
        raise UserError("--answers needs --items, and no run", hint="name the file of the items that were answered")
    _check_endpoint(
        endpoint,
        model,
        {"--export": export, "--answers": answers, "--dtype": dtype, "--device": device, "--batch": batch},
        len(runs or []) + (tokenizer is not None),
    )
    if answers is None and export is None and endpoint is None and not runs:
        raise UserError(
            "there is no run to measure", hint="name runs or checkpoints, or --endpoint, --export, or --answers"
        )

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
    elif endpoint is not None:
        _ask(source, runs[0] if runs else None, tokenizer, chat, (endpoint, model, at_once), out)
    else:
        _measure(source, runs, chat, batch, dtype, device, out)


def _console() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True)


def _export(file: Path, source: ItemSettings, runs: list[Path], tokenizer: Path | None, chat: bool) -> None:
    """Write items whose lengths are in the tokens of a run or a tokenizer."""
    from nemotron_h.evaluation.long_context.answers import Answerer
    from nemotron_h.evaluation.long_context.make import write_items
    from nemotron_h.evaluation.subject import Subject

    if len(runs) + (tokenizer is not None) != 1:
        raise UserError("--export counts the tokens of one tokenizer", hint="name one run, or --tokenizer DIR")
    subject = Subject.of(runs[0], None) if tokenizer is None else Subject.served(tokenizer)
    items = source.items(Answerer("", subject, chat).count, _console())
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


def _check_endpoint(endpoint: str | None, model: str | None, others: dict[str, object], tokenizers: int) -> None:
    """Refuse options that do not go with an endpoint, or need one."""
    if endpoint is None:
        if model is not None:
            raise UserError("--model names a model of an --endpoint", hint="name runs or checkpoints to measure these")
        return
    if given := [option for option, value in others.items() if value is not None]:
        raise UserError(f"{given[0]} does not go with --endpoint", hint="leave one of them out")
    if model is None:
        raise UserError("--endpoint needs --model NAME", hint="URL/models lists what the server has")
    if tokenizers != 1:
        raise UserError(
            "--endpoint needs the tokenizer of the served model",
            hint="name its folder, --tokenizer DIR, or one run that has it",
        )


def _ask(
    source: list[Item] | ItemSettings,
    run: Path | None,
    tokenizer: Path | None,
    chat: bool,
    served: tuple[str, str, int],
    out: Path,
) -> None:
    """Have the model of an endpoint answer, and score it.

    Args:
        run, tokenizer: which of them has the tokenizer.
        served: address, name and requests at a time.
    """
    from nemotron_h.core.locks import locked
    from nemotron_h.evaluation.endpoint import Endpoint
    from nemotron_h.evaluation.long_context.answers import Answerer
    from nemotron_h.evaluation.subject import Subject

    engine = Endpoint(*served)
    engine.check()
    subject = Subject.of(run, None) if tokenizer is None else Subject.served(tokenizer)
    with locked(out, "written", "--out"):
        words = f"greedy; {engine.model} of {engine.url}"
        _answer(source, [Answerer(engine.name, subject, chat)], engine, words, out)


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
    from nemotron_h.evaluation.continuing import LocalEngine
    from nemotron_h.evaluation.long_context.answers import answerers
    from nemotron_h.inference.opening import dtype_and_device

    dtype, device = dtype_and_device(dtype, device)
    models, engine = answerers(runs, chat), LocalEngine(batch, dtype, device)
    with locked(out, "written", "--out"):
        _answer(source, models, engine, f"greedy; {dtype} on {device}", out)


def _answer(
    source: list[Item] | ItemSettings,
    models: list[Answerer],
    engine: Engine,
    words: str,
    out: Path,
) -> None:
    """Have models answer in an engine, and score them; those that read the same tokens share their items."""
    from nemotron_h.evaluation.long_context.answers import answered
    from nemotron_h.evaluation.long_context.make import write_items
    from nemotron_h.evaluation.long_context.results import Answered

    asked: dict[tuple[str, str], list[Item]] = {}
    for model in models:
        if model.way not in asked:
            asked[model.way] = source if isinstance(source, list) else source.items(model.count, _console())
            write_items(out / "items" / f"{model.name}.jsonl", asked[model.way])
        model.check(asked[model.way])
    found = {}
    for model in models:
        kept = answered(model, asked[model.way], engine, out / "answers", _console())
        found[model.name] = Answered(asked[model.way], {each.key: each.answer for each in kept.records})
    way = "chat template" if models[0].chat else "plain text"
    _report(found, {**engine.told, "chat": models[0].chat}, f"{way}, {words}", out)


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
