r"""Answers in a form in which what is the same reads the same, for `equality`. After NeMo-Skills' math grader."""

from __future__ import annotations

import re

#: NeMo-Skills' math grader: predictions are truncated
LONGEST = 1000
_UNITS = (
    "degrees?|cm|centimet(?:er|re)s?|mm|km|kilomet(?:er|re)s?|met(?:er|re)s?|miles?|mph|kph|kg|grams?|pounds?|ounces?|"
    "lit(?:er|re)s?|gallons?|inch(?:es)?|foot|feet|ft|yards?|seconds?|minutes?|hours?|days?|weeks?|months?|years?|"
    "dollars?|cents?|units?|points?"
)
#: after a number or on its own; "day" is no part of a weekday's name
_UNIT = re.compile(rf"(?:\b(?:square|cubic)\s+)?(?<![\\a-zA-Z])(?:{_UNITS})(?![a-zA-Z])(?:\s*\^\{{?[23]\}}?)?")
_WRAPPER = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}")
_DEGREE = re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree|°")
_MEMBER = re.compile(r"^[a-zA-Z]\s*\\in(?![a-z])\s*")
_SCALES = {"million": 6, "billion": 9, "trillion": 12}
_MIXED_LATEX = re.compile(r"(?<![\d.}^_])(\d+)\s*\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}")
_MIXED = re.compile(r"(?<![\d.])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d.])")
#: \frac12, \frac1{2} and \frac{1}2 as \frac{1}{2}; \sqrt3 as \sqrt{3}
_BARE_FRACTION = re.compile(r"\\([dtc]?)frac\s*(\{[^{}]*\}|\d)\s*(\{[^{}]*\}|\d)")
_BARE_ROOT = re.compile(r"\\sqrt\s*(\d|[a-zA-Z])")


def normalised(text: str) -> str:
    r"""Return an answer without what does not change it.

    Dollar and percent signs, wrappers such as \text, units, degrees, outer braces, \left and \right, "x \in" are left
    out; "and" and "or" are commas, "million" is a power of ten; short forms of fractions and roots are whole, and mixed
    numbers are sums.
    """
    text = text[:LONGEST].strip()
    for _ in range(3):  # wrappers in wrappers
        text = _WRAPPER.sub(r" \1 ", text)
    text = re.sub(r"\\left(?![a-z])|\\right(?![a-z])|\\displaystyle", "", text)
    text = re.sub(r"(?<=\d)\s*(?:\\,|\\!|\{,\}|~)\s*(?=\d{3}(?!\d))", ",", text)
    text = re.sub(r"(?<!\\)\\[!,;: ]|\\q?quad|~", " ", text.replace(r"\!,", ",").replace("{,}", ","))
    text = _DEGREE.sub("", re.sub(r"\\?[$%]", "", text))
    text = _without(_UNIT, text)
    text = _MEMBER.sub("", text.strip().rstrip("."))
    text = re.sub(r"(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])", ",", text)
    for word, power in _SCALES.items():
        text = re.sub(rf"(\d)\s*{word}\b", rf"\1*10^{power}", text)
    text = _BARE_FRACTION.sub(lambda m: rf"\frac{{{m[2].strip('{}')}}}{{{m[3].strip('{}')}}}", text)
    text = _BARE_ROOT.sub(r"\\sqrt{\1}", text)
    text = _MIXED_LATEX.sub(r"(\1+\\frac{\2}{\3})", text)
    text = _MIXED.sub(r"(\1+\2/\3)", text)
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", re.sub(r"\s+", "", text))
    text = re.sub(r",+", ",", text).strip(",")
    while text.startswith("{") and _closing(text) == len(text) - 1:
        text = text[1:-1]
    return text


def _without(pattern: re.Pattern, text: str) -> str:
    """Return a text without matches; the text where nothing is left, as an answer that is a unit itself."""
    return rest if (rest := pattern.sub("", text)).strip() else text


def _closing(text: str) -> int:
    """Return the place of the brace that closes the first; -1 without one."""
    depth = 0
    for place, letter in enumerate(text):
        escaped = place and text[place - 1] == "\\"
        depth += 0 if escaped else {"{": 1, "}": -1}.get(letter, 0)
        if not depth:
            return place
    return -1


def parts(text: str, separator: str) -> list[str]:
    """Return what a separator stands between, outside of brackets and braces."""
    found, depth, begin, place = [], 0, 0, 0
    while place < len(text):
        letter = text[place]
        depth += (letter in "([{") - (letter in ")]}")
        if depth <= 0 and text.startswith(separator, place):
            found.append(text[begin:place])
            begin = place = place + len(separator)
        else:
            place += 1
    return [*found, text[begin:]]
