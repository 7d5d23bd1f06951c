"""Instructions of IFEval (2311.07911) that a text follows or not, by the rules of lm-evaluation-harness' ifeval.

An instruction is a name, such as `keywords:existence`, and arguments. Of sentences and languages, `language` tells.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from nemotron_h.evaluation.grading import language

_LESS, _LEAST = RELATIONS = ("less than", "at least")
_OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_POSTSCRIPTS = {"P.P.S": r"\s*p\.\s?p\.\s?s.*$", "P.S.": r"\s*p\.\s?s\..*$"}
#: ends the first word of a paragraph
_AFTER_WORD = re.compile(r"[.,?!'\"].*", re.DOTALL)
_FENCES = ("```json", "```Json", "```JSON", "```")
#: ours: a text on which every instruction can be tried
_SAMPLE = "This is one sentence."

Arguments = Mapping[str, Any]


class Followed(NamedTuple):
    """Verdicts on the instructions of a prompt: by the answer itself, and by the likeliest of its variants."""

    strict: list[bool]
    loose: list[bool]


def followed(text: str, record: Mapping[str, Any]) -> Followed:
    """Return which instructions of a record an answer follows."""
    return Followed(_verdicts([text], record), _verdicts(variants(text), record))


def check(record: Mapping[str, Any]) -> None:
    """Try the instructions of a record, so that what is wrong with one is told before a model answers.

    Errors:
        ValueError: an instruction is unknown, or lacks an argument, or it is none that can be used.
        UserError: what tells sentences or languages is not there.
    """
    if len(record["instruction_id_list"]) != len(record["kwargs"]):
        raise ValueError(f"{len(record['instruction_id_list'])} instructions and {len(record['kwargs'])} kwargs")
    if unknown := [name for name in record["instruction_id_list"] if name not in CHECKS]:
        raise ValueError(f"the instruction {unknown[0]} is unknown")
    _verdicts([_SAMPLE], record)


def variants(text: str) -> list[str]:
    """Return an answer, and it without its first line, its last one or both; all of them without asterisks too."""
    lines = text.split("\n")
    cut = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    return [each for whole in (text, *cut) for each in (whole, whole.replace("*", ""))]


def _verdicts(texts: Sequence[str], record: Mapping[str, Any]) -> list[bool]:
    instructions = [*zip(record["instruction_id_list"], record["kwargs"], strict=True)]
    said = [text for text in texts if text.strip()]
    return [any(CHECKS[name](text, arguments) for text in said) for name, arguments in instructions]


def _compared(count: int, relation: str, threshold: int) -> bool:
    if relation not in RELATIONS:
        raise ValueError(f"{relation!r} is none of {', '.join(RELATIONS)}")
    return count < threshold if relation == _LESS else count >= threshold


def _found(pattern: str, text: str) -> list[str]:
    return re.findall(pattern, text, flags=re.IGNORECASE)


def _paragraphs(text: str, arguments: Arguments) -> bool:
    """Return True if so many parts stand between `***`; an empty one may be the first or the last alone."""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", text)]
    return all(parts[1:-1]) and sum(map(bool, parts)) == arguments["num_paragraphs"]


def _first_word(text: str, arguments: Arguments) -> bool:
    number, place, word = (arguments[name] for name in ("num_paragraphs", "nth_paragraph", "first_word"))
    parts = text.split("\n\n")
    count = sum(bool(part.strip()) for part in parts)
    if count != number or place > count or not (paragraph := parts[place - 1].strip()):
        return False
    return _AFTER_WORD.sub("", paragraph.split()[0].lstrip("'").lstrip('"')).lower() == word.lower()


def _postscript(text: str, arguments: Arguments) -> bool:
    marker = arguments["postscript_marker"].strip()
    pattern = _POSTSCRIPTS.get(marker, rf"\s*{marker.lower()}.*$")
    return bool(re.search(pattern, text.lower(), flags=re.MULTILINE))


def _bullets(text: str, arguments: Arguments) -> bool:
    counts = [len(re.findall(each, text, flags=re.MULTILINE)) for each in (r"^\s*\*[^\*].*$", r"^\s*-.*$")]
    return sum(counts) == arguments["num_bullets"]


def _highlights(text: str, arguments: Arguments) -> bool:
    single = [part.strip("*") for part in re.findall(r"\*[^\n\*]*\*", text)]
    double = [part.removeprefix("**").removesuffix("**") for part in re.findall(r"\*\*[^\n\*]*\*\*", text)]
    return sum(bool(part.strip()) for part in (*single, *double)) >= arguments["num_highlights"]


def _sections(text: str, arguments: Arguments) -> bool:
    marks = re.findall(rf"\s?{arguments['section_spliter'].strip()}\s?\d+\s?", text)
    return len(marks) >= arguments["num_sections"]


def _json(text: str, arguments: Arguments) -> bool:
    text = text.strip()
    for fence in _FENCES:
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str, arguments: Arguments) -> bool:
    return any(part.lstrip("<").rstrip(">").strip() for part in re.findall(r"<<[^\n]+>>", text))


def _two_responses(text: str, arguments: Arguments) -> bool:
    parts = [part.strip() for part in text.split("******")]
    said = [part for part in parts if part]
    return all(parts[1:-1]) and len(said) == 2 and said[0] != said[1]


def _end(text: str, arguments: Arguments) -> bool:
    return text.strip().strip('"').lower().endswith(arguments["end_phrase"].strip().lower())


def _quotation(text: str, arguments: Arguments) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


# every word is looked for, so that `check` tries all patterns
CHECKS: dict[str, Callable[[str, Arguments], bool]] = {
    "keywords:existence": lambda text, a: all([_found(word, text) for word in a["keywords"]]),
    "keywords:frequency": lambda text, a: _compared(
        len(_found(a["keyword"].strip(), text)), a["relation"], a["frequency"]
    ),
    "keywords:forbidden_words": lambda text, a: (
        not any([_found(rf"\b{word}\b", text) for word in a["forbidden_words"]])
    ),
    "keywords:letter_frequency": lambda text, a: _compared(
        text.lower().count(a["letter"].strip().lower()), a["let_relation"], a["let_frequency"]
    ),
    "language:response_language": lambda text, a: language.is_in(text, a["language"]),
    "length_constraints:number_sentences": lambda text, a: _compared(
        len(language.sentences(text)), a["relation"], a["num_sentences"]
    ),
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": lambda text, a: _compared(
        len(re.findall(r"\w+", text)), a["relation"], a["num_words"]
    ),
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": lambda text, a: (
        len(re.findall(r"\[.*?\]", text)) >= a["num_placeholders"]
    ),
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": lambda text, a: any(option in text for option in _OPTIONS),
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": lambda text, a: text.strip().lower().startswith(a["prompt_to_repeat"].strip().lower()),
    "startend:end_checker": _end,
    "startend:quotation": _quotation,
    "change_case:capital_word_frequency": lambda text, a: _compared(
        sum(word.isupper() for word in language.words(text)), a["capital_relation"], a["capital_frequency"]
    ),
    "change_case:english_capital": lambda text, a: text.isupper() and language.is_in(text, "en"),
    "change_case:english_lowercase": lambda text, a: text.islower() and language.is_in(text, "en"),
    "punctuation:no_comma": lambda text, a: "," not in text,
}
