"""Answers in text: where a solution states its answer, and what the answer is: a number, a list or an expression.

All is exact: numbers are fractions, and nothing that a model wrote is run.
"""

from __future__ import annotations

import ast
import operator
import re
from fractions import Fraction

from nemotron_h.data.thoughts import after_thought

ANSWER = "Answer:"
#: a line that ends a solution: ours, and GSM8K's `#### 42`
_LINE = re.compile(r"^[ \t]*(?:Answer:|####)[ \t]*(\S[^\n]*?)[ \t]*$", re.MULTILINE)
_BOXED = re.compile(r"\\f?boxed\s*\{")
#: ours: letters that an answer has at most: a model may write digits without end
_LONGEST = 200

_LATEX = (
    (re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"\1/\2"),
    (re.compile(r"\\[dt]?frac\s*(\d)\s*(\d)"), r"\1/\2"),
    (re.compile(r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}"), ""),
    (re.compile(r"\^\s*\{?\\circ\}?|\\(?:left|right|[!,;: ])"), ""),
    (re.compile(r"\\([$%])"), r"\1"),
)
_NUMBER = re.compile(
    r"(?:(?P<minus>-)|\+)?\s*(?P<digits>\d{1,3}(?:,\d{3})+|\d*)(?P<decimals>\.\d+)?(?:\s*/\s*(?P<below>\d+))?"
    r"\s*(?:[%°]|[A-Za-z][A-Za-z .]*)?",
    re.ASCII,
)
_SIGNS = str.maketrans({"\N{MINUS SIGN}": "-", "\N{MULTIPLICATION SIGN}": "*", "\N{DIVISION SIGN}": "/"})
_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def ends_with_answer(text: str) -> bool:
    """Return True if one of the text's lines states an answer, outside of a thought."""
    return bool(_LINE.search(after_thought(text)))


def answer_of(text: str) -> str | None:
    r"""Return the answer that a solution states: behind `Answer:` or `####` in the first line that begins so, else in
    the last `\boxed{}`; None where there is none. A thought states none.
    """
    text = after_thought(text)
    if found := _LINE.search(text):
        return found[1]
    boxes = [box for found in _BOXED.finditer(text) if (box := _up_to_brace(text[found.end() :])) is not None]
    return boxes[-1] if boxes else None


def _up_to_brace(text: str) -> str | None:
    depth = 1
    for place, letter in enumerate(text):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if not depth:
            return text[:place].strip() or None
    return None


def number(text: str) -> Fraction | None:
    r"""Return the number that an answer is; None where it is another thing.

    The rule: what stands before the last `=` is left out, as are `$` and LaTeX's spaces, `\text{...}` and `\left`;
    `\frac{a}{b}` is a/b; commas between groups of three digits are left out; a full stop at the end is, and so is what
    follows the number in letters, `%` or `°`: a unit.
    """
    if len(text) > _LONGEST:
        return None
    text = text.translate(_SIGNS).rpartition("=")[2]
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    text = text.replace("$", "").strip().removesuffix(".")
    found = _NUMBER.fullmatch(text)
    if not found or not (found["digits"] or found["decimals"]) or int(found["below"] or 1) == 0:
        return None
    whole = Fraction(found["digits"].replace(",", "") + (found["decimals"] or "") or "0")
    value = whole / int(found["below"] or 1)
    return -value if found["minus"] else value


def numbers(text: str) -> tuple[int, ...] | None:
    """Return the whole numbers of a list, `[3, 1, 2]` or `3, 1, 2` or `3 1 2`; None where it is none."""
    text = text.strip().removesuffix(".")
    inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if (
        len(text) > _LONGEST
        or not re.fullmatch(r"\s*(?:-?\d+(?:\s*,\s*|\s+|\s*$))*", inner, re.ASCII)
        or inner.rstrip().endswith(",")
    ):
        return None
    return tuple(int(part) for part in re.findall(r"-?\d+", inner))


def expression(text: str) -> tuple[Fraction, list[int]] | None:
    """Return the value of an expression of whole numbers, `+ - * /` and parentheses, and the numbers in it.

    Returns:
        None where it is no such expression, or divides by zero.
    """
    text = text.translate(_SIGNS).strip().removesuffix(".")
    if len(text) > _LONGEST or not re.fullmatch(r"[\d\s+\-*/()]+", text, re.ASCII):
        return None
    used: list[int] = []
    try:
        return _value(ast.parse(text.strip(), mode="eval").body, used), used
    except (SyntaxError, ValueError, ZeroDivisionError, MemoryError, RecursionError):
        return None


def _value(node: ast.expr, used: list[int]) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left, used), _value(node.right, used))
    raise ValueError("no sum, difference, product or quotient of numbers")
