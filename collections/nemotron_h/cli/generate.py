"""`nemotron-h generate`: continue prompts with a checkpoint."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.text import Text

from nemotron_h.core.errors import UserError
from nemotron_h.core.files import check_unicode, decode, parse_json
from nemotron_h.inference.opening import open_checkpoint

if TYPE_CHECKING:
    from nemotron_h.inference.drafts import Draft
    from nemotron_h.inference.opening import Opened
    from nemotron_h.inference.sampling import Sampling
    from nemotron_h.inference.text import StoppingText
    from nemotron_h.inference.thought import Thought, ThoughtBudget
    from nemotron_h.inference.vision import Placed

CheckpointArgument = Annotated[
    Path, typer.Argument(help="A checkpoint (runs/NAME/checkpoints/step-000100), or a run: its newest checkpoint.")
]
TemperatureOption = Annotated[float, typer.Option(min=0.0, help="0 always takes the most probable token.")]
TopKOption = Annotated[int, typer.Option(min=0, help="Sample from the k most probable tokens; 0: from all.")]
TopPOption = Annotated[float, typer.Option(help="Sample from the most probable tokens that sum to this share.")]
TokenizerOption = Annotated[
    Path | None, typer.Option(help="Folder of the tokenizer.", show_default="the one that the run was trained with")
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        help="float32 or bfloat16, of weights and activations; float8: the layers' matrices in FP8, all else in "
        "bfloat16, on the CPU emulated.",
        show_default="bfloat16 on a GPU, else float32",
    ),
]
DraftOption = Annotated[
    str | None,
    typer.Option(
        metavar="RUN|lookup|layers:N",
        help="Draft tokens, to read several in a pass: with a smaller model of the same tokenizer, copies from the "
        "text so far, or the model's own first N layers. What is written keeps its distribution.",
        show_default="none",
    ),
]
DraftTokensOption = Annotated[
    int | None, typer.Option(min=1, max=16, help="Drafted tokens per pass.", show_default="4, with --draft")
]
ThoughtBudgetOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="N",
        help="End a thought (<think>) after N tokens: at the next end of a line, within the line where none comes for "
        "500 more.",
        show_default="none",
    ),
]
ThinkingOption = Annotated[
    str | None,
    typer.Option(
        metavar="on|off", help="Ask for a thought before each answer, or for none.", show_default="not asked for"
    ),
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="cuda where a GPU is visible")]

notes = Console(stderr=True, soft_wrap=True, highlight=False)


def note(text: str) -> None:
    """Print a remark on the standard error; it may hold names of files, so nothing in it is markup."""
    notes.print(Text(text, style="dim"))


def warn(word: str, text: str) -> None:
    """Print a warning that begins with a word in yellow, as `note` prints."""
    notes.print(Text.assemble((f"{word}:", "yellow"), " ", text))


def generate(
    checkpoint: CheckpointArgument,
    prompt: Annotated[list[str] | None, typer.Argument(help="Texts to continue; several go as one batch.")] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Ask each prompt, in the chat template of the run, about this image; may be given several times.",
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="More prompts: a line each, or .jsonl with a field `prompt`; - is the standard input."
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest continuation.")] = 128,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End before this text; may be given several times.")
    ] = None,
    temperature: TemperatureOption = 0.8,
    top_k: TopKOption = 0,
    top_p: TopPOption = 0.95,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text; prompt n of several has seed + n.")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a line of JSON per prompt: prompt, text, tokens, ended_by.")
    ] = False,
    batch: Annotated[
        int, typer.Option(min=1, help="Most prompts at a time; those that wait take the places of those that end.")
    ] = 64,
    thought_budget: ThoughtBudgetOption = None,
    draft: DraftOption = None,
    draft_tokens: DraftTokensOption = None,
    tokenizer: TokenizerOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
) -> None:
    """Continue prompts. Text goes to the standard output, the speed to the standard error.

    The text of a single prompt is shown as it comes; those of several follow each other once they are complete.

    nemotron-h generate runs/nemotron_h_tiny "The capital of" --temperature 0

    nemotron-h generate runs/large "Once" --draft runs/small --draft-tokens 3

    nemotron-h generate runs/nemotron_h_tiny_vlm "Which digit is it?" --image digit.png --temperature 0

    nemotron-h generate runs/reasoning "Question: What is 3 * 4?" --thought-budget 200 --max-tokens 400
    """
    texts = [check_unicode(text, f"prompt {number}") for number, text in enumerate(prompt or [], 1)]
    texts += read_prompts(prompts) if prompts is not None else []
    if not texts:
        raise UserError("there is nothing to continue", hint='give a prompt ("" begins a document), or --prompts FILE')
    stops = [check_unicode(text, "--stop") for text in stop or []]
    if "" in stops:
        raise UserError("--stop is empty", hint="name the text before which a continuation is to end")
    from nemotron_h.inference.sampling import Sampling
    from nemotron_h.inference.thought import ThoughtBudget

    if image:
        _check_images(image, checkpoint)
    sampling = Sampling(temperature, top_k, top_p, seed)
    opened = open_checkpoint(checkpoint, tokenizer, dtype, device, draft, draft_tokens)
    read = _read_questions(opened, texts, image) if image else _read_texts(opened, texts)
    streaming = len(texts) == 1 and not as_json
    total = _Speed(opened.draft)
    thoughts = None if thought_budget is None else ThoughtBudget(opened.tokenizer, thought_budget)
    if streaming or draft:
        parts = (slice(begin, begin + batch) for begin in range(0, len(texts), batch))
        rows = itertools.chain.from_iterable(
            _continue(
                opened,
                texts[part],
                _Read(read.ids[part], read.images[part], read.stop_ids),
                dataclasses.replace(sampling, seed=seed + part.start),
                max_tokens,
                stops,
                thoughts,
                streaming,
                total,
            )
            for part in parts
        )
    else:
        rows = _continue_all(opened, texts, read, sampling, max_tokens, stops, thoughts, batch, total)
    for number, row in enumerate(rows, 1):
        if as_json:
            typer.echo(json.dumps(row, ensure_ascii=False))
        elif not streaming:
            typer.echo(f"[{number}] {row['prompt']}{' ' * bool(image)}{row['text']}\n")
        else:
            total.ended_by = f", ended by {row['ended_by']}"
    note(f"{total}; {opened}")


class _Read(NamedTuple):
    """Prompts as a model reads them: their tokens, image tokens of each, and what ends a continuation."""

    ids: list[list[int]]
    images: list[Placed | None]
    stop_ids: list[int]


def _read_texts(opened: Opened, texts: Sequence[str]) -> _Read:
    """Return texts to continue."""
    eod = opened.tokenizer.eod_id
    # nothing to continue: begin a document, as the token that ends the one before it does
    return _Read([ids or [eod] for ids in opened.tokenizer.encode_batch(list(texts))], [None] * len(texts), [eod])


def _check_images(files: Sequence[Path], checkpoint: Path) -> None:
    """Refuse image files that cannot be read, and a checkpoint of a model that reads text alone, before any weight is
    read.
    """
    from nemotron_h.checkpoint.reader import find_checkpoint
    from nemotron_h.data.images.read import ImageError, read_bytes, read_image
    from nemotron_h.inference.vision import image_definition

    image_definition(find_checkpoint(checkpoint))
    for file in files:
        try:
            read_image(read_bytes(str(file)))
        except ImageError as error:
            raise UserError(f"--image {file}: {error}", hint="docs/images.md tells what can be read") from error


def _read_questions(opened: Opened, texts: Sequence[str], images: Sequence[Path]) -> _Read:
    """Return questions about images."""
    from nemotron_h.data.images.records import asked
    from nemotron_h.inference.looking import Looking

    looking, files = Looking(opened), [str(file) for file in images]
    questions = [looking.read((asked(text, files),)) for text in texts]
    return _Read([each.ids for each in questions], [each.placed for each in questions], looking.stop_ids)


class _Speed:
    """Counts and times over all batches."""

    def __init__(self, draft: Draft | None) -> None:
        from nemotron_h.inference.drafts import Acceptance

        self.draft, self.acceptance = draft, Acceptance()
        self.read = self.written = self.stepped = 0
        self.read_seconds = self.step_seconds = 0.0
        self.ended_by = ""
        self.thoughts: list[Thought] = []

    def __str__(self) -> str:
        steps = f"{self.stepped / self.step_seconds:,.0f} tokens/s" if self.stepped else "no steps"
        return (
            f"{self.read:,} tokens read in {self.read_seconds:.2f} s, {self.written:,} generated at {steps}"
            f"{f', {self.acceptance}' if self.draft else ''}{self._cut()}{self.ended_by}"
        )

    def _cut(self) -> str:
        cut = sum(thought.cut for thought in self.thoughts)
        return f", {cut:,} of {len(self.thoughts):,} thoughts ended at the budget" if self.thoughts else ""


def _continue(
    opened: Opened,
    texts: Sequence[str],
    read: _Read,
    sampling: Sampling,
    max_tokens: int,
    stops: Sequence[str],
    budget: ThoughtBudget | None,
    streaming: bool,
    total: _Speed,
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one batch in the order of the prompts, each as soon as it and those before it are complete."""
    from nemotron_h.inference.generate import Generation
    from nemotron_h.inference.text import StoppingText

    ids, eod = read.ids, opened.tokenizer.eod_id
    options = {"max_tokens": max_tokens, "sampling": sampling, "stop_ids": read.stop_ids, "draft": opened.draft}
    options |= {"budget": budget, "images": read.images}
    generation = Generation(opened.model, ids, **options)
    shown = [StoppingText(opened.tokenizer.ids_to_text, stops) for _ in texts]
    written: list[list[int]] = [[] for _ in texts]
    pieces: list[list[str]] = [[] for _ in texts]
    done = 0

    def complete(row: int) -> dict[str, Any]:
        reason = _reason(shown[row], generation.stopped_by[row], eod)
        pieces[row].append(shown[row].finish())
        if streaming:
            typer.echo(pieces[row][-1])
        return {"prompt": texts[row], "text": "".join(pieces[row]), "tokens": written[row], "ended_by": reason}

    total.read += sum(map(len, ids))
    started, first = time.perf_counter(), 0.0
    for items in generation:
        first = first or time.perf_counter()
        for row, tokens in enumerate(items):
            for token in tokens:
                written[row].append(token)
                pieces[row].append(shown[row].add(token))
                if streaming:
                    typer.echo(pieces[row][-1], nl=False)
                if shown[row].stopped_by is not None:
                    generation.end(row)
                    break
        while done < len(texts) - 1 and (not items[done] or shown[done].stopped_by is not None):
            yield complete(done)
            done += 1
    finished = time.perf_counter()
    total.acceptance.add(generation.acceptance)
    total.thoughts += [thought for thought in generation.thoughts if thought.begun]
    total.read_seconds += (first or finished) - started
    total.written += sum(map(len, written))
    if any(len(row) > 1 for row in written):
        total.stepped += sum(len(row) - 1 for row in written if row)
        total.step_seconds += finished - first
    for row in range(done, len(texts)):
        yield complete(row)


def _reason(shown: StoppingText, token: int | None, eod: int) -> str:
    """Return what ended a continuation: a text, a token, or its length."""
    if shown.stopped_by is not None:
        return f"--stop {shown.stopped_by!r}"
    return {None: "--max-tokens", eod: "end of document"}.get(token, "end of the answer")


def _continue_all(
    opened: Opened,
    texts: Sequence[str],
    read: _Read,
    sampling: Sampling,
    max_tokens: int,
    stops: Sequence[str],
    budget: ThoughtBudget | None,
    batch: int,
    total: _Speed,
) -> Iterator[dict[str, Any]]:
    """Yield rows in the order of the prompts, each as soon as it and those before it are complete; prompts that wait
    take the places of those that have ended.
    """
    from nemotron_h.inference.pool import END, Job, Pool, Sample
    from nemotron_h.inference.text import StoppingText

    shown = [StoppingText(opened.tokenizer.ids_to_text, stops) for _ in texts]
    pieces: list[list[str]] = [[] for _ in texts]

    def complete(sample: Sample) -> bool:
        row = sample.job.prompt
        pieces[row].append(shown[row].add(sample.tokens[-1]))
        return shown[row].stopped_by is not None

    options = {"batch": min(batch, len(texts)), "max_tokens": max_tokens, "sampling": sampling, "complete": complete}
    pool = Pool(opened.model, read.ids, **options, stop_ids=read.stop_ids, budget=budget, images=read.images)
    ended: dict[int, dict[str, Any]] = {}
    done = 0
    for sample in pool.run_each([Job(row, 0, sampling.seed + row) for row in range(len(texts))]):
        row, last = sample.job.prompt, sample.tokens[-1] if sample.ended_by == END else None
        pieces[row].append(shown[row].finish())
        reason = _reason(shown[row], last, opened.tokenizer.eod_id)
        ended[row] = {"prompt": texts[row], "text": "".join(pieces[row]), "tokens": sample.written, "ended_by": reason}
        total.written += len(sample.written)
        total.stepped += max(len(sample.written) - 1, 0)
        while done in ended:
            yield ended.pop(done)
            done += 1
    total.read += sum(map(len, read.ids))
    total.read_seconds += pool.read_seconds
    total.step_seconds += pool.seconds - pool.read_seconds
    total.thoughts += [thought for thought in pool.thoughts if thought.begun]


def read_prompts(file: str) -> list[str]:
    """Return the prompts of a file: a line each, empty lines left out; of a .jsonl, the field `prompt` of each line.

    Errors:
        UserError: it is missing or no UTF-8, has no prompts, or a line is no such record.
    """
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"--prompts {file}: {error.strerror}", hint="name a file of prompts, a line each") from error
    content = decode(data, f"--prompts {file}")
    lines = [(number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"--prompts {file} has no prompts", hint="it takes a prompt a line")
    if not file.endswith(".jsonl"):
        return [line.removesuffix("\r") for _, line in lines]
    found = []
    for number, line in lines:
        origin = f"--prompts {file}, line {number}"
        record = parse_json(line, origin)
        if not isinstance(record, dict) or "prompt" not in record:
            raise UserError(f'{origin} is no record {{"prompt": ...}}')
        if not isinstance(value := record["prompt"], str):
            raise UserError(f"{origin}: prompt is {type(value).__name__}, not text")
        found.append(check_unicode(value, origin))
    return found
