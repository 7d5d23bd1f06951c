"""`nemotron-h vqa`: ask models questions about images whose answers are known."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemotron_h.cli.generate import DeviceOption, DtypeOption
from nemotron_h.core.errors import UserError


def vqa(
    runs: Annotated[list[Path], typer.Argument(help="Runs or checkpoints of models that read images.")],
    tests: Annotated[
        list[Path],
        typer.Option(
            "--test", metavar="FILE", help="Conversations with images (JSONL, `messages`); may be given several times."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; the same command continues there.")],
    count: Annotated[int | None, typer.Option(min=1, help="First questions of each file.", show_default="all")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Questions at a time.")] = 64,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
) -> None:
    """Ask questions about images, greedily, and score the answers: exact match and ANLS.

    Two controls tell what is seen from what is guessed: the same questions about other questions' images, and without
    any. --out gets vqa.csv, vqa.json, the answers, report.html, a page of pictures, questions and answers, and
    questions.svg, a dozen of them.

    nemotron-h vqa runs/vlm --test runs/pictures/test/digits.jsonl --out runs/vlm_answers

    nemotron-h vqa runs/vlm_projector runs/vlm --test mine.jsonl --count 200 --out runs/compared
    """
    from rich.console import Console

    from nemotron_h.evaluation.pictures.measure import ask, scores
    from nemotron_h.evaluation.pictures.questions import read_questions
    from nemotron_h.evaluation.pictures.report import table, write
    from nemotron_h.evaluation.subject import Subject, names_of
    from nemotron_h.inference.model import load_model
    from nemotron_h.inference.opening import Opened, dtype_and_device, torch_dtype
    from nemotron_h.inference.vision import image_definition

    if len({test.stem for test in tests}) < len(tests):
        raise UserError("--test: two files have one name", hint="rename one: tests are told apart by it")
    questions = [read_questions(test, count) for test in tests]
    dtype, device = dtype_and_device(dtype, device)
    subjects = [Subject.of(run, None) for run in runs]
    for subject in subjects:
        image_definition(subject.checkpoint)
    console, judged = Console(stderr=True, highlight=False), []
    for name, subject in zip(names_of(subjects), subjects, strict=True):
        options = {"dtype": torch_dtype(dtype), "device": device, "tokens": subject.tokenizer.vocab_size}
        model = load_model(subject.checkpoint, **options)
        opened = Opened(subject.checkpoint, subject.record, subject.tokenizer, model, dtype)
        judged += ask(name, opened, questions, batch, max_tokens, out / "answers", console)
    rows = scores(judged)
    files = write(rows, judged, out)
    Console(highlight=False, width=max(Console().width, 100)).print(table(rows))  # a file's is 80: too narrow
    typer.echo("\n".join(map(str, files)))
