"""Items that ask for what stands somewhere in a haystack: RULER's needles, a needle at a chosen depth, a phonebook.

Prompts, prefixes and the sentences of needles and noise are RULER's, word for word, as scores depend on them
(NVIDIA/RULER, scripts/data/synthetic, Copyright 2024 NVIDIA CORPORATION, Apache License 2.0); the programs are not.
"""

from __future__ import annotations

import math
import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nemotron_h.core.errors import UserError
from nemotron_h.evaluation.long_context import word_lists
from nemotron_h.evaluation.long_context.item import Draft, Request

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_ASKED = (
    "{some} special magic {kind} {are} hidden within the following text. Make sure to memorize it. I will quiz you "
    "about the {kind} afterwards.\n{context}\nWhat {all} the special magic {kind} for {query} mentioned in the "
    "provided text?"
)
_PREFIX = " The special magic {kind} for {query} mentioned in the provided text {are}"
_ONE = {"some": "A", "are": "is", "all": "is"}
_SEVERAL = {"some": "Some", "are": "are", "all": "are all"}
#: RULER niah.py: depths of needles in essays, in percent
_DEPTHS = [round(100 * place / 39) for place in range(40)]
WORDS, NUMBERS, UUIDS = "words", "numbers", "uuids"
#: ours: draws of a text that is to differ from those before, all in vain, at which there are taken to be no more
_FRUITLESS = 1000
#: ours: any number of items covers depths evenly (multiples of the golden ratio, modulo 1)
_GOLDEN = (math.sqrt(5) - 1) / 2
#: 2406.07887 3.3.3, as reproduced: answered questions before the one that is asked
_SHOTS = 2
_QUESTION = "What is the phone number for {name}?\n"
_ANSWER = "Answer:"


@dataclass(frozen=True)
class Needles:
    """A variant of RULER's needles in a haystack.

    Attributes:
        haystack: returns sentences, of a request and of what makes one more needle.
        separator: between sentences.
        keys, values: kind of each, `WORDS`, `NUMBERS` or `UUIDS`.
        num_keys, num_values, num_queries: keys that are hidden, values of each, keys that are asked for.
    """

    haystack: Callable[[Request, Callable[[], str]], list[str]]
    separator: str
    keys: str = WORDS
    values: str = NUMBERS
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1

    def __call__(self, request: Request) -> Draft:
        """Return an item's texts."""
        rng, seen = request.rng, set()

        def new(kind: str) -> str:
            for _ in range(_FRUITLESS):
                if (text := _text_of(kind, request)) not in seen:
                    seen.add(text)
                    return text
            raise UserError(
                f"the words of --texts give no more than {len(seen):,} different keys", hint="give more words"
            )

        values = {new(self.keys): [new(self.values) for _ in range(self.num_values)] for _ in range(self.num_keys)}
        needles = [self._needle(key, value) for key, several in values.items() for value in several]
        rng.shuffle(needles)
        sentences = self.haystack(request, lambda: self._needle(new(self.keys), new(self.values)))
        for place, needle in sorted(zip(self._places(rng, len(sentences), len(needles)), needles, strict=True))[::-1]:
            sentences.insert(place, needle)
        asked = rng.sample([*values], self.num_queries)
        pairs = [(key, value) for key in asked for value in values[key]]
        query = f"{', '.join(asked[:-1])}, and {asked[-1]}" if len(asked) > 1 else asked[0]
        return _asked(
            self.separator.join(sentences),
            query,
            self.values if len(pairs) > 1 else self.values.removesuffix("s"),
            [(self._needle(key, value), value) for key, value in pairs],
        )

    def _needle(self, key: str, value: str) -> str:
        return _NEEDLE.format(kind=self.values, key=key, value=value)

    def _places(self, rng: random.Random, sentences: int, needles: int) -> list[int]:
        if self.haystack is essays:
            return [sentences * depth // 100 for depth in rng.sample(_DEPTHS, needles)]
        return rng.sample(range(sentences), needles)


def _text_of(kind: str, request: Request) -> str:
    rng, texts = request.rng, request.texts
    if kind == WORDS:
        return f"{rng.choice(texts.adjectives)}-{rng.choice(texts.nouns)}"
    if kind == NUMBERS:
        return str(rng.randint(1_000_000, 9_999_999))
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _asked(context: str, query: str, kind: str, answers: Sequence[tuple[str, str]]) -> Draft:
    """Return the texts of a question.

    Args:
        answers: (needle, value).
    """
    words = _ONE if len(answers) == 1 else _SEVERAL
    return Draft(
        _ASKED.format(context=context, query=query, kind=kind, **words),
        _PREFIX.format(query=query, kind=kind, **words),
        [value for _, value in answers],
        [context.index(needle) / max(1, len(context) - len(needle)) for needle, _ in answers],
    )


def essays(request: Request, _: Callable[[], str]) -> list[str]:
    """Return the essays' first words, as sentences."""
    return request.texts.essay_sentences(request.units)


def noise(request: Request, _: Callable[[], str]) -> list[str]:
    """Return the noise again and again."""
    return [NOISE] * request.units


def needles(request: Request, needle: Callable[[], str]) -> list[str]:
    """Return needles that nobody asks for."""
    return [needle() for _ in range(request.units)]


def _depth(number: int) -> float:
    """Return the depth of an item's answer, from 0 to 1."""
    return number * _GOLDEN % 1


def needle_at_depth(request: Request) -> Draft:
    """Return one needle in noise, as `niah_single_1`, at the depth of the item's number."""
    key = f"{request.rng.choice(word_lists.COLOURS)}-{request.rng.choice(word_lists.ANIMALS)}"
    value = _text_of(NUMBERS, request)
    needle = _NEEDLE.format(kind=NUMBERS, key=key, value=value)
    sentences = [NOISE] * request.units
    sentences.insert(round(_depth(request.number) * request.units), needle)
    return _asked("\n".join(sentences), key, NUMBERS.removesuffix("s"), [(needle, value)])


def phonebook(request: Request) -> Draft:
    """Return a book of different names and numbers, answered questions, and one to the name at the item's depth.

    2406.07887 3.3.3; its program and names are not public. Answered entries are spread evenly, as in a reproduction.
    """
    return _book(request, lambda others: [others[(2 * n + 1) * len(others) // (2 * _SHOTS)] for n in range(_SHOTS)])


def phonebook_practice(request: Request) -> Draft:
    """Return a book as `phonebook` does, with more answered questions, about as many as names, some of them again: of
    all that a document has, they are what can be learnt.
    """
    return _book(request, lambda others: request.rng.choices(others, k=request.rng.randint(_SHOTS, len(others) + 2)))


def _book(request: Request, choose: Callable[[list[int]], list[int]]) -> Draft:
    """Return a book with answered questions.

    Args:
        choose: returns the entries that they are to, of all but the one that is asked for.
    """
    rng, size = request.rng, request.units
    names = _names(rng, size)
    numbers = [f"{rng.randint(200, 999)}-{rng.randint(200, 999)}-{rng.randint(1000, 9999)}" for _ in names]
    entries = [f"{name}: {number}\n" for name, number in zip(names, numbers, strict=True)]
    wanted = round(_depth(request.number) * (size - 1))
    others = [place for place in range(size) if place != wanted]
    shots = choose(others)
    rng.shuffle(shots)
    answered = [f"{_QUESTION.format(name=names[place])}{_ANSWER} {numbers[place]}\n\n" for place in shots]
    prompt = "".join([*entries, "\n", *answered, _QUESTION.format(name=names[wanted])])
    return Draft(prompt, _ANSWER, [numbers[wanted]], [wanted / max(1, size - 1)])


def _names(rng: random.Random, count: int) -> list[str]:
    """Return different names; where there are many, with an initial."""
    first, last, letters = word_lists.FIRST_NAMES, word_lists.LAST_NAMES, "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    pairs, many = len(first) * len(last), count > len(first) * len(last) // 2
    chosen = rng.sample(range(pairs * len(letters) if many else pairs), count)
    return [
        f"{first[number % len(first)]} {f'{letters[number // pairs]}. ' * many}{last[number % pairs // len(first)]}"
        for number in chosen
    ]
