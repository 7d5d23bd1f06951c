"""IFEval's instructions: followed and not, of every kind, strictly and loosely, and as the package has them."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from nemotron_h.core.errors import UserError
from nemotron_h.data.prepare import fetch
from nemotron_h.evaluation.grading import instructions, language
from nemotron_h.evaluation.grading.instructions import CHECKS, check, followed, variants

pytest.importorskip("langdetect")
GERMAN = "Das ist heute ein wirklich schöner Tag, und wir gehen in den Wald."
ENGLISH = "this is a really nice day today and we will walk in the woods."
#: kind -> arguments, texts that follow it, texts that do not
CASES: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "keywords:existence": ({"keywords": ["sun", "Moon"]}, ["Suns and moons"], ["the sun", ""]),
    "keywords:frequency": (
        {"keyword": "go", "relation": "at least", "frequency": 2}, ["Go, going"], ["go"],
    ),
    "keywords:forbidden_words": ({"forbidden_words": ["sun", "moon"]}, ["sunny"], ["the SUN."]),
    "keywords:letter_frequency": (
        {"letter": "L", "let_relation": "less than", "let_frequency": 3}, ["Hello"], ["Lull, all"],
    ),
    "language:response_language": ({"language": "de"}, [GERMAN], [ENGLISH]),
    "length_constraints:number_sentences": (
        {"relation": "less than", "num_sentences": 3},
        ["Dr. Ann met Mr. Bo at 3 p.m. today. He sang."],
        ["One came. Two came. Three came."],
    ),
    "length_constraints:number_paragraphs": (
        {"num_paragraphs": 2}, ["a\n***\nb", "***\na\n***\nb\n***"], ["a\n\nb", "a\n***\n***\nb", "a***b***c"],
    ),
    "length_constraints:number_words": ({"relation": "at least", "num_words": 4}, ["it's so, no"], ["well-known"]),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Then"},
        ["a\n\n'then, b", "a\n\nThen!"],
        ["a\n\nso then", "Then\n\na", "a\n\nthen b\n\nc", "a\n\n\n\nthen"],
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, ["[name] of [town]"], ["[name], town]"]),
    "detectable_content:postscript": (
        {"postscript_marker": "P.S."}, ["Bye.\np. s. I am late"], ["Bye. PS I am late"],
    ),
    "detectable_format:number_bullet_lists": (
        {"num_bullets": 2}, ["* a\n  - b"], ["* a", "* a\n* b\n* c", "** a\n* b"],
    ),
    "detectable_format:constrained_response": ({}, [" My answer is maybe. "], ["My answer is: yes"]),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2}, ["*a* and *b*", "**a** and **b**"], ["*a*", "* *\n*a*"],
    ),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Section", "num_sections": 2}, ["Section 1\na\nSection 2\nb"], ["Section one, Section 2"],
    ),
    "detectable_format:json_format": ({}, ['```json\n{"a": [1]}\n```', "3"], ["{'a': 1}", 'So: {"a": 1}']),
    "detectable_format:title": ({}, ["<<poem>>\nof joy"], ["<poem>", "<< >>", "<<a\nb>>"]),
    "combination:two_responses": ({}, ["a\n******\nb"], ["a ****** a", "a", "a******b******c", "a************b"]),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say Hi. "}, ["say hi. Hi!"], ["Sure! Say Hi. Hi!"]),
    "startend:end_checker": ({"end_phrase": "Any more? "}, ['"Yes. any MORE?"\n'], ["Any more? Yes."]),
    "startend:quotation": ({}, [' "a" '], ['"', "'a'", '"a" b']),
    "change_case:capital_word_frequency": (
        {"capital_relation": "at least", "capital_frequency": 2}, ["The U.S. is WELL-KNOWN."], ["GOOD Day"],
    ),
    "change_case:english_capital": ({}, [ENGLISH.upper()], [ENGLISH, GERMAN.upper()]),
    "change_case:english_lowercase": ({}, [ENGLISH], [ENGLISH.capitalize(), GERMAN.lower()]),
    "punctuation:no_comma": ({}, ["a; b"], ["a, b"]),
}  # fmt: skip


@pytest.fixture(autouse=True)
def punkt() -> None:
    try:
        language._punkt()
    except UserError as error:
        pytest.skip(f"the package that has Punkt cannot be had: {error}")


def _record(*names: str) -> dict[str, Any]:
    return {"prompt": "?", "instruction_id_list": [*names], "kwargs": [CASES[name][0] for name in names]}


def test_every_kind() -> None:
    assert CASES.keys() == CHECKS.keys()
    assert len(CHECKS) == 25
    for name, (_, right, wrong) in CASES.items():
        check(_record(name))
        for texts, verdict in ((right, True), (wrong, False)):
            got = {text: followed(text, _record(name)).strict for text in texts}
            assert got == {text: [verdict] for text in texts}, name
    assert not followed(" \n", _record("punctuation:no_comma")).strict[0]  # no answer follows nothing


def test_loosely() -> None:
    """An introduction, a last line and asterisks may stand around an answer, each or all of them."""
    assert len(variants("a\n*b*\nc")) == 8
    record = _record("detectable_format:json_format", "punctuation:no_comma", "startend:quotation")
    assert followed("Sure, here:\n[1]", record) == ([False, False, False], [True, True, False])
    assert followed('Sure, here:\n*"a"*\nAnything else?', record) == ([False] * 3, [True, True, True])


def test_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong with an instruction is told before a model answers."""
    with pytest.raises(ValueError, match="keywords:all is unknown"):
        check({"instruction_id_list": ["keywords:all"], "kwargs": [{}]})
    with pytest.raises(ValueError, match="1 instructions and 0 kwargs"):
        check({"instruction_id_list": ["startend:quotation"], "kwargs": []})
    for name, (arguments, _, _) in CASES.items():
        for argument in arguments:
            with pytest.raises((KeyError, TypeError, ValueError)):
                check(
                    {"instruction_id_list": [name], "kwargs": [{k: arguments[k] for k in arguments if k != argument}]}
                )
    with pytest.raises(ValueError, match="'more than' is none of"):
        check(
            {
                "instruction_id_list": ["keywords:frequency"],
                "kwargs": [{**CASES["keywords:frequency"][0], "relation": "more than"}],
            }
        )
    language._punkt.cache_clear()

    def unreachable(*arguments: object) -> None:
        raise UserError("the package cannot be reached")

    monkeypatch.setattr(language, "fetch", unreachable)
    with pytest.raises(UserError, match="cannot be reached") as error:
        check(_record("length_constraints:number_sentences"))
    assert "move ifeval's files away" in error.value.hint
    language._punkt.cache_clear()


def test_as_the_package(tmp_path: Path) -> None:
    """Verdicts on texts of random pieces are those of lm-evaluation-harness, instruction by instruction."""
    nltk = pytest.importorskip("nltk")
    files = fetch.fetch(language._PUNKT)
    shutil.copytree(files[0][1].parent, tmp_path / "tokenizers" / "punkt_tab" / "english")
    nltk.data.path.insert(0, str(tmp_path))
    theirs = pytest.importorskip("lm_eval.tasks.ifeval.utils", reason="lm-evaluation-harness is not installed")
    pieces = [text for _, right, wrong in CASES.values() for text in (*right, *wrong)]
    rng = random.Random(0)
    followed_ones = 0
    for number in range(400):
        names = rng.sample([*CASES], 5)
        text = rng.choice(["\n", " ", "\n\n", "\n***\n", "******"]).join(rng.sample(pieces, rng.randint(1, 4)))
        record = _record(*names)
        example = theirs.InputExample(number, record["instruction_id_list"], "?", record["kwargs"])
        from langdetect import DetectorFactory

        DetectorFactory.seed = language._SEED
        strict = theirs.test_instruction_following_strict(example, text).follow_instruction_list
        loose = theirs.test_instruction_following_loose(example, text).follow_instruction_list
        assert followed(text, record) == (strict, loose), (text, names)
        followed_ones += sum(strict)
    assert 200 < followed_ones < 1800
    assert instructions.RELATIONS == ("less than", "at least")
