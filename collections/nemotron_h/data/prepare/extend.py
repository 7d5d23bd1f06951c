"""Long conversations out of short ones, as in paper 5: joined to a length, with turns that refer back to earlier ones
at random places, and related conversations of one topic spread through the sample.

Every conversation is used once, in the loss as before; only the turns that refer back are new. What is drawn depends on
the seed and the conversations alone. How the paper wrote its turns and found its topics is not published: here a turn
asks for an earlier answer or question word by word, and conversations are related that share rare words.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from nemotron_h.core.units import parse_count
from nemotron_h.data.blend import Extend
from nemotron_h.data.chat import ChatTemplate
from nemotron_h.data.messages import ASSISTANT, SYSTEM, USER, ChatError, Conversation, Turn, text_of
from nemotron_h.data.prepare.sources import Bad, Document

if TYPE_CHECKING:
    from nemotron_h.data.prepare.shards import ShardRecord

_WORD = re.compile(r"[^\W\d_]{4,}")
_WORDS = 200  # of a conversation that count for its topic. Ours, as all below
_COMMON = 4  # a word in more than one of so many conversations tells nothing of a topic
_QUOTED_WORDS = 12  # of the turn that is meant
_REPEATED_CHARACTERS = 1000  # of what is repeated, at most
_ROOM = 200  # tokens that are kept free for a turn that refers back
_MISSES = 64  # conversations that do not fit in a row before a sample is full
#: what the user says about the turn that is quoted; whether that is a turn of the user's, and so the answer wanted
REFERENCES = (
    ('Earlier I asked: "{quote}" What did you answer? Repeat it word by word.', True),
    ('Earlier you answered: "{quote}" What had I asked? Repeat it word by word.', False),
)


@dataclass(frozen=True)
class Part:
    """A conversation to join.

    Args:
        turns: without a system message; its text stands before the first turn.
        tokens: that it takes alone.
    """

    turns: Conversation
    tokens: int


def extended(
    items: Iterable[Document | Bad],
    spec: Extend,
    template: ChatTemplate,
    is_held_out: Callable[[Document], bool],
    record: ShardRecord,
) -> Iterator[Document | Bad]:
    """Yield documents joined to long ones; those held out are joined among themselves.

    Args:
        items: conversations, in order; all are held in memory.
        spec: lengths and counts.
        template: measures them.
        is_held_out: whether a conversation is for validation.
        record: its `joined` is counted.
    """
    parts: dict[bool, list[Part]] = {False: [], True: []}
    first = ""
    for item in items:
        if isinstance(item, Bad):
            yield item
            continue
        first = first or item.text
        try:
            turns = without_system(item.conversation)
            part = Part(turns, len(template.encode(turns).ids))
        except ChatError as error:
            yield Bad(item.file, item.position, str(error), item.text[:160])
            continue
        parts[is_held_out(item)].append(part)
    for held_out, found in parts.items():
        rng = np.random.default_rng([spec.seed, held_out, *first.encode()[:64]])
        made = 0
        for turns in join(found, spec, template, rng):
            made += 1
            yield Document(text_of(turns), turns, held_out=held_out)
        record.joined += len(found) - made


def without_system(turns: Conversation) -> Conversation:
    """Move the system message, which only a sample's start could hold, to the beginning of the first turn."""
    if turns[0].role != SYSTEM:
        return turns
    return (replace(turns[1], content=f"{turns[0].content}\n\n{turns[1].content}"), *turns[2:])


def join(
    parts: Sequence[Part], spec: Extend, template: ChatTemplate, rng: np.random.Generator
) -> Iterator[Conversation]:
    """Yield long conversations out of all parts, each of which is in one of them. The last may be shorter than the
    others; a part longer than a sample stays alone.
    """
    longest = parse_count(spec.tokens)
    shortest = parse_count(spec.min_tokens) if spec.min_tokens else longest
    order = rng.permutation(len(parts)).tolist()
    topics = Topics([parts[number].turns for number in order])
    pool = {place: parts[number] for place, number in enumerate(order)}  # not used yet, in order
    while pool:
        target = int(rng.integers(shortest, longest + 1)) + 1  # n positions are n + 1 tokens
        topic = next(iter(pool))
        chosen, left = [topic], target - pool[topic].tokens - min(target // 4, _ROOM * spec.references)
        for place in topics.related(topic, pool)[: max(spec.related - 1, 0)]:
            if pool[place].tokens <= left:
                chosen.append(place)
                left -= pool[place].tokens
        spread = [pool.pop(place) for place in chosen]
        others, missed = [], 0
        for place in list(pool):
            if missed == _MISSES or left <= 0:
                break
            if pool[place].tokens <= left:
                left -= pool[place].tokens
                others.append(pool.pop(place))
                missed = 0
            else:
                missed += 1
        segments = [part.turns for part in spread_out(spread, others, rng)]
        yield tuple(turn for segment in refer_back(segments, target, spec, template, rng) for turn in segment)


def spread_out(related: list[Part], others: list[Part], rng: np.random.Generator) -> list[Part]:
    """Return all parts in one order: the others as they are, each related one anywhere in its own equal stretch."""
    gaps = np.linspace(0, len(others) + 1, len(related) + 1)
    places = []
    for begin, end in pairwise(gaps):
        low = math.floor(begin)
        places.append(int(rng.integers(low, max(math.ceil(end), low + 1))))
    found: list[Part] = []
    for gap in range(len(others) + 2):
        found += [part for part, place in zip(related, places, strict=True) if place == gap]
        found += others[gap : gap + 1]
    return found


def refer_back(
    segments: list[Conversation], target: int, spec: Extend, template: ChatTemplate, rng: np.random.Generator
) -> list[Conversation]:
    """Return the segments with turns between them that refer to an earlier one, as many as asked for and as fit."""

    def size(of: list[Conversation]) -> int:
        return len(template.encode(tuple(turn for segment in of for turn in segment)).ids)

    used = size(segments)
    inserted: list[tuple[int, Conversation]] = []
    for place in sorted(rng.integers(1, len(segments) + 1, spec.references).tolist()):
        exchange = reference_to(segments[:place], rng)
        if exchange and used + (more := size([exchange])) <= target:
            inserted.append((place, exchange))
            used += more
    result: list[Conversation] = []
    for place, segment in enumerate(segments):
        result += [exchange for at, exchange in inserted if at == place]
        result.append(segment)
    return [*result, *(exchange for at, exchange in inserted if at == len(segments))]


def reference_to(segments: list[Conversation], rng: np.random.Generator) -> Conversation | None:
    """Return a question about one earlier turn, and its answer: that turn is quoted, in words that no other begins
    with, and what stands on its other side is repeated. None where no turn can be told apart.
    """
    turns = [turn for segment in segments for turn in segment]
    exchanges = [(turns[n], turns[n + 1]) for n in range(0, len(turns), 2)]
    text, quotes_user = REFERENCES[int(rng.integers(len(REFERENCES)))]
    begins = Counter(_quote((asked if quotes_user else answered).content) for asked, answered in exchanges)
    fit = [
        (asked, answered)
        for asked, answered in exchanges
        if answered.trained
        and begins[_quote((asked if quotes_user else answered).content)] == 1
        and len((answered if quotes_user else asked).content) <= _REPEATED_CHARACTERS
    ]
    if not fit:
        return None
    asked, answered = fit[int(rng.integers(len(fit)))]
    meant, wanted = (asked, answered) if quotes_user else (answered, asked)
    return Turn(USER, text.format(quote=_quote(meant.content))), Turn(ASSISTANT, wanted.content)


def _quote(text: str) -> str:
    words = text.split()
    return " ".join(words[:_QUOTED_WORDS]) + ("..." if len(words) > _QUOTED_WORDS else "")


class Topics:
    """Index of conversations by topic: the more rare words two share, the more related they are."""

    def __init__(self, conversations: list[Conversation]) -> None:
        self._words = [self._of(turns) for turns in conversations]
        self._where: dict[str, list[int]] = defaultdict(list)
        for number, words in enumerate(self._words):
            for word in words:
                self._where[word].append(number)
        self._total = len(conversations)

    @staticmethod
    def _of(turns: Conversation) -> list[str]:
        found = (match[0].lower() for turn in turns for match in _WORD.finditer(turn.content))
        return list(dict.fromkeys(found))[:_WORDS]

    def related(self, topic: int, among: Any) -> list[int]:
        """Return the conversations of `among` that share words with `topic`, the most related first."""
        scores: dict[int, float] = defaultdict(float)
        for word in self._words[topic]:
            where = self._where[word]
            if 2 <= len(where) <= max(2, self._total // _COMMON):
                for number in where:
                    scores[number] += math.log(self._total / len(where))
        return sorted((n for n in scores if n != topic and n in among), key=lambda n: (-scores[n], n))
