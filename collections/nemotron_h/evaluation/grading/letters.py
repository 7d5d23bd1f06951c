"""Letters that answers to multiple-choice questions name."""

from __future__ import annotations

import re

#: in order: the first that matches tells (nvidia-lm-eval's adlr_mmlu_pro_5_shot_base)
_STATED = (re.compile(r"answer is \(?([A-J])\)?"), re.compile(r".*[aA]nswer:\s*([A-J])"))
_LONE = re.compile(r"\b([A-J])\b")


def first_letter(answer: str) -> str:
    """Return the first character that is no space, which MMLU compares with the right letter; empty without one."""
    return answer.lstrip()[:1]


def stated_letter(answer: str) -> str:
    """Return the letter A to J that a chain of thought ends in, as MMLU-Pro reads it; empty without one.

    "answer is (X)" comes first, then "answer: X", then the last letter that stands alone. The article "A" is such a
    letter too, so an answer that states none can be right by chance.
    """
    for pattern in _STATED:
        if match := pattern.search(answer):
            return match[1]
    return (_LONE.findall(answer) or [""])[-1]
