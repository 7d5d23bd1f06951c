"""A context: documents under numbered headings, with facts planted between their sentences."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from nemotron_h.evaluation.long_context.word_lists import ANIMALS, COLOURS

HEADING = re.compile(r"^\[Document \d+\]$", re.MULTILINE)
#: what a conversation begins with
INTRODUCTION = (
    "Read the documents, then answer each question with what it asks for alone. Where the documents do not have it, "
    "answer: {absent}."
)
ABSENT = "not in the documents"
#: ours: what facts are about
ATTRIBUTES = ("locker number", "order number", "badge number", "access code", "account number", "ticket number")
_FACT = "The {attribute} of {key} is {value}."
_LINK = "The {attribute} of {key} is that of {other}."
#: ours: characters and words of a sentence that a question quotes: enough to be told apart, and to be quoted whole
_LENGTHS, _WORDS = range(30, 301), 5
#: ours: characters that a token hardly has, and by how much a text is shortened at least that is too long
_CHARACTERS, _LESS = 16, 0.98
#: ours: tokens that are not worth another document
_LEAST = 128
_END = re.compile(r"(?<=[.!?])[ \t]+")
_WORD = re.compile(r"\w+")


def sentences(text: str) -> Iterator[tuple[int, int]]:
    """Yield begin and end of each sentence: a line, or what ends in it with `.`, `!` or `?` and a space."""
    begin = 0
    for line in text.split("\n"):
        start = begin
        for gap in _END.finditer(line):
            yield start, begin + gap.start()
            start = begin + gap.end()
        if line[start - begin :].strip():
            yield start, begin + len(line)
        begin += len(line) + 1


def quotable(sentence: str) -> bool:
    """Return True if a question may quote a sentence: it is whole, neither short nor long, and no heading."""
    return (
        len(sentence) in _LENGTHS
        and sentence == sentence.strip()
        and sentence.isprintable()  # an answer is judged with control characters as line ends
        and sentence[-1] in ".!?"
        and len(sentence.split()) >= _WORDS
    )


@dataclass(frozen=True)
class Fact:
    """A planted fact: a key's value, of an attribute, or the key whose value it shares, or neither where a chain ends
    in nothing.
    """

    attribute: str
    key: str
    value: str = ""
    other: str = ""

    @property
    def sentence(self) -> str:
        """Return the fact as the documents state it."""
        return (_LINK if self.other else _FACT).format(**vars(self))


@dataclass
class Context:
    """Documents with planted facts; see `planted`.

    Attributes:
        documents: their texts.
        facts: key -> what the documents state of it.
        held_back: keys of which they state nothing.
        chains: keys that a chain begins with, by its number of links.
    """

    documents: list[str]
    facts: dict[str, Fact] = field(default_factory=dict)
    held_back: list[str] = field(default_factory=list)
    chains: dict[str, int] = field(default_factory=dict)

    @cached_property
    def text(self) -> str:
        """Return the documents under their headings."""
        return "\n\n".join(heading(number) + text for number, text in enumerate(self.documents, 1))

    @cached_property
    def quotes(self) -> list[tuple[int, str, str]]:
        """Return (number of the document, sentence, the next one of the same document or an empty text) for each
        sentence that no other one is equal to and that is not planted, in the order of the text.
        """
        planted = {fact.sentence for fact in self.facts.values()}
        of_documents = [[text[begin:end] for begin, end in sentences(text)] for text in self.documents]
        times = Counter(sentence for several in of_documents for sentence in several)
        return [
            (number, sentence, following)
            for number, several in enumerate(of_documents, 1)
            for sentence, following in zip(several, [*several[1:], ""], strict=True)
            if times[sentence] == 1 and sentence not in planted and quotable(sentence)
        ]

    @cached_property
    def words(self) -> list[set[str]]:
        """Return the words of each document."""
        return [set(_WORD.findall(text)) for text in self.documents]


def heading(number: int) -> str:
    """Return what stands before a document."""
    return f"[Document {number}]\n"


def planted(documents: Sequence[str], facts: int, chains: int, rng: random.Random) -> Context:
    """Return documents with facts between their sentences, at places drawn evenly over the sentences.

    Args:
        facts: keys with a value of their own.
        chains: of two to four links each, of which the second of three ends in a key that nothing is stated of.
    """
    whole = "\n".join(documents)
    keys = [f"{colour}-{animal}" for colour in COLOURS for animal in ANIMALS]
    keys = [key for key in rng.sample(keys, len(keys)) if key not in whole]
    context, values = Context([]), iter(rng.sample(range(1_000_000, 10_000_000), facts + chains))

    def state(fact: Fact) -> None:
        context.facts[fact.key] = fact

    for _ in range(min(facts, len(keys) // 2)):
        state(Fact(rng.choice(ATTRIBUTES), keys.pop(), str(next(values))))
    for number in range(chains):
        links = rng.randint(2, 4)
        if len(keys) <= links + 4:
            break
        attribute, several = rng.choice(ATTRIBUTES), [keys.pop() for _ in range(links + 1)]
        for key, other in itertools.pairwise(several):
            state(Fact(attribute, key, other=other))
        if number % 3 == 1:
            context.chains[several[0]] = links
        else:
            state(Fact(attribute, several[-1], str(next(values))))
            context.chains[several[0]] = links
    context.held_back = keys
    context.documents = _insert(documents, [fact.sentence for fact in context.facts.values()], rng)
    return context


def _insert(documents: Sequence[str], facts: list[str], rng: random.Random) -> list[str]:
    """Return the documents with each fact behind a sentence; facts are in any order."""
    places = [(number, end) for number, text in enumerate(documents) for _, end in sentences(text)]
    places = [(number, end) for number, end in places if documents[number][end - 1] in ".!?"] or places
    chosen: list[list[tuple[int, str]]] = [[] for _ in documents]
    for fact in rng.sample(facts, len(facts)):
        number, place = rng.choice(places)
        chosen[number].append((place, fact))
    texts = []
    for text, inserted in zip(documents, chosen, strict=True):
        for place, fact in sorted(inserted, key=lambda each: each[0], reverse=True):
            text = f"{text[:place]} {fact}{text[place:]}"
        texts.append(text)
    return texts


def fill(documents: list[str], budget: int, size_of: Callable[[str], int]) -> tuple[list[str], int]:
    """Take documents from the end of a list until their tokens reach a budget; the rest of the last one goes back.

    Args:
        size_of: returns the tokens of a text.
    Returns:
        texts, in order, and how many documents were passed over, of which no whole sentence fits.
    """
    chosen: list[str] = []
    passed = 0
    while documents and budget > _LEAST:
        text = documents.pop()
        room = budget - size_of(f"\n\n{heading(len(chosen) + 1)}")
        part = _beginning(text, room, size_of)
        if not part:
            passed += 1
            continue
        chosen.append(part)
        budget = room - size_of(part)
        if rest := text[len(part) :].lstrip():
            documents.append(rest)
            break
    return chosen, passed


def _beginning(text: str, room: int, size_of: Callable[[str], int]) -> str:
    """Return a text, or as many of its first sentences as fit; an empty text where none does."""
    part = text[: room * _CHARACTERS]
    while part and (tokens := size_of(part)) > room:
        part = _whole_sentences(part[: int(len(part) * min(room / tokens, _LESS))])
    return part if len(part) == len(text) else _whole_sentences(part)


def _whole_sentences(text: str) -> str:
    """Return a text up to the last end of a line or sentence in it."""
    return text[: max(text.rfind("\n"), *(text.rfind(f"{sign} ") + 1 for sign in ".!?"))].rstrip()
