"""An item of a long-context task: a prompt of a chosen length, what an answer has to contain, and where that stands."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemotron_h.core.errors import UserError
from nemotron_h.core.files import parse_json, read_text
from nemotron_h.core.strict import from_json
from nemotron_h.evaluation.long_context.scores import RULES
from nemotron_h.evaluation.long_context.texts import Texts

#: fields of an exported item that follow from the others
KEY, INPUT = "key", "input"


@dataclass(frozen=True)
class Draft:
    """Texts of an item.

    Attributes:
        prompt: the question, with its haystack.
        prefix: that begins the answer.
        references: what an answer has to contain.
        depths: of each reference in the haystack, from 0 (its begin) to 1; none where it stands in many places.
    """

    prompt: str
    prefix: str
    references: list[str]
    depths: list[float] = field(default_factory=list)

    @property
    def input(self) -> str:
        """Return what a model without a chat template continues."""
        return self.prompt + self.prefix


@dataclass(frozen=True)
class Request:
    """Texts to make.

    Attributes:
        rng: that all choices are drawn from.
        units: of the haystack: sentences, words or documents.
        number: of the item, from 0; depths and questions follow it.
        length: tokens of prompt and answer.
        texts: of haystacks.
        count: returns the tokens of a text.
    """

    rng: random.Random
    units: int
    number: int
    length: int
    texts: Texts
    count: Callable[[str], int]


@dataclass(frozen=True)
class Item:
    """A prompt with what its answer is judged by.

    Attributes:
        task, length, number: whose it is; the length is the one that was asked for, in tokens of prompt and answer.
        prompt, prefix, references, depths: as in `Draft`.
        rule: of scores, one of `RULES`.
        max_tokens: of the answer.
        tokens: of prompt and prefix, by the tokenizer that the item was made for.
        own_texts: files of a user's own that items were made of.
    """

    task: str
    length: int
    number: int
    prompt: str
    prefix: str
    references: list[str]
    depths: list[float]
    rule: str
    max_tokens: int
    tokens: int
    own_texts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.rule not in RULES or not self.references or len(self.depths) not in (0, len(self.references)):
            raise UserError(
                f"item {self.number} of {self.task} has the rule {self.rule!r}, {len(self.references)} references and "
                f"{len(self.depths)} depths"
            )

    @property
    def input(self) -> str:
        """Return what a model without a chat template continues."""
        return self.prompt + self.prefix

    @property
    def key(self) -> str:
        """Return a hash of all that an answer and its score depend on."""
        content = [self.prompt, self.prefix, self.references, self.rule, self.max_tokens]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def record(self) -> dict[str, Any]:
        """Return the item as a file has it: `input` is what another engine continues, `key` names its answer."""
        return {KEY: self.key, **vars(self), INPUT: self.input}


def read_items(file: Path) -> list[Item]:
    """Return the items of a file that `nemotron-h ruler` wrote.

    Errors:
        UserError: a line is no item, or there is none.
    """
    items = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if line.strip():
            record, origin = parse_json(line, f"{file}, line {number}"), f"{file}, line {number}"
            if not isinstance(record, dict):
                raise UserError(f"{origin} is {type(record).__name__}, not an object")
            try:
                items.append(from_json(Item, {key: record[key] for key in record if key not in (KEY, INPUT)}))
            except UserError as error:
                raise UserError(f"{origin} is no item: {error.message}") from error
            if record.get(KEY) != items[-1].key or record.get(INPUT) != items[-1].input:
                raise UserError(f"{origin}: {KEY} or {INPUT} is not that of the item", hint="export the items again")
    if not items:
        raise UserError(f"{file} has no items", hint="write them: nemotron-h ruler RUN --export FILE")
    return items
