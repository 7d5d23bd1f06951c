"""Problems: answers are read by the stated rules, checks are exact, training and test problems are apart."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from nemotron_h.cli.data import problems as command
from nemotron_h.core.errors import UserError
from nemotron_h.data.blend import load_blend
from nemotron_h.data.messages import read_conversation
from nemotron_h.evaluation.problems import answers
from nemotron_h.evaluation.problems.expressions import Node, key, text
from nemotron_h.evaluation.problems.files import read_problems
from nemotron_h.evaluation.problems.generate import TEST, TRAIN, difficulties, generate
from nemotron_h.evaluation.problems.problem import Problem, problem_of
from nemotron_h.evaluation.problems.tasks import HARDEST, TASKS

EQUATION = re.compile(r"^(-?\d+) ([-+*/]) \(?(-?\d+)\)? = (-?\d+)(?: = (\d+) \(mod (\d+)\))?$")


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("3 + 4 = 7\nAnswer: 7\n", "7"),
        ("Answer:   [1, 2]  \nAnswer: 9", "[1, 2]"),
        ("He pays 3 * 4 = <<3*4=12>>12.\n#### 12", "12"),
        (r"so $\boxed{1}$ or rather \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("\\boxed{5}\nAnswer: 6\n", "6"),
        (r"\boxed{5", None),
        (r"\boxed{ }", None),
        ("The Answer: 7", None),
        ("Answer:\n7", None),
        ("", None),
    ],
)
def test_where_an_answer_stands(said: str, answer: str | None) -> None:
    assert answers.answer_of(said) == answer


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("42", 42),
        (" -7.", -7),
        ("\N{MINUS SIGN}7", -7),
        ("+3", 3),
        ("1,234,567", 1234567),
        ("$1,234.50", Fraction(2469, 2)),
        (r"\$18", 18),
        ("-$5", -5),
        ("3/4", Fraction(3, 4)),
        (r"$\frac{3}{4}$", Fraction(3, 4)),
        (r"-\dfrac{10}{4}", Fraction(-5, 2)),
        (r"\frac12", Fraction(1, 2)),
        (".5", Fraction(1, 2)),
        ("0.1", Fraction(1, 10)),
        ("12 apples", 12),
        ("25%", 25),
        (r"25\%", 25),
        (r"90^\circ", 90),
        (r"5\text{ cm}", 5),
        ("x = 5", 5),
        ("007", 7),
        *((wrong, None) for wrong in ("", "five", "1,23", "12,34", "3 or 4", "2x + 1", "1/0", "1.2.3", "1e5")),
        *(
            (wrong, None)
            for wrong in ("(2, 3)", "7" * 201, r"2\sqrt{3}", "--5", "٣", "\u00b2", "NaN", "inf", r"\frac{1}{}")
        ),
    ],
)
def test_numbers(written: str, value: int | Fraction | None) -> None:
    assert answers.number(written) == value


@pytest.mark.parametrize(
    ("written", "values"),
    [
        ("[3, 1, 2]", (3, 1, 2)),
        ("3 1 -2.", (3, 1, -2)),
        ("3,1", (3, 1)),
        ("[]", ()),
        ("", ()),
        *((wrong, None) for wrong in ("[3, 1", "3, 1]", "[3,, 1]", "[3, 1,]", "[3.5]", "3;1", "[a]", "[[1], 2]")),
    ],
)
def test_lists(written: str, values: tuple[int, ...] | None) -> None:
    assert answers.numbers(written) == values


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("3 + 4 * 2", (11, [3, 4, 2])),
        ("(3+4)*2.", (14, [3, 4, 2])),
        ("7 / 2 * 2", (7, [7, 2, 2])),
        ("7 \N{DIVISION SIGN} 2", (Fraction(7, 2), [7, 2])),
        ("5 - 8", (-3, [5, 8])),
        ("(" * 90 + "1" + ")" * 90, (1, [1])),
        *((wrong, None) for wrong in ("", "3 +", "3 // 2", "2 ** 9", "-3 + 5", "(3", "1/0", "3.5", "x", "3 + 4 = 7")),
        *((wrong, None) for wrong in ("__import__('os')", "05 + 1", "(" * 300 + "1" + ")" * 300, "9" * 5000, "1 2")),
    ],
)
def test_expressions(written: str, value: tuple[Fraction, list[int]] | None) -> None:
    assert answers.expression(written) == value


def test_an_expression_is_right_by_its_value_and_numbers() -> None:
    problem = Problem("countdown", "expression", "Reach 14", [], "(3 + 4) * 2", [2, 3, 4, 9])
    for right in ("2 * (4 + 3)", "9 + 3 + 4 - 2", "3+4+9-2."):
        assert problem.right(right)
    for wrong in ("7 * 2", "2 * 3 + 2 * 4", "3 + 4", "14", "2 * (4 + 3", "9 + 5"):
        assert not problem.right(wrong)
    assert problem.voted("2*(4+3)") == problem.voted("2 * (4 + 3).") != problem.voted("2 * (3 + 4)")
    assert problem.voted("no idea") is None


def _steps_are_true(problem: Problem) -> int:
    """Check every equation among the steps; return how many there are."""
    equations = 0
    for line in problem.steps:
        if found := EQUATION.match(line):
            left, sign, right, value, remainder, modulus = found.groups()
            exact = Fraction(left) / Fraction(right) if sign == "/" else eval(f"{left} {sign} ({right})")
            assert exact == int(value), line
            assert remainder is None or int(value) % int(modulus) == int(remainder), line
            equations += 1
        elif problem.task == "arithmetic":
            values = {eval(part) for part in line.removeprefix("= ").split(" = ")}
            assert values == {int(problem.answer)}, line
            equations += 1
    return equations


def _value(problem: Problem) -> object:
    """Return the answer as Python computes it from the question."""
    asked = problem.question
    if problem.task == "arithmetic":
        return eval(re.fullmatch(r"What is (.*)\?", asked)[1])
    if problem.task == "modular":
        return eval(re.fullmatch(r"What is (.*)\?", asked)[1].replace("mod", "%"))
    if problem.task == "countdown":
        target, given = re.fullmatch(r"Reach (\d+) with (\[.*\]), each once at most, by .*", asked).groups()
        assert eval(given) == problem.given
        assert int(target) not in problem.given
        return int(target)
    values, operations = re.fullmatch(r"Take the list (\[.*?\]): (.*)\.", asked).groups()
    value = eval(values)
    does: dict[str, Callable[[list[int]], object]] = {
        "reverse it": lambda v: v[::-1],
        "sort it": sorted,
        "remove repeated numbers": lambda v: list(dict.fromkeys(v)),
        "give the largest number": max,
        "give the smallest number": min,
        "add its numbers": sum,
    }
    for operation in operations.split(", then "):
        counted = re.fullmatch(r"count how often it has (\d+)", operation)
        value = value.count(int(counted[1])) if counted else does[operation](value)
    return value


@pytest.mark.parametrize("task", TASKS)
def test_generated_problems(task: str) -> None:
    """Answers and steps are those that Python computes; the same seed gives the same; the parts share no question."""
    levels = difficulties(f"2-{HARDEST}")
    train, test = generate(task, 60, levels, 1, TRAIN), generate(task, 60, levels, 2, TEST)
    assert train == generate(task, 60, levels, 1, TRAIN)
    assert train[:40] != generate(task, 40, levels, 3, TRAIN)
    equations = 0
    for problem in (*train, *test):
        value = _value(problem)
        mine = answers.expression(problem.answer)[0] if task == "countdown" else eval(problem.answer)
        assert mine == value
        stated = answers.answer_of(problem.solution)
        assert problem.right(stated)
        assert problem_of(json.loads(json.dumps(vars(problem))), "here") == problem
        wrong = f"{problem.answer} + 1" if task == "countdown" else f"[{problem.answer}, 1]"
        assert not problem.right(wrong)
        equations += _steps_are_true(problem)
    assert task == "lists" or equations > 150
    assert {problem.difficulty for problem in train} == {*range(2, HARDEST + 1)}
    # every training question that there is at another seed is none of the test questions of any seed
    more = {p.question for seed in (5, 6) for p in generate(task, 150, [2], seed, TRAIN)}
    tested = {p.question for seed in (7, 8) for p in generate(task, 60, [2], seed, TEST)}
    assert len(more) > 150
    assert not more & tested


def test_equal_texts_have_one_key() -> None:
    """However a sum was nested: a problem of one text must not be in both parts."""
    one, other = Node("+", 1, Node("-", 2, 3)), Node("-", Node("+", 1, 2), 3)
    assert text(one) == text(other)
    assert key(one) == key(other) == key(Node("-", Node("+", 2, 1), 3)) != key(Node("-", 1, Node("-", 2, 3)))
    assert key(Node("*", 2, Node("*", 3, 4))) == key(Node("*", Node("*", 4, 2), 3))
    assert text(Node("-", 1, Node("-", 2, 3))) == "1 - (2 - 3)"
    assert text(Node("*", Node("+", 1, 2), -3)) == "(1 + 2) * (-3)"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "arithmetics"], "--tasks = 'arithmetics'"),
        (["--tasks", "lists,lists"], "names none, or one twice"),
        (["--tasks", "arithmetic", "--difficulty", "1"], "of difficulty 1 hardly more than"),
        (["--difficulty", "0"], "--difficulty 0 is not within 1-6"),
        (["--difficulty", "3-2"], "--difficulty 3-2 is not within"),
        (["--difficulty", "hard"], "--difficulty 'hard' is no difficulty"),
    ],
)
def test_refused_before_anything_is_written(tmp_path: Path, arguments: list[str], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        _invoke(*arguments, "--count", 3000, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _invoke(*arguments: object):
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def test_the_folder_that_training_reads(tmp_path: Path) -> None:
    options = ["--tasks", "lists,countdown", "--count", 30, "--test-count", 5, "--seed", 4]
    assert _invoke(*options, "--out", tmp_path / "a").exit_code == 0
    _invoke(*options, "--out", tmp_path / "b")
    for task in ("lists", "countdown"):
        content = (tmp_path / "a" / "train" / f"{task}.jsonl").read_text()
        assert content == (tmp_path / "b" / "train" / f"{task}.jsonl").read_text()
        records = [json.loads(line) for line in content.splitlines()]
        assert len({record["text"] for record in records}) == 30
        for record, problem in zip(records, generate(task, 30, [2, 3], 4, TRAIN), strict=True):
            asked, answered = read_conversation(record, "messages")
            assert record["text"] == f"Question: {asked.content}\n{answered.content}\n"
            assert (asked.content, answered.content) == (problem.question, problem.solution)
    read, left_out = read_problems(tmp_path / "a" / "test.jsonl")
    assert left_out == 0
    assert read == [p for task in ("lists", "countdown") for p in generate(task, 5, [2, 3], 4, TEST)]
    assert load_blend(tmp_path / "a" / "problems.yaml").holds() == "texts"
    assert load_blend(tmp_path / "a" / "problems_chat.yaml").holds() == "conversations"


def test_files_of_gsm8k_and_math(tmp_path: Path) -> None:
    file = tmp_path / "gsm8k.jsonl"
    lines = [
        {"question": "How many?", "answer": "3 * 400 = <<3*400=1200>>1200\n#### 1,200"},
        {"problem": "Half?", "solution": r"It is $\boxed{\frac{1}{2}}$.", "level": "Level 1"},
        {"problem": "Bare?", "answer": "7", "solution": "no number"},
        {"problem": "Interval?", "solution": r"\boxed{[2,5)}"},
    ]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    read, left_out = read_problems(file)
    assert [problem.answer for problem in read] == ["1,200", r"\frac{1}{2}", "7"]
    assert left_out == 1
    assert read[0] == Problem("gsm8k", "number", "How many?", ["3 * 400 = <<3*400=1200>>1200"], "1,200", [])
    assert read[0].right("$1200")
    assert read[1].right("0.5")
    assert not read[1].right("0.50001")
    for content, words in (
        ('{"question": "x"}', "line 1 has no text in answer or solution"),
        ('{"question": "x", "answer": "some"}', "the answers of 1 are no numbers"),
        ("[1]", "line 1 is list, not an object"),
        ("{", "line 1 is not JSON"),
        ("\n", "has no problems"),
        (json.dumps({**vars(read[0]), "kind": "word"}), "of kind 'word'"),
        (json.dumps({**vars(read[0]), "given": "x"}), "line 1: given is 'x', not of type list"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=re.escape(words)):
            read_problems(file)
    with pytest.raises(UserError, match="is no answer"):
        replace(read[0], answer="a few")
