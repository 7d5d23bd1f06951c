"""Questions of the Berkeley Function Calling Leaderboard (BFCL v2, single turn), of files as its package has them, and
what its categories come to.

FOLDER/BFCL_v3_CATEGORY.json                   a JSON line each: id, question, function
       possible_answer/BFCL_v3_CATEGORY.json   id, ground_truth
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemotron_h.core.errors import UserError
from nemotron_h.evaluation.grading.foreign_calls import JAVA, JAVASCRIPT
from nemotron_h.evaluation.tasks import read_records

#: categories whose calls the package runs, with keys of web services; here they are not asked
EXECUTED = ("exec_simple", "exec_multiple", "exec_parallel", "exec_parallel_multiple", "rest")
#: share of each category in the score of those that are not live: nine parts of equal weight, the first of which is the
#: mean of three languages, another that of two kinds of calls that are run
_SHARES = {
    **dict.fromkeys(("simple", JAVA, JAVASCRIPT), 1 / 27),
    **dict.fromkeys(("multiple", "parallel", "parallel_multiple", "irrelevance"), 1 / 9),
    **dict.fromkeys(("exec_simple", "rest"), 1 / 18),
    **dict.fromkeys(("exec_multiple", "exec_parallel", "exec_parallel_multiple"), 1 / 9),
}
SINGLE_TURN, NON_LIVE, LIVE, NOT_RUN = "single_turn", "non_live", "live", "not_run"


def _file(folder: Path, category: str) -> Path:
    return folder / f"BFCL_v3_{category}.json"


def lacking(folder: Path, parts: Mapping[str, int]) -> list[str]:
    """Return what is lacking to measure any category, in sentences."""
    asked = [name for name in parts if name not in EXECUTED]
    if any(_file(folder, name).is_file() for name in asked):
        return []
    return [f"no {_file(folder, asked[0])} or other category; the data of the package nvidia-bfcl are such a folder"]


def records(
    folder: Path, parts: Mapping[str, int], limit: int | None
) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
    """Return the records of all categories with their places, and remarks on those that are not there.

    A record also has `category`, `functions` (the descriptions as a model reads them), and its `ground_truth`.

    Args:
        parts: categories, and how many records each has.
        limit: of each category; None takes all.
    Errors:
        UserError: names the file that is missing, or the record and what it lacks.
    """
    found, missing, remarks = [], [], []
    for category, count in parts.items():
        if category in EXECUTED:
            continue
        file = _file(folder, category)
        if not file.is_file():
            missing.append(category)
            continue
        answers = {} if "relevance" in category else _answers(folder / "possible_answer" / file.name)
        own = _fields(file, ("id", "question", "function"))
        for origin, record in own[:limit]:
            number = _number(record)
            if "relevance" not in category and number not in answers:
                raise UserError(f"{origin}: possible_answer/{file.name} has no {number}")
            more = {"category": category, "ground_truth": answers.get(number, [])}
            try:
                found.append((origin, {**record, **more, "functions": described(record["function"], category)}))
            except (AttributeError, KeyError, TypeError) as error:
                raise UserError(f"{origin}: its functions are not described as the package does: {error!r}") from error
        if (asked := len(own[:limit])) != count:
            remarks.append(f"{category}: {asked:,} of {count:,} questions")
    if missing:
        remarks.append(f"no files of {', '.join(missing)}: they count as 0")
    if executed := [name for name in parts if name in EXECUTED]:
        remarks.append(f"{', '.join(executed)} are not asked and count as 0: their calls would have to be run")
    return found, remarks


def _answers(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(f"there is no {file}", hint="the right answers lie there, as in the package nvidia-bfcl")
    return {_number(record): record["ground_truth"] for _, record in _fields(file, ("id", "ground_truth"))}


def _number(record: Mapping[str, Any]) -> str:
    """Return the part of an id that numbers the records of a category, all that questions and answers share."""
    return str(record["id"]).partition("-")[0]


def _fields(file: Path, names: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for number, record in enumerate(read_records(file), 1):
        lacks = [name for name in names if not isinstance(record, dict) or name not in record]
        if lacks:
            raise UserError(f"{file}, record {number} lacks {lacks[0]}", hint="write it as the package has it")
        found.append((f"{file}, record {number}", record))
    return found


def described(functions: Sequence[Mapping[str, Any]], category: str) -> list[dict[str, Any]]:
    """Return descriptions of functions as a model reads them: with the language, and in Java and JavaScript all
    parameters as text whose description names the type.
    """
    language = {JAVA: "Java", JAVASCRIPT: "JavaScript"}.get(category)
    syntax = {None: "Python 3", "Java": "Java 8 SDK"}.get(language, language)
    copies = copy.deepcopy([*functions])
    for function in copies:
        function["description"] += f" Note that the provided function is in {syntax} syntax."
        if language:
            for parameter in function["parameters"]["properties"].values():
                _as_text(parameter, language)
    return copies


def _as_text(parameter: dict[str, Any], language: str) -> None:
    kind, said = parameter["type"], f" This is {language} {parameter['type']} type parameter in string representation."
    if kind == "any":
        said = f" This parameter can be of any type of {language} object in string representation."
    parameter["description"] += said
    if kind in ("Array", "ArrayList", "array"):
        element = parameter.pop("items")["type"]
        parameter["description"] += f" The list elements are of type {element}; they are not in string representation."
    if kind == "dict" and language == "JavaScript" and "properties" in parameter:
        schema = json.dumps(parameter.pop("properties"))
        parameter["description"] += (
            f" The dictionary entries have the following schema; they are not in string representation. {schema}"
        )
    parameter["type"] = "string"


def row(name: str, parts: Mapping[str, int], verdicts: Sequence[tuple[str, bool]]) -> tuple[float, float]:
    """Return a score of the leaderboard, from 0 to 1, with its standard error over the questions.

    A category without verdicts counts as 0, with as many questions as it has.

    Args:
        name: `NON_LIVE`, `LIVE` (by questions), `SINGLE_TURN` (the mean of both), or ours, `NOT_RUN`: that mean
            without the categories that are run.
        parts: categories, and how many records each has.
        verdicts: on each question, with its category.
    """
    of = {category: [right for each, right in verdicts if each == category] for category in parts}
    mean = error = 0.0
    for category, weight in _weights(name, {each: len(of[each]) or parts[each] for each in parts}).items():
        if count := len(of[category]):
            share = sum(of[category]) / count
            mean += weight * share
            error += weight**2 * share * (1 - share) / max(1, count - 1)
    return mean, math.sqrt(error)


def _weights(name: str, counts: Mapping[str, int]) -> dict[str, float]:
    live = {category: count for category, count in counts.items() if category.startswith("live_")}
    live = {category: count / sum(live.values()) for category, count in live.items()}
    still = {category: _SHARES[category] for category in counts if category not in live}
    if name == NOT_RUN:
        still = {category: share for category, share in still.items() if category not in EXECUTED}
        still = {category: share / sum(still.values()) for category, share in still.items()}
    if name in (LIVE, NON_LIVE):
        return live if name == LIVE else still
    return {category: share / 2 for category, share in (live | still).items()}
