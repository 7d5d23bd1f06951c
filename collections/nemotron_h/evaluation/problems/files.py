r"""Problems of files: those of `nemotron-h data problems`, and of GSM8K and MATH where a user has them.

A record of the latter has `question` (or `problem`) and `answer` (or `solution`). The answer is what follows `####` or
stands in the last `\boxed{}`, else the whole field; it has to be a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemotron_h.core.errors import UserError
from nemotron_h.core.files import check_unicode, parse_json, read_text
from nemotron_h.evaluation.problems import answers
from nemotron_h.evaluation.problems.generate import TRAIN, write_lines
from nemotron_h.evaluation.problems.problem import NUMBER, Problem, problem_of

_QUESTIONS, _ANSWERS = ("question", "problem"), ("answer", "solution")


def read_problems(file: Path) -> tuple[list[Problem], int]:
    """Return the problems of a JSONL file, and the number of those that are left out: their answers are no numbers.

    Errors:
        UserError: the file cannot be read, a line is no problem, or none is left.
    """
    problems, left_out = [], 0
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        origin = f"{file}, line {number}"
        record = parse_json(line, origin)
        problem = problem_of(record, origin) if isinstance(record, dict) and "kind" in record else None
        problem = problem or _foreign(record, file.stem, origin)
        left_out += problem is None
        problems += [] if problem is None else [problem]
    if not problems:
        raise UserError(f"{file} has no problems" + (f": the answers of {left_out:,} are no numbers" * bool(left_out)))
    return problems, left_out


def training_problems(path: Path) -> list[Problem]:
    """Return the problems to train on of a folder of `nemotron-h data problems`, or of a file.

    Errors:
        UserError: there are none.
    """
    files = sorted((path / TRAIN).glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise UserError(
            f"{path} has no {TRAIN}/*.jsonl", hint="name a folder of nemotron-h data problems, or a file of problems"
        )
    return [problem for file in files for problem in read_problems(file)[0]]


def keep_problems(folder: Path, problems: Sequence[Problem]) -> None:
    """Write the problems of a folder of samples, `problems.jsonl`, or check that they are those which are there.

    Errors:
        UserError: there are others.
    """
    file = folder / "problems.jsonl"
    if not file.exists():
        write_lines(file, [vars(problem) for problem in problems])
    elif read_problems(file)[0] != list(problems):
        raise UserError(
            f"{file} has other problems than this command asks for",
            hint="name another folder (--out), or the same tasks, count, difficulty and seed",
        )


def _foreign(record: Any, task: str, origin: str) -> Problem | None:
    question, answer = _field(record, _QUESTIONS, origin), _field(record, _ANSWERS, origin)
    stated = answers.answer_of(answer) or answer.strip()
    if answers.number(stated) is None:
        return None
    lines = [line.strip() for line in answer.strip().split("\n")]
    steps = [line for line in lines if line and line != stated and not line.startswith("####")]
    return Problem(task, NUMBER, question.strip(), steps, stated, [])


def _field(record: Any, names: tuple[str, ...], origin: str) -> str:
    if not isinstance(record, dict):
        raise UserError(f"{origin} is {type(record).__name__}, not an object")
    value = next((record[name] for name in names if name in record), None)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{origin} has no text in {' or '.join(names)}")
    return check_unicode(value, origin)
