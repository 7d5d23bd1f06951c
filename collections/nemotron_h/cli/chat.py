"""`nemotron-h chat`: talk with a checkpoint, in a terminal or line by line from the standard input."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from nemotron_h.cli.generate import (
    CheckpointArgument,
    DeviceOption,
    DraftOption,
    DraftTokensOption,
    DtypeOption,
    TemperatureOption,
    ThinkingOption,
    ThoughtBudgetOption,
    TokenizerOption,
    TopKOption,
    TopPOption,
    note,
    notes,
    warn,
)
from nemotron_h.core.errors import UserError
from nemotron_h.core.files import check_unicode, decode
from nemotron_h.inference.opening import open_checkpoint, recorded_template

if TYPE_CHECKING:
    from nemotron_h.data.chat import ChatTemplate
    from nemotron_h.inference.chat import ChatSession
    from nemotron_h.inference.opening import Opened

COMMANDS = {
    "/image FILE": "show an image with the next turn, before its text; may be given several times",
    "/reset": "forget the conversation, but for the system message",
    "/quit": "leave (as the end of the input does)",
    "/help": "show this list",
}


def chat(
    checkpoint: CheckpointArgument,
    system: Annotated[str, typer.Option(help="A system message before the first turn.")] = "",
    template: Annotated[
        str | None,
        typer.Option(
            help="nemotron_h (the family's), or a Jinja file.", show_default="the one the checkpoint was tuned with"
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    temperature: TemperatureOption = 0.8,
    top_k: TopKOption = 0,
    top_p: TopPOption = 0.95,
    seed: Annotated[int, typer.Option(help="The same seed and turns give the same answers.")] = 0,
    thinking: ThinkingOption = None,
    thought_budget: ThoughtBudgetOption = None,
    draft: DraftOption = None,
    draft_tokens: DraftTokensOption = None,
    tokenizer: TokenizerOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
) -> None:
    """Talk with a checkpoint. /image FILE shows an image, /reset starts anew, /quit leaves, Ctrl-C ends an answer.

    The state is kept: a turn reads its own tokens alone, however long the conversation is, and an image is encoded
    once. Where the standard input is no terminal, each line is a turn; answers go to the standard output and all else
    to the standard error.

    nemotron-h chat runs/nemotron_h_tiny_sft --system "Answer in one sentence."

    (echo /image digit.png; echo Which digit is it?; echo And the next one?) | nemotron-h chat runs/vlm

    nemotron-h chat runs/large_sft --draft runs/small_sft

    nemotron-h chat runs/reasoning --thinking on --thought-budget 512 --max-tokens 2048
    """
    from nemotron_h.data.chat import FAMILY_SOURCE, ChatTemplate, template_source
    from nemotron_h.data.thoughts import switched
    from nemotron_h.inference.sampling import Sampling
    from nemotron_h.inference.thought import ThoughtBudget

    sampling = Sampling(temperature, top_k, top_p, seed)
    check_unicode(system, "--system")
    source = template_source(template) if template is not None else None
    switched(thinking, source or "")  # a mistake is told before the model is loaded
    opened = open_checkpoint(checkpoint, tokenizer, dtype, device, draft, draft_tokens)
    if source is None:
        source = recorded_template(opened.tokenizer, opened.record) or FAMILY_SOURCE
    source, system = switched(thinking, source, system)
    chosen = ChatTemplate(source, opened.tokenizer)
    for warning in warnings_of(opened, chosen):
        warn("warning", warning)
    from nemotron_h.data.images.read import ImageError
    from nemotron_h.data.messages import ChatError
    from nemotron_h.inference.chat import ChatSession

    try:
        options = {"sampling": sampling, "max_tokens": max_tokens, "draft": opened.draft}
        if thought_budget is not None:
            options["budget"] = ThoughtBudget(opened.tokenizer, thought_budget)
        session = ChatSession(opened.model, chosen, system=system, **options)
        if system.strip():
            chosen.prompt(session.turns)  # a template that refuses it is told before the first turn
    except ChatError as error:
        raise UserError(f"the chat template cannot be used: {error}", hint="name another one: --template") from error
    interactive = sys.stdin.isatty()
    if interactive:
        note(f"{opened}. /help lists commands.")
    images: list[str] = []
    for text in _turns(interactive):
        if text.startswith("/"):
            if text == "/quit":
                break
            _command(text, session, images, opened)
            continue
        try:
            _answer(session, text, images)
        except (ChatError, ImageError) as error:
            warn("not sent", str(error))
        else:
            images.clear()


def warnings_of(opened: Opened, template: ChatTemplate) -> Iterator[str]:
    """Yield the reasons why answers may not be answers."""
    if template.plain_markers:
        yield (
            f"the tokenizer lacks {', '.join(template.plain_markers)}; the template's markers are read as ordinary text"
        )
    stage = (opened.record.get("recipe") or {}).get("stage")
    if stage == "pretrain":
        yield (
            f"{opened.checkpoint} is pretrained alone, not fine-tuned on conversations: it continues text and may not "
            "end its answers (nemo llm finetune makes a model that does)"
        )


def _turns(interactive: bool) -> Iterator[str]:
    """Yield what the user says; empty lines and those that are not UTF-8 are left out, the latter with a word."""
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (gives `input` history and editing)
    while True:
        try:
            line = input("> ") if interactive else sys.stdin.buffer.readline()
            if not interactive and not line:
                return
            text = check_unicode(line, "the turn") if interactive else decode(line, "the turn")
        except (EOFError, KeyboardInterrupt):
            notes.print()
            return
        except (UserError, UnicodeDecodeError) as error:
            warn("not sent", str(error))
            continue
        if text.strip():
            yield text.strip()


def _command(text: str, session: ChatSession, images: list[str], opened: Opened) -> None:
    """Do what a command says; `images` are those of the next turn."""
    name, _, file = text.partition(" ")
    if name == "/image" and file.strip():
        _show(file.strip(), session, images, opened)
        return
    if text == "/reset":
        session.reset()
        images.clear()
        note("The conversation is forgotten.")
        return
    if text not in ("/help", "/image"):
        notes.print(Text(f"there is no command {name}", style="yellow"))
    for command, meaning in COMMANDS.items():
        note(f"{command:11} {meaning}")


def _show(file: str, session: ChatSession, images: list[str], opened: Opened) -> None:
    """Add an image to the next turn; one that cannot be read, or is shown to a model of text, is told of at once."""
    from nemotron_h.data.images.read import ImageError, read_bytes, read_image
    from nemotron_h.inference.looking import Looking
    from nemotron_h.inference.vision import image_definition

    file = os.path.expanduser(file)
    try:
        image_definition(opened.checkpoint)
        image = read_image(read_bytes(file))
        session.looking = session.looking or Looking(opened, session.template)
    except (ImageError, UserError) as error:
        warn("not shown", f"{file}: {error}" if isinstance(error, ImageError) else error.message)
        return
    images.append(file)
    note(f"{file}, {image.width} x {image.height} pixels, goes with the next turn")


def _answer(session: ChatSession, text: str, images: Sequence[str] = ()) -> None:
    """Write an answer as it comes; white space at its end is left out."""
    held = ""
    pieces = session.answer(text, images)
    with _interruptible() as interrupted:
        for piece in pieces:
            held += piece
            shown = held.rstrip()
            typer.echo(shown, nl=False)
            held = held[len(shown) :]
            if interrupted:
                pieces.close()  # between two steps: the state stays whole
                break
    typer.echo()
    steps = session.written - 1
    speed = f"{steps / session.write_seconds:,.0f} tokens/s" if steps > 0 and session.write_seconds else "no steps"
    drafted = f"{session.acceptance}, " if session.draft else ""
    note(
        f"{session.read:,} tokens read in {session.read_seconds:.2f} s, {session.written:,} written at {speed}, "
        f"{drafted}ended by {session.ended_by}; {len(session.ids):,} in the conversation"
    )


@contextlib.contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Fill the list on Ctrl-C, once; a second one is an interrupt as ever."""
    seen: list[int] = []

    def handle(number: int, frame: object) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)
