"""Answers to items: a model's own, which are kept by the items' keys, and those of a file that another engine wrote."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from nemotron_h.core.errors import UserError
from nemotron_h.core.files import check_unicode, parse_json, read_text
from nemotron_h.core.progress import StageProgress
from nemotron_h.data.tokenizer import Tokenizer
from nemotron_h.evaluation.asking import check_gives_back, without_thoughts
from nemotron_h.evaluation.continuing import Answer, Engine
from nemotron_h.evaluation.long_context.item import KEY, Item
from nemotron_h.evaluation.long_context.scores import LINE, clean
from nemotron_h.evaluation.records import Records
from nemotron_h.evaluation.subject import Subject, names_of

#: of a file of another engine
ANSWER = "answer"


def answerers(runs: Sequence[Path], chat: bool) -> list[Answerer]:
    """Return the models of runs or checkpoints; no weights are read.

    Errors:
        UserError: one is not there, or named twice, or its chat template cannot be used.
    """
    subjects = [Subject.of(run, None) for run in runs]
    return [Answerer(name, subject, chat) for name, subject in zip(names_of(subjects), subjects, strict=True)]


class Answerer:
    """A model with the way in which it is asked; its weights are not read.

    Args:
        chat: prompts are turns of a conversation without thoughts, in the template that came with the checkpoint; an
            item's prefix begins the answer.
    Attributes:
        way: equal of models that read items as the same tokens.
    """

    def __init__(self, name: str, subject: Subject, chat: bool) -> None:
        self.name, self.subject, self.chat = name, subject, chat
        self._conversation = without_thoughts(subject) if chat else None
        self.way = (subject.tokenizer.ids_sha256(), self._conversation.source if self._conversation else "")
        eod = frozenset({subject.tokenizer.eod_id})
        self.stop_ids = self._conversation.stop_ids if self._conversation else eod

    def ids(self, prompt: str, prefix: str) -> list[int]:
        """Return the tokens before an answer."""
        tokenizer = self.subject.tokenizer
        if self._conversation is None:
            return tokenizer.text_to_ids(prompt + prefix)
        return self._conversation.prompt(prompt) + tokenizer.text_to_ids(prefix)

    def count(self, prompt: str, prefix: str) -> int:
        """Return how many they are."""
        return len(self.ids(prompt, prefix))

    def check(self, items: Sequence[Item]) -> None:
        """Refuse items whose text the tokenizer does not give back.

        Errors:
            UserError: names characters that it lacks.
        """
        tokenizer = self.subject.tokenizer
        for item in {item.task: item for item in items}.values():
            text = item.input + "".join(item.references)
            check_gives_back(tokenizer, tokenizer.text_to_ids(text), text, f"an item of {item.task}")


def answered(model: Answerer, items: Sequence[Item], engine: Engine, folder: Path, console: Console) -> Records[Answer]:
    """Have a model answer the items that it has not answered yet, greedily.

    Args:
        engine: where it answers.
        folder: of answers.
        console: for the progress.
    Errors:
        UserError: answers of another checkpoint or with other settings are there, memory has no room, or an endpoint
            fails.
    """
    subject = model.subject
    records = Records(folder, model.name, Answer)
    records.check({**engine.settings(subject), "chat": model.chat})
    there = {record.key for record in records.records}
    groups: dict[tuple[str, int, int], list[Item]] = {}
    for item in {item.key: item for item in items if item.key not in there}.values():
        groups.setdefault((item.task, item.length, item.max_tokens), []).append(item)
    if not groups:
        return records
    ask = engine.open(subject)
    total = sum(item.tokens + item.max_tokens for members in groups.values() for item in members)
    with StageProgress(console, model.name, total) as bar, records:
        for (task, length, max_tokens), members in groups.items():
            bar.advance(0, f"{model.name}: {task}, {length:,} tokens")
            # two bytes or four each: Python's lists of long prompts would take gigabytes
            prompts = [(item.key, array("i", model.ids(item.prompt, item.prefix))) for item in members]
            watch = line_watch(subject.tokenizer) if members[0].rule == LINE else None
            for number, answer in ask(prompts, max_tokens=max_tokens, stop_ids=model.stop_ids, watch=watch):
                records.add(answer)
                bar.advance(members[number].tokens + max_tokens)
    return records


def line_watch(tokenizer: Tokenizer) -> Callable[[list[int]], bool]:
    """Return what tells whether tokens have a whole first line, which is all that a rule of lines looks at."""
    ends = frozenset(number for number in range(tokenizer.vocab_size) if "\n" in tokenizer.ids_to_text([number]))

    def complete(tokens: list[int]) -> bool:
        return tokens[-1] in ends and bool(clean(tokenizer.ids_to_text(tokens)))

    return complete


def read_answers(file: Path, items: Sequence[Item]) -> dict[str, str]:
    """Return the answers of a file by the items' keys.

    Errors:
        UserError: a line has no key or answer, an item has none or two, or an answer has no item.
    """
    wanted, answers = {item.key for item in items}, {}
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        origin = f"{file}, line {number}"
        key, answer = _fields(parse_json(line, origin), origin)
        if key not in wanted:
            raise UserError(f"{origin}: --items has no item {key!r}", hint="name the file that the prompts came from")
        if key in answers:
            raise UserError(f"{origin}: item {key} is answered twice")
        answers[key] = check_unicode(answer, origin)
    if missing := wanted - answers.keys():
        raise UserError(
            f"{file} lacks the answers to {len(missing):,} of {len(wanted):,} items, the first {min(missing)}",
            hint='give an empty text for one that was not answered: {"key": ..., "answer": ""}',
        )
    return answers


def _fields(record: Any, origin: str) -> tuple[str, str]:
    values = [record.get(name) for name in (KEY, ANSWER)] if isinstance(record, Mapping) else [None]
    if not all(isinstance(value, str) for value in values):
        raise UserError(f"{origin} has no texts {KEY} and {ANSWER}", hint=f'write {{"{KEY}": ..., "{ANSWER}": ...}}')
    return values[0], values[1]
