"""Scores of answers: RULER's string matches, and the first line alone.

all    share of the references that the answer contains, in any case
part   1 if the answer contains one of the references, in any case
line   1 if the answer's first line is the reference
"""

from __future__ import annotations

import re
from collections.abc import Sequence

ALL, PART, LINE = RULES = ("all", "part", "line")
#: RULER scripts/eval/evaluate.py: each becomes a line end
_CONTROL = re.compile(r"[\x00-\x1f]")


def clean(text: str) -> str:
    """Return an answer as it is judged: control characters are line ends, and none stands around it."""
    return _CONTROL.sub("\n", text.strip()).strip()


def hits(rule: str, text: str, references: Sequence[str]) -> list[bool]:
    """Return, for each reference, whether an answer has it."""
    answer = clean(text)
    if rule == LINE:
        line = answer.partition("\n")[0].strip()
        return [line == reference for reference in references]
    return [reference.lower() in answer.lower() for reference in references]


def score(rule: str, text: str, references: Sequence[str]) -> float:
    """Return the score of an answer, from 0 to 1."""
    found = hits(rule, text, references)
    return float(any(found)) if rule == PART else sum(found) / len(found)
