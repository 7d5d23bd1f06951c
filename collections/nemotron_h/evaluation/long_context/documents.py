"""Questions to documents among others: RULER's QA on SQuAD and HotpotQA.

The prompt is RULER's, word for word (NVIDIA/RULER, scripts/data/synthetic/constants.py, Copyright 2024 NVIDIA
CORPORATION, Apache License 2.0). Documents are in another order for each item; RULER's order is one for all.
"""

from __future__ import annotations

from nemotron_h.evaluation.long_context.item import Draft, Request
from nemotron_h.evaluation.long_context.texts import Questions

_ASKED = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "The following are given documents.\n\n{context}\n\nAnswer the question based on the given documents. Only give me "
    "the answer and do not output any other words.\n\nQuestion: {query}"
)
_ANSWER = " Answer:"


def squad(request: Request) -> Draft:
    """Return a question to a paragraph of Wikipedia, among others of its article and then of any."""
    return _asked(request, request.texts.squad)


def hotpotqa(request: Request) -> Draft:
    """Return a question to several paragraphs of Wikipedia, among the ten that come with it and then any."""
    return _asked(request, request.texts.hotpotqa)


def _asked(request: Request, source: Questions) -> Draft:
    rng, question = request.rng, source.questions[request.number % len(source.questions)]
    chosen, wanted = list(question.gold), min(request.units, len(source.documents)) - len(question.gold)
    chosen += rng.sample(question.near, max(0, min(wanted, len(question.near))))
    if (missing := wanted - len(question.near)) > 0:
        there = {*chosen}
        chosen += rng.sample([number for number in range(len(source.documents)) if number not in there], missing)
    rng.shuffle(chosen)
    context = "\n\n".join(f"Document {place}:\n{source.documents[number]}" for place, number in enumerate(chosen, 1))
    return Draft(_ASKED.format(context=context, query=question.text), _ANSWER, question.answers)
