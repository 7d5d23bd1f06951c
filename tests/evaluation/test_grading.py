"""Graders of the paper's tasks, on answers whose right verdict is known."""

from __future__ import annotations

import time

import pytest

from nemotron_h.evaluation.grading import symbols
from nemotron_h.evaluation.grading.boxed import boxed, final_number
from nemotron_h.evaluation.grading.code import entry_point_of, sanitised
from nemotron_h.evaluation.grading.equality import math_equal
from nemotron_h.evaluation.grading.execution import passed
from nemotron_h.evaluation.grading.latex import Unreadable, expression
from nemotron_h.evaluation.grading.letters import first_letter, stated_letter
from nemotron_h.evaluation.grading.options import likeliest, option_of


@pytest.mark.parametrize(
    ("answer", "letter"), [("B", "B"), (" B.", "B"), ("\n\tC)", "C"), ("", ""), ("  ", ""), ("(B)", "("), ("b", "b")]
)
def test_first_letter(answer: str, letter: str) -> None:
    assert first_letter(answer) == letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("So the answer is (C). Not D.", "C"),
        ("the answer is J", "J"),
        ("Answer: B, while the answer is (C)", "C"),  # the first pattern comes first, wherever it stands
        ("answer:\n D", "D"),
        ("Answer: A\nAnswer: E", "A"),  # `.` ends at a line
        ("It is B, or rather F.", "F"),
        ("It is B. A cat sat there.", "A"),  # the article
        ("The answer is a cat", ""),
        ("CAB and K", ""),  # no letter alone, none up to J
        ("the answer is (K)", ""),
    ],
)
def test_stated_letter(answer: str, letter: str) -> None:
    assert stated_letter(answer) == letter


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1}, so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"So the answer is \boxed{1,234}.", "1,234"),
        (r"$\boxed 5$", "5"),
        (r"\fbox{7}", "7"),
        (r"\boxed{ \left\{ 1, 2 \right\} }", r" \left\{ 1, 2 \right\} "),
        (r"\boxed{3} and then \boxed{4", None),
        (r"\boxed{3\}", None),
        ("no box", None),
        ("\\boxed", None),
    ],
)
def test_boxed(text: str, content: str | None) -> None:
    assert boxed(text) == content


def test_final_number() -> None:
    assert final_number("2+2=<<2+2=4>>4\n#### 1,234") == "1234"
    assert final_number("4") is None


EQUAL = [
    ("1,234", "1234"), ("1{,}234", "1234"), (r"10\,000", "10000"), (r"\$18", "18"), (r"18\%", "18"), ("50", "0.5"),
    ("0.5", "50"), ("0.33333", r"\frac{1}{3}"), (r"\frac12", "0.5"), (r"\dfrac{3}{4}", "3/4"),
    ("-3/4", r"-\frac{3}{4}"),
    (r"1\frac{1}{2}", "1.5"), ("1 1/2", r"\frac{3}{2}"), (r"-1\frac12", "-1.5"), (r"5\text{ cm}", "5"),
    (r"30^\circ", "30"), (r"3 \text{ cm}^2", "3"), ("7 days", "7"), ("Monday", "monday"),
    (r"\text{Tuesday}", "Tuesday"),
    (r"\sqrt3", r"\sqrt{3}"), (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt 2}"), ("sqrt(8)", r"2\sqrt{2}"), ("x=5", "5"),
    ("5", "x = 5"), (r"x \in [2,5)", "[2,5)"), (r"\left[2, 5\right)", "[2,5)"), ("[2,10/2)", "[2,5)"),
    (r"(-\infty,0]\cup(2,3)", r"(-\infty, 0] \cup (2, 6/2)"), ("1, 2, and 3", "1,2,3"), ("2 or 3", "2,3"),
    ("(1,0.5)", r"(1,\frac{1}{2})"), ("2 million", r"2 \times 10^6"), ("(x+1)^2", "x^2+2x+1"), ("2x", "x*2"),
    (r"\sin^2 x + \cos^2 x", "1"), (r"\log_2 8", "3"), (r"\binom{5}{2}", "10"), ("5!", "120"), ("e^{i\\pi}", "-1"),
    (r"\begin{pmatrix}1\\0.5\end{pmatrix}", r"\begin{pmatrix} 1 \\ \frac12 \end{pmatrix}"), (r"\text{(B)}", "B"),
    ("{5}", "5"), ("x_1", "x_{1}"), (r"101_{2}", "101_2"), ("y=2x+1", "y = 1+2x"), (r"\sqrt[3]{8}", "2"), ("|-3|", "3"),
    ("x^10", "x^{10}"), (r"\frac{1}{2}\pi", r"\frac{\pi}{2}"), ("hours", "hours"), ("3.", "3"), ("0.9999", "0.99991"),
]  # fmt: skip
UNEQUAL = [
    ("2", "3"), ("", "3"), ("(2,5)", "[2,5)"), ("[2,5]", "[2,5)"), ("2,1", "1,2"), ("1,2,3", "1,2"), ("12", "1,2"),
    ("x^2", "x"), ("0.333", "1/3"), ("7 hours", "8 hours"), ("Tuesday", "Monday"), ("listen", "silent"),
    ("101", "101_2"),
    ("x=5", "y=6"), ("x>5", "5"), (r"\frac{1}{0}", "1"), ("import os", "1"), ("10^{10^{10^{10}}}", "1"),
    ("500", "0.05"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"), ("hours", "minutes"), ("2^{", "2"),
    ("(" * 300 + "1", "1"), ("9" * 900 + "/7", "1"), ("1.001", "1"),
]  # fmt: skip


def test_math_equal() -> None:
    """Percent either way, as the grader that is followed has it; brackets and order of lists count."""
    assert [pair for pair in EQUAL if not math_equal(*pair)] == []
    assert [pair for pair in UNEQUAL if math_equal(*pair)] == []
    assert not math_equal("(1, 50)", "(1, 0.5)", percent=False)
    assert math_equal("x = 1,234", "1234", percent=False)


def test_symbols_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison that takes too long is wrong, and the next one is answered."""
    monkeypatch.setattr(symbols, "LIMIT_S", 1e-6)
    began = time.monotonic()
    assert not symbols.same_value("(x+1)^{200}(y-x)^{200}", "(y-x)^{200}(x+2)^{200}")
    assert time.monotonic() - began < 60
    monkeypatch.undo()
    assert symbols.same_value("x+x", "2x")
    symbols.stop()


@pytest.mark.parametrize("text", ["", "1+", "__import__('os')", "x;0", "1;2", r"\unknown{2}", "500!", "2^{99999999}"])
def test_unreadable(text: str) -> None:
    with pytest.raises(Unreadable):
        expression(text)


COMPLETION = '''Here is the code:
import math
LIMIT = 2
UNUSED = open("nowhere")

def helper(x):
    return x + LIMIT

def shows(x):
    print(x)

def other():
    return 1

def f(x):
    """Docs."""
    return math.floor(helper(x))

def f(x):
    return 0

print(f(1))
That is it.
def g(x'''


def test_sanitised() -> None:
    code = sanitised(COMPLETION, "f")
    assert code == (
        "import math\nLIMIT = 2\ndef helper(x):\n    return x + LIMIT\n"
        'def f(x):\n    """Docs."""\n    return math.floor(helper(x))\n'
    )
    values: dict = {}
    exec(code, values)  # our own text
    assert values["f"](1.5) == 3
    # without a definition that returns, the range that parses stays whole
    without = "def f(x):\n    x.append(1)"
    assert sanitised(f"{without}\nnot python here", "f") == without
    assert sanitised("nothing to run here", "f") == ""
    assert sanitised("x = 1\0", "f") == ""
    assert sanitised("class A:\n  pass\n@wrap\ndef f():\n  return A", "f").startswith("class A")


def test_entry_points() -> None:
    assert entry_point_of("assert set(similar((3, 4))) == set((3, 4))") == "similar"
    assert entry_point_of("assert math.isclose(area(2), 4)") == "area"
    assert entry_point_of("assert True") == ""


def test_programs() -> None:
    """What fails, ends early, waits for more than its time or memory, is wrong; and outlives nothing."""
    programs = {
        "def f(x):\n    return x\nassert f(1) == 1\nprint('much ' * 10**6)": True,
        "assert 1 == 2": False,
        "import sys; sys.exit(0)": False,
        "import os; os._exit(0)": False,
        "x = bytearray(10**11)": False,
        "while True: pass": False,
        "from __future__ import annotations\nimport os\nassert 'SECRET_TOKEN' not in os.environ": True,
        "def f(:": False,
    }
    assert [*passed([*programs])] == [*programs.values()]


def test_options() -> None:
    assert option_of("3", ["1", "2", "3", "4", "5"]) == 2
    assert option_of("C ", ["A", "B", "C"]) == 2
    with pytest.raises(ValueError, match="D"):
        option_of("D", ["A", "B", "C"])
    assert likeliest([3.0, 2.0, 2.0]) == 1
    assert likeliest([4.0, 3.0], ["long text", "no"]) == 0
