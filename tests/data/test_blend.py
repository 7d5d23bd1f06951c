"""The blend schema: units, shares, and errors that name the key."""

from __future__ import annotations

import re

import pytest

from nemotron_h.core.errors import UserError
from nemotron_h.core.units import parse_count
from nemotron_h.data.blend import load_blend
from nemotron_h.data.blend_files import available_blends


@pytest.mark.parametrize(
    ("written", "count"),
    [
        ("15T", 15 * 10**12),
        ("380B", 380 * 10**9),
        ("5M", 5_000_000),
        ("1.5k", 1500),
        (7, 7),
        ("250_000", 250_000),
        (1e6, 10**6),
    ],
)
def test_token_counts(written, count):
    assert parse_count(written) == count


@pytest.mark.parametrize("written", ["", "T", "-5M", "0", "1.0001k1", "1.00001k", "12X", True, "nan", float("inf")])
def test_what_is_no_token_count(written):
    with pytest.raises(ValueError, match="not a token count"):
        parse_count(written)


def test_a_category_splits_over_its_sources_by_weight(corpus):
    corpus.content["sources"]["web"]["weight"] = 3
    shares = corpus.blend().source_shares(0)
    assert shares == pytest.approx({"web": 0.525, "more": 0.175, "wiki": 0.1, "code": 0.2})


def test_normalisation_is_explicit(corpus):
    corpus.content["phases"][1]["weights"]["wiki"] = 29.1
    with pytest.raises(UserError, match=r"phases\[1\].weights: sum to 99.1, not 100.*normalize: true"):
        corpus.blend()
    corpus.content["phases"][1]["normalize"] = True
    assert corpus.blend().phases[1].category_shares()["web"] == pytest.approx(50 / 99.1)


def test_hash_follows_the_order_of_data_and_nothing_else(corpus):
    first = corpus.blend().hash()
    corpus.content["description"] = "other words"
    corpus.content["sources"]["web"]["licence"] = "CC0"
    assert corpus.blend().hash() == first
    corpus.content["phases"][0]["weights"] = {"web": 71, "wiki": 9, "code": 20}
    assert corpus.blend().hash() != first


BAD = {
    "unknown key sources.web.formt\nDid you mean format": lambda c: c["sources"]["web"].update(formt="jsonl"),
    "unknown key phaess\nDid you mean phases": lambda c: c.update(phaess=[]),
    "unknown key path\nKnown keys there: name, description, tokenizer, chat_template, sources, phases": lambda c: (
        c.update(path="x")
    ),
    "unknown key tokenizer.vocab_sise\nDid you mean vocab_size": lambda c: c["tokenizer"].update(vocab_sise=3),
    "sources.web.format: 'jsonnl' is none of .*Did you mean jsonl": lambda c: c["sources"]["web"].update(
        format="jsonnl"
    ),
    "sources.web: give exactly one of path and fetch": lambda c: c["sources"]["web"].pop("path"),
    "sources.web.validation = 1.5 is not below 1": lambda c: c["sources"]["web"].update(validation=1.5),
    "sources.web.weight": lambda c: c["sources"]["web"].update(weight=-1),
    "weights.wikki: no source has this category. Did you mean wiki": lambda c: c["phases"][0]["weights"].update(
        wikki=1
    ),
    r"phases\[0\].until: give exactly one": lambda c: c["phases"][0].pop("until"),
    r"phases\[0\].until: give exactly one of .* not fraction, tokens": lambda c: c["phases"][0]["until"].update(
        tokens=5
    ),
    r"phases\[1\].until: the last phase": lambda c: c["phases"][1].update(until={"fraction": 0.9}),
    r"phases\[0\].until.last_tokens: '3X'": lambda c: c["phases"][0].update(until={"last_tokens": "3X"}),
    "category 'code' has no weight": lambda c: [p.update(weights={"web": 90, "wiki": 10}) for p in c["phases"]],
    "sources.web.fetch.sdist: pip would run the code of x==1": lambda c: c["sources"]["web"].update(
        fetch={"package": "x==1", "sha256": "0" * 64, "sdist": True, "members": ["*"]}
    ),
    "'-o=Dir::Etc=/x' is not the name of a Debian package": lambda c: c["sources"]["web"].update(
        fetch={"package": "-o=Dir::Etc=/x", "kind": "apt", "members": ["*"]}
    ),
    "sources.web.fetch.package": lambda c: c["sources"]["web"].update(
        fetch={"package": "x", "sha256": "0" * 64, "members": ["*"]}
    ),
    "train_on: no source 'nope'": lambda c: c["tokenizer"].update(train_on=["nope"]),
    "weight.*not.*(number|float|converted)": lambda c: c["sources"]["web"].update(weight="heavy"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_blends_name_key_and_file(corpus, message):
    BAD[message](corpus.content)
    with pytest.raises(UserError) as error:
        corpus.blend()
    assert re.search(message, str(error.value), re.DOTALL), error.value
    assert "local.yaml" in str(error.value)


def test_unknown_blend_lists_the_known():
    with pytest.raises(UserError, match=r"Did you mean sample_small"):
        load_blend("sample_smal")


@pytest.mark.parametrize("name", available_blends())
def test_shipped_blends_load(name):
    blend = load_blend(name)
    assert blend.name == name
    for number in range(len(blend.phases)):
        assert sum(blend.source_shares(number).values()) == pytest.approx(1)


# paper 2.2.3, Fig. 4, transcribed here on its own: rows are categories, columns the four phases, in percent
PAPER = """
web_crawl 59.0 40.7 32.7 13.5
code 20.0 20.0 20.0 20.0
academic 8.8 12.0 12.0 12.0
multilingual 5.0 3.7 3.7 3.7
crawl_plus_plus 4.0 7.0 7.0 7.0
math 2.9 14.0 10.8 10.8
wiki 0.3 1.7 1.1 1.1
sft 0 0 12.6 31.8
"""


@pytest.mark.parametrize("name", ["nemotron_h", "sample", "sample_small"])
def test_shipped_phases_are_the_papers(name):
    phases = load_blend(name).phases
    table = {row.split()[0]: [float(x) for x in row.split()[1:]] for row in PAPER.strip().splitlines()}
    for number, phase in enumerate(phases):
        assert {c: phase.weights.get(c, 0.0) for c in table} == {c: row[number] for c, row in table.items()}
    assert [p.until.fraction for p in phases[:2]] == [0.6, 0.8]
    if name == "nemotron_h":
        assert phases[2].until.end(15 * 10**12) == 14.62e12


def test_a_blend_is_a_difference_to_another():
    whole, short = load_blend("nemotron_h"), load_blend("nemotron_h_short")
    assert short.sources == whole.sources
    assert short.tokenizer == whole.tokenizer
    assert [phase.until for phase in short.phases][:2] == [phase.until for phase in whole.phases][:2]
    assert [phase.weights for phase in short.phases] == [phase.weights for phase in whole.phases]
    assert short.phases[2].until != whole.phases[2].until
    # as it was when it was written out
    assert short.hash() == "faad9e874c04aaa08f70ca549985424b01ec86232804cd2acf33f7412d3142e7"


def test_defaults_of_a_blend_that_are_wrong_are_named(tmp_path):
    for name, text, message in (
        ("unknown", "defaults: [nemotron_hh]", "no blend 'nemotron_hh'"),
        ("path", "defaults: [../nemotron_h]", "no blend '../nemotron_h'"),
        ("text", "defaults: nemotron_h", "defaults = nemotron_h"),
        ("first", "defaults: [_self_, nemotron_h]", "defaults = "),
        ("loop", "defaults: [loop]", "lead back to itself"),
        ("key", "defaults: [nemotron_h]\nsuorces: {}", "unknown key suorces"),
    ):
        (tmp_path / f"{name}.yaml").write_text(f"{text}\nname: {name}\n")
        with pytest.raises(UserError, match=re.escape(message)):
            load_blend(tmp_path / f"{name}.yaml")


def test_a_blend_beside_is_a_base_too(tmp_path):
    (tmp_path / "base.yaml").write_text("defaults: [sft]\nsources: {general: {path: mine.jsonl}}\n")
    (tmp_path / "own.yaml").write_text("defaults: [base, _self_]\nname: own\nsources: {general: {weight: 2}}\n")
    blend, sft = load_blend(tmp_path / "own.yaml"), load_blend("sft")
    assert (blend.name, blend.sources["general"].path, blend.sources["general"].weight) == ("own", "mine.jsonl", 2)
    assert blend.sources["code_and_math"] == sft.sources["code_and_math"]
