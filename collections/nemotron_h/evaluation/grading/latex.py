r"""Read an answer in LaTeX or plain notation as a SymPy expression, by a grammar of our own.

    sum      = product (("+" | "-") product)*
    product  = signed (("*" | "/" | \cdot | \times | \div | nothing) signed)*
    signed   = ("+" | "-") signed | power
    power    = atom ("!" | "^" group)*
    atom     = number | letter | constant | "(" sum ")" | "|" sum "|" | \frac group group | \sqrt [sum] group
             | function [^ group] group

SymPy's `parse_latex` asks for an ANTLR runtime that the configuration library excludes, and its `parse_expr` runs its
text as Python: what a model wrote is never run here.
"""

from __future__ import annotations

import re

import sympy

_TOKEN = re.compile(r"\s*(\\[a-zA-Z]+|\\[{}|!,;: ]|\d+\.\d*|\.\d+|\d+|\*\*|[a-zA-Z]|.)", re.DOTALL)
_SPACING = {r"\,", r"\!", r"\;", r"\:", "\\ ", r"\quad", r"\qquad", r"\left", r"\right", r"\displaystyle", "~"}
_SAME = {
    "**": "^", r"\cdot": "*", r"\times": "*", r"\div": "/",
    "\u00d7": "*", "\u00b7": "*", "\u00f7": "/", "\u2212": "-", r"\{": "(",
    r"\}": ")", "[": "(", "]": ")", r"\lvert": "|", r"\rvert": "|", r"\|": "|", r"\dfrac": r"\frac",
    r"\tfrac": r"\frac", r"\cfrac": r"\frac", "\u03c0": r"\pi", "\u221a": r"\sqrt", "\u221e": r"\infty",
}  # fmt: skip
_CONSTANTS = {r"\pi": sympy.pi, r"\infty": sympy.oo, "e": sympy.E, "i": sympy.I}
_FUNCTIONS = {
    "sin": sympy.sin, "cos": sympy.cos, "tan": sympy.tan, "cot": sympy.cot, "sec": sympy.sec, "csc": sympy.csc,
    "arcsin": sympy.asin, "arccos": sympy.acos, "arctan": sympy.atan, "ln": sympy.log, "exp": sympy.exp,
}  # fmt: skip
_WORDS = re.compile(r"(?<![\\a-zA-Z])(sqrt|pi|infty|arcsin|arccos|arctan|sin|cos|tan|cot|sec|csc|ln|log|exp)(?![a-z])")
_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{4,}")
#: Greek letters are names of variables
_GREEK = re.compile(r"\\(alpha|beta|gamma|delta|epsilon|theta|lambda|mu|rho|sigma|tau|phi|psi|omega)$")
#: ours: deeper nesting, larger powers and factorials are no answer but work without end
_DEPTH, _EXPONENT, _FACTORIAL = 40, 10_000, 200


class Unreadable(ValueError):
    """Text that the grammar does not have."""


def expression(text: str) -> sympy.Expr:
    """Return the expression that a text states.

    Errors:
        Unreadable: it states none.
    """
    reader = _Reader(text)
    value = reader.sum()
    if reader.next():
        raise Unreadable(f"{reader.next()!r} is left over")
    return value


class _Reader:
    """A recursive descent over the tokens of a text."""

    def __init__(self, text: str) -> None:
        text = _WORDS.sub(r"\\\1 ", text)
        if word := _WORD.search(text):  # letters in another order would be the same product
            raise Unreadable(f"{word[0]!r} is a word")
        tokens = (_SAME.get(token, token) for token in _TOKEN.findall(text.strip()) if token not in _SPACING)
        self._tokens, self._place, self._depth = [*tokens], 0, 0

    def next(self) -> str:
        """Return the next token; empty at the end."""
        return self._tokens[self._place] if self._place < len(self._tokens) else ""

    def take(self, expected: str = "") -> str:
        """Return the next token and go on."""
        token = self.next()
        if not token or (expected and token != expected):
            raise Unreadable(f"{token!r} stands where {expected or 'a value'!r} should")
        self._place += 1
        return token

    def sum(self) -> sympy.Expr:
        self._depth += 1
        if self._depth > _DEPTH:
            raise Unreadable("nested too deeply")
        value = self.product()
        while self.next() in ("+", "-"):
            value = value + self.product() if self.take() == "+" else value - self.product()
        self._depth -= 1
        return value

    def product(self) -> sympy.Expr:
        value = self.signed()
        while True:
            if self.next() in ("*", "/"):
                value = value / self.signed() if self.take() == "/" else value * self.signed()
            elif self._begins():
                value = value * self.power()
            else:
                return value

    def signed(self) -> sympy.Expr:
        negative = False
        while self.next() in ("+", "-"):
            negative ^= self.take() != "+"
        value = self.power()
        return -value if negative else value

    def power(self) -> sympy.Expr:
        value = self.atom()
        while self.next() in ("^", "!"):
            if self.take() == "!":
                if not (value.is_Integer and 0 <= value <= _FACTORIAL):
                    raise Unreadable("a factorial of that")
                value = sympy.factorial(value)
            else:
                value = _power(value, self.exponent())
        return value

    def exponent(self) -> sympy.Expr:
        """Read an exponent: in braces, or a token, with its sign; a number whole, as people write x^10."""
        if self.next() in ("+", "-"):
            return self.exponent() if self.take() == "+" else -self.exponent()
        return self.atom()

    def group(self) -> sympy.Expr:
        r"""Read an argument: in braces, or a token; of several digits the first, as in `\frac12`."""
        if self.next() == "{":
            return self._within("{", "}")
        if re.fullmatch(r"\d{2,}", self.next()):
            digits = self.next()
            self._tokens[self._place : self._place + 1] = [digits[0], digits[1:]]
        return self.atom()

    def atom(self) -> sympy.Expr:
        token = self.next()
        if token in ("(", "{"):
            return self._within(token, {"(": ")", "{": "}"}[token])
        if token == "|":
            return sympy.Abs(self._within("|", "|"))
        self.take()
        if token[0].isdigit() or (token[0] == "." and len(token) > 1):
            return sympy.Rational(token) if token[0] != "." else sympy.Rational(f"0{token}")
        if token in _CONSTANTS:
            return _CONSTANTS[token]
        if token == r"\frac":
            return self.group() / self.group()
        if token == r"\binom":
            return self._binomial()
        if token == r"\sqrt":
            root = self._within("(", ")") if self.next() == "(" and self._radical_index() else sympy.Integer(2)
            return _power(self.group(), 1 / root)
        if token == r"\log":
            base = self._subscript(sympy.Integer(10))
            return sympy.log(self._argument(), base)
        if token[1:] in _FUNCTIONS and token[0] == "\\":
            exponent = self._exponent()
            return _power(_FUNCTIONS[token[1:]](self._argument()), exponent)
        if (token.isalpha() and token.isascii()) or _GREEK.match(token):
            return sympy.Symbol(token.removeprefix("\\") + self._index())
        raise Unreadable(f"{token!r} is unknown")

    def _begins(self) -> bool:
        """Return whether a factor follows without a sign."""
        token = self.next()
        return bool(token) and (token[0].isalnum() or token in ("(", "{") or (token[0] == "\\" and len(token) > 2))

    def _within(self, opening: str, closing: str) -> sympy.Expr:
        self.take(opening)
        value = self.sum()
        self.take(closing)
        return value

    def _radical_index(self) -> bool:
        r"""Return whether brackets after `\sqrt` hold the index: an argument follows them, as in `\sqrt[3]{2}`."""
        depth = 0
        for place in range(self._place, len(self._tokens)):
            depth += {"(": 1, ")": -1}.get(self._tokens[place], 0)
            if not depth:
                return self._tokens[place + 1 : place + 2] == ["{"]
        return False

    def _argument(self) -> sympy.Expr:
        if self.next() in ("(", "{", "|"):
            return self.atom()
        value = self.power()
        while self._begins() and self.next()[0] != "\\":  # \sin 2x, and not \sin x \cos x
            value = value * self.power()
        return value

    def _exponent(self) -> sympy.Expr:
        if self.next() != "^":
            return sympy.Integer(1)
        self.take()
        exponent = self.exponent()
        if exponent == -1:
            raise Unreadable("an inverse function")
        return exponent

    def _binomial(self) -> sympy.Expr:
        above, below = self.group(), self.group()
        if not (above.is_Integer and below.is_Integer and 0 <= above <= _FACTORIAL):
            raise Unreadable("a binomial of that")
        return sympy.binomial(above, below)

    def _subscript(self, default: sympy.Expr) -> sympy.Expr:
        if self.next() != "_":
            return default
        self.take()
        return self.group()

    def _index(self) -> str:
        if self.next() != "_":
            return ""
        self.take()
        return f"_{self.group()}"


def _power(base: sympy.Expr, exponent: sympy.Expr) -> sympy.Expr:
    if exponent.is_number and abs(sympy.N(exponent)) > _EXPONENT:
        raise Unreadable("a power beyond bounds")
    if base.is_number and exponent.is_number and base.is_Rational and exponent.is_Integer:
        size = max(base.p.bit_length(), base.q.bit_length()) * abs(int(exponent))
        if size > 64 * _EXPONENT:
            raise Unreadable("a power beyond bounds")
    return base**exponent
