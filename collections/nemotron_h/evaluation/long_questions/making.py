"""Make conversations about contexts of chosen lengths, of documents to train on and of those held out."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from nemotron_h.data.chat import ChatTemplate
from nemotron_h.data.messages import ASSISTANT, USER, Conversation, Turn, text_of
from nemotron_h.data.prepare.shards import document_hash, is_validation
from nemotron_h.evaluation.long_questions.context import ABSENT, INTRODUCTION, Context, Fact, fill, planted
from nemotron_h.evaluation.long_questions.corpus import Corpus, quotes
from nemotron_h.evaluation.long_questions.kinds import Question, Source, questions

#: ours: tokens of a context for each planted fact, and facts for each chain; fewest of both, most facts for a question
_TOKENS_OF_FACT, _FACTS_OF_CHAIN, _FEWEST, _MOST = 500, 3, 2, 4
#: ours: links of a chain on average, tokens that are kept free for a question, and at most this part of a context
_LINKS, _ROOM, _PART = 3, 80, 4
#: ours: other documents whose sentences are asked for in vain, and characters of each that are looked at
_FOREIGN, _FOREIGN_CHARACTERS = 8, 20_000
#: ours: orders of a conversation's questions, of which the hashes hold out one in 50
_ORDERS = 1000


class Plan(NamedTuple):
    """Contexts to make.

    Attributes:
        lengths: positions of a conversation -> its share of all tokens.
        questions: of a conversation.
        kinds: names of kinds.
        absent: share of questions whose answer the documents do not have.
        validation: share of documents that are held out, and what the blend holds out of the conversations.
        tokens: most tokens of all conversations; None takes the whole corpus.
        seed: of all draws.
    """

    lengths: Mapping[int, float]
    questions: int
    kinds: Sequence[str]
    absent: float
    validation: float
    tokens: int | None
    seed: int


@dataclass(frozen=True)
class Made:
    """A conversation with its context and questions, and what it takes: its length was asked for."""

    length: int
    held_out: bool
    context: Context
    asked: list[Question]
    turns: Conversation
    tokens: int


@dataclass
class Maker:
    """Conversations about a corpus.

    Attributes:
        left: characters of documents that are in no context yet, of the part that is being made.
        skipped: why documents or contexts were left out -> how many.
    """

    corpus: Corpus
    template: ChatTemplate
    plan: Plan
    left: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def conversations(self, held_out: bool) -> Iterator[Made]:
        """Yield the conversations of a part, in lengths whose shares hold at all times."""
        plan, documents = self.plan, self.corpus.documents[held_out]
        rng = random.Random(f"{plan.seed} {held_out}")
        pool, made = rng.sample(documents, len(documents)), Counter()
        share = plan.validation if held_out else 1 - plan.validation
        most = float("inf") if plan.tokens is None else plan.tokens * share
        while pool and made.total() < most:
            length = max(plan.lengths, key=lambda each: plan.lengths[each] * (made.total() + each) - made[each])
            each = self._conversation(pool, length, held_out, rng)
            self.left = sum(map(len, pool))
            if each is not None:
                made[length] += each.tokens
                yield each

    def _conversation(self, pool: list[str], length: int, held_out: bool, rng: random.Random) -> Made | None:
        """Return a conversation of the pool's next documents; None where they give none, which is counted."""
        plan = self.plan
        facts, chains = _facts(length, plan)
        fact = self._size(" " + Fact("account number", "orange-heron", "1234567").sentence) + 2
        room = min(length // _PART, _ROOM * plan.questions)
        budget = length - self._size(introduction()) - fact * (facts + _LINKS * chains) - room
        texts, passed = fill(pool, budget, self._size)
        self.skipped["documents of which no whole sentence fits"] += passed
        if sum(map(self._size, texts)) < budget // 2:
            self.skipped["documents that are too little for one more context"] += len(texts)
            return None
        context = planted(texts, facts, chains, rng)
        asked = questions(self._source(context, held_out, rng), plan.kinds, plan.questions, plan.absent, rng)
        while asked and self._tokens(turns_of(context, asked)) > length:
            asked.pop()
        if not asked:
            self.skipped["contexts without a question"] += 1
            return None
        for _ in range(_ORDERS):  # preparation holds out by a conversation's hash: it is to say what the documents' do
            turns = turns_of(context, asked)
            right = is_validation(document_hash(text_of(turns)), plan.validation) == held_out
            if right and (tokens := self._tokens(turns)) <= length:
                return Made(length, held_out, context, asked, turns, tokens)
            rng.shuffle(asked)
        self.skipped["contexts with too few questions: no order of them has a hash of their part"] += 1
        return None

    def _source(self, context: Context, held_out: bool, rng: random.Random) -> Source:
        """Return what questions are drawn from: none to train on quotes a sentence that a held-out document has."""
        documents = self.corpus.documents[held_out]
        others = rng.sample(documents, min(_FOREIGN, len(documents)))
        foreign = [sentence for text in others for sentence in quotes(text[:_FOREIGN_CHARACTERS])]

        def allowed(sentence: str) -> bool:
            return held_out or document_hash(sentence) not in self.corpus.held_out

        return Source(context, [each for each in context.quotes if allowed(each[1])], [*filter(allowed, foreign)])

    def _size(self, text: str) -> int:
        return len(self.template.tokenizer.text_to_ids(text))

    def _tokens(self, turns: Conversation) -> int:
        """Return the positions that a conversation takes: one less than its tokens."""
        return len(self.template.encode(turns).ids) - 1


def _facts(length: int, plan: Plan) -> tuple[int, int]:
    """Return how many facts and chains a context has."""
    facts = max(_FEWEST, min(length // _TOKENS_OF_FACT, _MOST * plan.questions))
    return facts * ("fact" in plan.kinds), max(_FEWEST, facts // _FACTS_OF_CHAIN) * ("chain" in plan.kinds)


def introduction() -> str:
    """Return what a conversation begins with."""
    return INTRODUCTION.format(absent=ABSENT)


def prompt_of(context: Context, question: Question) -> str:
    """Return a context with its introduction and a question."""
    return f"{introduction()}\n\n{context.text}\n\n{question.text}"


def turns_of(context: Context, asked: Sequence[Question]) -> Conversation:
    """Return questions with their answers, the first of them behind the context."""
    turns = []
    for number, question in enumerate(asked):
        turns.append(Turn(USER, question.text if number else prompt_of(context, question)))
        turns.append(Turn(ASSISTANT, question.answer))
    return tuple(turns)
