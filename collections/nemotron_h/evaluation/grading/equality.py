r"""Tell whether an answer to a mathematical question is the reference. After NeMo-Skills' math grader: text, then
numbers, then brackets and lists part by part, then symbols.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

from nemotron_h.evaluation.grading.normalise import normalised, parts
from nemotron_h.evaluation.grading.symbols import same_value

#: NeMo-Skills' math grader: relative
TOLERANCE = 1e-4
_GROUPED = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d*)?$")
_DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?$")
_FRACTION = re.compile(r"([+-]?)(?:\\[dtc]?frac\{(-?\d+)\}\{(-?\d+)\}|(\d+)/(\d+))$")
_ENCLOSED = re.compile(r"(\\\{|[(\[])(.*)(\\\}|[)\]])$", re.DOTALL)
_MATRIX = re.compile(r"\\begin\{([pbvBV]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}$", re.DOTALL)
_NAMED = re.compile(r"[a-zA-Z](?:\([a-zA-Z]\))?=")


def math_equal(answer: str, reference: str, percent: bool = True) -> bool:
    r"""Return whether an answer is the reference.

    With `percent` a number is right too where it is the reference divided or multiplied by 100, as NeMo-Skills' grader
    has it: 50 passes for 0.5. Intervals need the reference's brackets, lists its order. Symbols are compared within
    ten seconds (`symbols`); what cannot be read is wrong unless its text is the reference's.
    """
    return _equal(normalised(answer), normalised(reference), percent)


def number(text: str) -> float | None:
    """Return the number that a normalised text is, commas that group digits and fractions included; else None."""
    if _GROUPED.match(text):
        text = text.replace(",", "")
    if _DECIMAL.match(text):
        return float(text)
    if (match := _FRACTION.match(text)) and int(below := match[3] or match[5]):
        try:
            value = float(Fraction(int(match[2] or match[4]), int(below)))
        except OverflowError:
            return None
        return -value if match[1].startswith("-") else value
    return None


def close(value: float, reference: float, percent: bool) -> bool:
    """Return whether a number is the reference, or that in percent or of percent."""
    others = (reference, reference / 100, reference * 100) if percent else (reference,)
    return any(math.isclose(value, other, rel_tol=TOLERANCE) for other in others)


def _equal(answer: str, reference: str, percent: bool) -> bool:
    if answer.lower() == reference.lower():
        return bool(answer)
    if not answer or not reference:
        return False
    value, expected = number(answer), number(reference)
    if value is not None and expected is not None:
        return close(value, expected, percent)
    if ("=" in answer) != ("=" in reference):  # "x = 5" answers what "5" does
        first, second = (_NAMED.sub("", text, count=1) for text in (answer, reference))
        return "=" not in first + second and _equal(first, second, percent)
    for separator in (r"\cup", ",", "="):
        ours, theirs = parts(answer, separator), parts(reference, separator)
        if len(ours) > 1 or len(theirs) > 1:
            return _pairwise(ours, theirs, percent)
    if (left := _MATRIX.match(answer)) and (right := _MATRIX.match(reference)):
        return _pairwise(_cells(left[2]), _cells(right[2]), percent)
    if (left := _ENCLOSED.match(answer)) and (right := _ENCLOSED.match(reference)):
        ours, theirs = parts(left[2], ","), parts(right[2], ",")
        if len(ours) > 1 or len(theirs) > 1:
            return left.group(1, 3) == right.group(1, 3) and _pairwise(ours, theirs, percent)
    return same_value(answer, reference)


def _pairwise(ours: list[str], theirs: list[str], percent: bool) -> bool:
    return len(ours) == len(theirs) and all(_equal(*pair, percent) for pair in zip(ours, theirs, strict=True))


def _cells(body: str) -> list[str]:
    rows = [row.split("&") for row in re.split(r"\\\\(?:\[[^\]]*\])?", body) if row]
    return [f"{number}:{len(row)}" for number, row in enumerate(rows)] + [cell for row in rows for cell in row]
