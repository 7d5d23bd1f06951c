"""Kinds of questions to a context, each answered by the text alone, and the questions of a conversation.

Every kind but `count` and `order` has a form whose answer the documents do not have; it reads like the others.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import check_one_of
from nemotron_h.evaluation.long_questions.context import ABSENT, Context

_WHERE = "Which document has this sentence?\n{}"
_NEXT = "Which sentence follows this one in its document?\n{}"
_FACT = "What is the {attribute} of {key}?"
_COUNT = 'How many of the documents have the word "{}", in this spelling? Answer with a number.'
_ORDER = "In which order do these sentences stand in the documents? Answer with their letters.\n{}"
#: ours: quotes that a question of order has; documents that a counted word is in
_QUOTES, _COUNTED = 4, range(2, 10)
_LETTERS = "ABCD"
#: ours: letters of a word that is counted
_WORD_LETTERS = 5
#: ours: draws of a question that is not there already, for each one
_TRIES = 20


@dataclass(frozen=True)
class Question:
    """A question with its answer.

    Attributes:
        kind: one of `KINDS`.
        text: of the question.
        answer: a line; `ABSENT` where the documents do not have it.
        evidence: what of the context tells the answer, where that is one place.
    """

    kind: str
    text: str
    answer: str
    evidence: str = ""


@dataclass(frozen=True)
class Source:
    """Material that questions are drawn from.

    Attributes:
        context: of the conversation.
        quotes: those of the context that may be quoted, in their order.
        foreign: sentences of other documents.
    """

    context: Context
    quotes: Sequence[tuple[int, str, str]]
    foreign: Sequence[str]

    @cached_property
    def sentences(self) -> frozenset[str]:
        """Return the sentences that may be quoted."""
        return frozenset(sentence for _, sentence, _ in self.quotes)

    def quote(self, rng: random.Random, fits: Callable[[str], bool] = lambda following: True) -> tuple[int, str, str]:
        """Return a quote that stands once in the context; an empty one where none was found.

        Args:
            fits: tells whether the sentence that follows will do.
        """
        for _ in range(_TRIES if self.quotes else 0):
            quote = rng.choice(self.quotes)
            if fits(quote[2]) and self.context.text.count(quote[1]) == 1:
                return quote
        return 0, "", ""

    def foreign_quote(self, rng: random.Random) -> str:
        """Return a sentence that the context does not have; an empty text where none was found."""
        several = rng.sample(self.foreign, min(_TRIES, len(self.foreign)))
        return next((sentence for sentence in several if sentence not in self.context.text), "")


def where(source: Source, rng: random.Random, absent: bool) -> Question | None:
    """Return which document has a sentence."""
    number, sentence, _ = (0, source.foreign_quote(rng), "") if absent else source.quote(rng)
    answer = ABSENT if absent else f"Document {number}"
    return Question("where", _WHERE.format(sentence), answer, sentence) if sentence else None


def following(source: Source, rng: random.Random, absent: bool) -> Question | None:
    """Return which sentence follows another one."""
    _, sentence, after = (
        (0, source.foreign_quote(rng), ABSENT) if absent else source.quote(rng, source.sentences.__contains__)
    )
    return Question("next", _NEXT.format(sentence), after, sentence) if sentence else None


def fact(source: Source, rng: random.Random, absent: bool) -> Question | None:
    """Return the value of a planted key."""
    context = source.context
    valued = [each for each in context.facts.values() if each.value]
    if not valued or (absent and not context.held_back):
        return None
    known = rng.choice(valued)
    key = rng.choice(context.held_back) if absent else known.key
    answer = ABSENT if absent else known.value
    return Question("fact", _FACT.format(attribute=known.attribute, key=key), answer, "" if absent else known.sentence)


def chain(source: Source, rng: random.Random, absent: bool) -> Question | None:
    """Return the value of a key that shares it with another, and that with a third."""
    facts = source.context.facts
    fitting = [key for key in source.context.chains if (end_of(key, source.context) == "") == absent]
    if not fitting:
        return None
    key = rng.choice(fitting)
    asked = _FACT.format(attribute=facts[key].attribute, key=key)
    return Question("chain", asked, ABSENT if absent else end_of(key, source.context))


def end_of(key: str, context: Context) -> str:
    """Return the value that a chain ends with; an empty text where it ends in a key of which nothing is stated."""
    while (stated := context.facts.get(key)) is not None and stated.other:
        key = stated.other
    return stated.value if stated else ""


def count(source: Source, rng: random.Random, absent: bool) -> Question | None:
    """Return how many documents have a word."""
    words = source.context.words
    if absent or len(words) < _COUNTED[0]:
        return None
    candidates = sorted(word for word in rng.choice(words) if len(word) >= _WORD_LETTERS and word.isalpha())
    for word in rng.sample(candidates, min(_TRIES, len(candidates))):
        if (number := sum(word in each for each in words)) in _COUNTED:
            return Question("count", _COUNT.format(word), str(number))
    return None


def order(source: Source, rng: random.Random, absent: bool) -> Question | None:
    """Return the order in which sentences stand."""
    if absent or len(source.quotes) < _QUOTES:
        return None
    chosen = [source.quotes[place][1] for place in sorted(rng.sample(range(len(source.quotes)), _QUOTES))]
    if any(source.context.text.count(sentence) > 1 for sentence in chosen):
        return None
    letters = rng.sample(_LETTERS, _QUOTES)
    quoted = dict(zip(letters, chosen, strict=True))
    listed = "\n".join(f"{letter}. {quoted[letter]}" for letter in _LETTERS)
    return Question("order", _ORDER.format(listed), ", ".join(letters))


KINDS: dict[str, Callable[[Source, random.Random, bool], Question | None]] = {
    "where": where,
    "next": following,
    "fact": fact,
    "chain": chain,
    "count": count,
    "order": order,
}
#: kinds with a form that the documents do not answer
WITH_ABSENT = ("where", "next", "fact", "chain")


def kinds_named(text: str) -> list[str]:
    """Return the kinds that names joined by commas mean.

    Errors:
        UserError: one is unknown or named twice, or there is none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        check_one_of("--kinds", name, KINDS)
    if not names or len({*names}) < len(names):
        raise UserError(f"--kinds {text[:80]!r} names none, or one twice", hint=f"known: {', '.join(KINDS)}")
    return names


def questions(source: Source, kinds: Sequence[str], number: int, absent: float, rng: random.Random) -> list[Question]:
    """Return different questions, of all kinds in turn; fewer where the context has no more.

    Args:
        absent: share of questions whose answer the documents do not have.
    """
    found: dict[str, Question] = {}
    may_lack = [kind for kind in kinds if kind in WITH_ABSENT]
    turns = rng.sample(kinds, len(kinds))
    for attempt in range(number * _TRIES):
        if len(found) == number:
            break
        lacking = bool(may_lack) and rng.random() < absent
        kind = rng.choice(may_lack) if lacking else turns[attempt % len(turns)]
        if (question := KINDS[kind](source, rng, lacking)) is not None:
            found.setdefault(question.text, question)
    return list(found.values())
