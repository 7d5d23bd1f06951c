"""Write conversations about long contexts: the folder that preparation and `nemotron-h ruler` read."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from rich.console import Console

from nemotron_h.core.errors import UserError
from nemotron_h.core.files import whole_file
from nemotron_h.core.progress import StageProgress
from nemotron_h.core.units import parse_count
from nemotron_h.data.blend import Blend
from nemotron_h.data.chat import FAMILY_SOURCE, FAMILY_TEMPLATE, ChatTemplate
from nemotron_h.data.messages import USER, Turn
from nemotron_h.data.tokenizer import META_FILE, Tokenizer, spec_of
from nemotron_h.evaluation.long_context.item import Item
from nemotron_h.evaluation.long_context.scores import LINE
from nemotron_h.evaluation.long_questions.context import ABSENT
from nemotron_h.evaluation.long_questions.corpus import read_corpus
from nemotron_h.evaluation.long_questions.making import Made, Maker, Plan, prompt_of
from nemotron_h.evaluation.problems.generate import write_blend

CONVERSATIONS, ITEMS, BLEND = "questions.jsonl", "items.jsonl", "questions.yaml"
#: of a context: below it there is no room for facts and questions
SHORTEST = 1024
#: ours: tokens by which an answer may be longer than the right one, at least
_MARGIN = 16


@dataclass
class Summary:
    """Counts of what was written.

    Attributes:
        contexts, tokens: (length, whether it is held out) -> conversations, and their tokens.
        asked, lacking: (kind, whether it is held out) -> questions, and those that the documents do not answer.
        skipped: why documents or contexts were left out -> how many.
    """

    contexts: Counter[tuple[int, bool]] = field(default_factory=Counter)
    tokens: Counter[tuple[int, bool]] = field(default_factory=Counter)
    asked: Counter[tuple[str, bool]] = field(default_factory=Counter)
    lacking: Counter[tuple[str, bool]] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    files: list[Path] = field(default_factory=list)

    def count(self, made: Made) -> None:
        """Count a conversation."""
        self.contexts[made.length, made.held_out] += 1
        self.tokens[made.length, made.held_out] += made.tokens
        for question in made.asked:
            self.asked[question.kind, made.held_out] += 1
            self.lacking[question.kind, made.held_out] += question.answer == ABSENT


def lengths_of(text: str) -> dict[int, float]:
    """Return the lengths of `4096`, or of `32768:3,131k:1` with shares of the tokens; they sum to 1.

    Errors:
        UserError: one is no length, too short, or there twice.
    """
    lengths: dict[int, float] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        size, _, share = part.partition(":")
        try:
            tokens, weight = parse_count(size), float(share or 1)
        except ValueError:
            tokens, weight = 0, 0.0
        if tokens < SHORTEST or not 0 < weight < float("inf") or tokens in lengths:
            raise UserError(
                f"--lengths {part[:40]!r} is no length of {SHORTEST:,} tokens or more with a share, or there twice",
                hint="write 32768, or 32768:3,131072:1",
            )
        lengths[tokens] = weight
    if not lengths:
        raise UserError("--lengths names none", hint="write 32768, or 32768:3,131072:1")
    return {tokens: weight / sum(lengths.values()) for tokens, weight in lengths.items()}


def write_folder(folder: Path, blend: Blend, tokenizer: Tokenizer, plan: Plan, console: Console) -> Summary:
    """Write conversations about a blend's documents, the questions about those held out as items, and a blend.

    Errors:
        UserError: see `read_corpus`; or the documents give no context. No file is written then.
    """
    prepared = (Path(tokenizer.path) / META_FILE).exists()
    spec = spec_of(tokenizer) if prepared else {"kind": tokenizer.kind, "path": str(Path(tokenizer.path).resolve())}
    template = ChatTemplate(FAMILY_SOURCE, tokenizer)
    corpus = read_corpus(blend, plan.validation, console)
    maker = Maker(corpus, template, plan)
    summary = Summary(skipped=corpus.skipped, files=[folder / CONVERSATIONS, folder / ITEMS, folder / BLEND])
    sizes = [sum(map(len, part)) for part in corpus.documents]
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(StageProgress(console, "contexts of documents", sum(sizes), "bytes"))
        conversations, items = (_opened(stack, file) for file in summary.files[:2])
        for held_out, size in enumerate(sizes):
            done = sum(sizes[:held_out])
            for made in maker.conversations(bool(held_out)):
                _write(conversations, {"messages": [{"role": t.role, "content": t.content} for t in made.turns]})
                for item in _items(made, template, summary.asked.total()) if held_out else ():
                    _write(items, item.record())
                summary.count(made)
                bar.advance(done + size - maker.left - bar.done)
        if not summary.contexts:
            raise UserError(
                f"the documents of {blend.path} give no context of {min(plan.lengths):,} tokens",
                hint="name more texts, or a shorter --lengths",
            )
    summary.skipped.update(maker.skipped)
    form = {"chat": "messages", "validation": plan.validation, "licence": "; ".join(dict.fromkeys(corpus.licences))}
    write_blend(folder / BLEND, {"questions": CONVERSATIONS}, form, tokenizer=spec, chat_template=FAMILY_TEMPLATE)
    return summary


def _opened(stack: contextlib.ExitStack, file: Path) -> IO[str]:
    return stack.enter_context(stack.enter_context(whole_file(file)).open("w", encoding="utf-8"))


def _write(file: IO[str], record: object) -> None:
    file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _items(made: Made, template: ChatTemplate, number: int) -> Iterator[Item]:
    """Yield each question of a conversation alone, as `nemotron-h ruler` asks and scores it."""
    text = made.context.text
    for place, question in enumerate(made.asked):
        prompt, told = prompt_of(made.context, question), question.evidence if question.answer != ABSENT else ""
        tokens = len(template.tokenizer.text_to_ids(question.answer))
        yield Item(
            task=question.kind,
            length=made.length,
            number=number + place,
            prompt=prompt,
            prefix="",
            references=[question.answer],
            depths=[text.index(told) / len(text)] if told else [],
            rule=LINE,
            max_tokens=(tokens // _MARGIN + 2) * _MARGIN,  # few different ones: items of one are a batch
            tokens=len(template.prompt((Turn(USER, prompt),))),
        )
