"""Items whose answer is spread over a haystack: RULER's variable tracking, common words, frequent words.

Prompts and prefixes are RULER's, word for word and with their slips, as scores depend on them (NVIDIA/RULER,
scripts/data/synthetic, Copyright 2024 NVIDIA CORPORATION, Apache License 2.0); the programs are not.
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence

from nemotron_h.evaluation.long_context.item import Draft, Request
from nemotron_h.evaluation.long_context.retrieval import NOISE
from nemotron_h.evaluation.long_context.search import largest

#: RULER: lengths from here on have the published tasks; shorter ones have smaller haystacks and examples
SHORT = 4096
_TRACKING = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find "
    "all variables that are assigned the value {value} in the text above."
)
_TRACKED = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assgined the "
    "value {value}, they are: "
)
_COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
)
_COMMON_ONES = " Answer: The top 10 words that appear most often in the list are:"
_CODED = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text?"
)
_CODED_ONES = " Answer: According to the coded text above, the three most frequently appeared words are:"
#: RULER synthetic.yaml, variable_tracking.py: hops of a chain, letters of a name, in the example too
HOPS, _LETTERS, _EXAMPLE_LETTERS = 4, 5, 3
#: RULER variable_tracking.py: tokens of the example, with its answer; ours: at most this part of a short item
_EXAMPLE_TOKENS, _EXAMPLE_PART = 500, 4
#: noise that a chain needs: more sentences than assignments
LEAST_NOISE = HOPS + 2
#: RULER synthetic.yaml, common_words_extraction.py: common words; how often they and the others appear, in the list and
#: in the example, which has so many different words; for lengths from `SHORT` on and below
_COMMON_WORDS = 10
_COUNTS, _EXAMPLE = (30, 3), (40, 10, 3)
_SHORT_COUNTS, _SHORT_EXAMPLE = (6, 1), (20, 3, 1)
#: RULER freq_words_extraction.py: letters of a coded word, exponent of the zeta distribution, tokens for each of the
#: different words
_CODE_LETTERS, _ALPHA, _TOKENS_A_WORD = 6, 2.0, 50
_ZETA = 1.6449340668482264  # of 2: pi^2 / 6
#: ours: from here on each of the first words is more frequent than the next
LEAST_CODED = 60


def variable_tracking(request: Request) -> Draft:
    """Return a chain of assignments in noise, behind an answered example.

    The example has names of its own each time; RULER's has the same text, in which names are replaced.
    """
    rng = request.rng
    most = _EXAMPLE_TOKENS if request.length >= SHORT else request.length // _EXAMPLE_PART
    state = rng.getstate()

    def example(lines: int) -> str:
        rng.setstate(state)
        draft = _chain(rng, lines, _EXAMPLE_LETTERS)
        return f"{draft.input}{' '.join(draft.references)}\n\n"

    lines = largest(lambda lines: request.count(example(lines)) <= most, LEAST_NOISE, 1) or LEAST_NOISE
    before = example(lines)
    draft = _chain(rng, request.units, _LETTERS)
    return Draft(before + draft.prompt, draft.prefix, draft.references)


def _chain(rng: random.Random, lines: int, letters: int) -> Draft:
    names: list[str] = []
    while len(names) <= HOPS:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        names += [] if name in names else [name]
    value = str(rng.randint(10_000, 99_999))
    chain = [f"VAR {names[0]} = {value}", *(f"VAR {name} = VAR {names[hop]} " for hop, name in enumerate(names[1:]))]
    sentences = [f"{NOISE}\n"] * lines
    places = sorted(rng.sample(range(lines), len(chain)))
    for place, assignment in reversed([*zip(places, chain, strict=True)]):
        sentences.insert(place, assignment)
    context = " ".join(sentences).replace(". \n", ".\n")
    told = {"value": value, "count": HOPS + 1}
    return Draft(_TRACKING.format(context=context, **told), _TRACKED.format(**told), names)


def common_words(request: Request) -> Draft:
    """Return a numbered list of words, ten of which appear more often, behind an answered example."""
    short = request.length < SHORT
    count, *counts = _SHORT_EXAMPLE if short else _EXAMPLE
    example, answers = _listed(request.rng, request.texts.words, count, counts)
    before = f"{_COMMON.format(context=example)}{_COMMON_ONES}{_numbered(answers)}\n"  # RULER has no space there
    context, common = _listed(request.rng, request.texts.words, request.units, _SHORT_COUNTS if short else _COUNTS)
    return Draft(before + _COMMON.format(context=context), _COMMON_ONES, common)


def _listed(rng: random.Random, words: Sequence[str], count: int, counts: Sequence[int]) -> tuple[str, list[str]]:
    """Return a list of so many different words as text, and the common ones."""
    chosen = rng.sample(words, min(count, len(words)))
    common, others = chosen[:_COMMON_WORDS], chosen[_COMMON_WORDS:]
    listed = common * counts[0] + others * counts[1]
    rng.shuffle(listed)
    return _numbered(listed), common


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def frequent_words(request: Request) -> Draft:
    """Return coded words whose counts follow a zeta distribution: dots, then the three that are asked, then others."""
    rng, ranked = request.rng, ["..."]
    while len(ranked) < max(request.length // _TOKENS_A_WORD, 5):
        word = "".join(rng.choices(string.ascii_lowercase, k=_CODE_LETTERS))
        ranked += [] if word in ranked else [word]
    text = [word for rank, word in enumerate(ranked, 1) for _ in range(int(request.units * rank**-_ALPHA / _ZETA))]
    rng.shuffle(text)
    return Draft(_CODED.format(context=" ".join(text)), _CODED_ONES, ranked[1:4])
