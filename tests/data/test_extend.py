"""Conversations joined to long ones: lengths, every turn once, references that have one answer, masks by token."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from nemotron_h.core.errors import UserError
from nemotron_h.data.blend import Extend, load_blend
from nemotron_h.data.chat import FAMILY_SOURCE, ChatTemplate
from nemotron_h.data.messages import Conversation, Turn
from nemotron_h.data.prepare.extend import Part, join, reference_to, spread_out, without_system
from nemotron_h.data.prepare.pipeline import prepare
from nemotron_h.data.tokenizer import BPETokenizer, load_tokenizer, train_bpe

TOKENS = 2048
WORDS = ["Seas", "Rivers", "Trees", "Stars", "Wool", "Bread"]
NEW = re.compile(
    r'Earlier (I asked|you answered): "(.*)" What (did you answer|had I asked)\? Repeat it word by word\.', re.S
)


def conversation(number: int) -> Conversation:
    """One or two exchanges about one of six topics, whose words no other topic has."""
    rng = np.random.default_rng(number)
    topic = WORDS[number % len(WORDS)].lower()
    said = [" ".join(f"{topic}{rng.choice(list('abcdefgh'))}" for _ in range(rng.integers(3, 25))) for _ in range(4)]
    turns = [
        Turn("user", f"{number}: {said[0]}?"),
        Turn("assistant", f"{number} is {said[1]}.", trained=number % 9 != 3),
    ]
    if number % 3 == 0:
        turns += [Turn("user", f"And {number}, {said[2]}?"), Turn("assistant", said[3])]
    return tuple(turns)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    texts = [" ".join(turn.content for n in range(40) for turn in conversation(n))]
    return ChatTemplate(FAMILY_SOURCE, train_bpe(texts, 330, tmp_path_factory.mktemp("bpe")))


@pytest.fixture(scope="module")
def parts(template: ChatTemplate) -> list[Part]:
    return [Part(turns, len(template.encode(turns).ids)) for turns in map(conversation, range(240))]


def joined(parts, template, seed: int = 1, **settings) -> list[Conversation]:
    spec = Extend(tokens=TOKENS, seed=seed, **settings)
    return list(join(parts, spec, template, np.random.default_rng(seed)))


def exchanges(turns: Conversation) -> list[tuple[Turn, Turn]]:
    return [(turns[n], turns[n + 1]) for n in range(0, len(turns), 2)]


def test_samples_are_full_and_hold_every_conversation_once(template, parts) -> None:
    samples = joined(parts, template)
    lengths = [len(template.encode(turns).ids) - 1 for turns in samples]
    assert max(lengths) <= TOKENS
    assert np.mean(lengths[:-1]) > 0.75 * TOKENS
    kept = [pair for turns in samples for pair in exchanges(turns) if not NEW.fullmatch(pair[0].content)]
    expected = [pair for part in parts for pair in exchanges(part.turns)]
    key = lambda pair: [(t.content, t.trained) for t in pair]  # noqa: E731
    assert sorted(map(key, kept)) == sorted(map(key, expected))
    assert len(samples) > 4
    assert joined(parts, template) == samples
    assert joined(parts, template, seed=2) != samples


def test_references_mean_one_earlier_turn_and_repeat_its_other_side(template, parts) -> None:
    places, kinds = [], set()
    for turns in joined(parts, template):
        pairs = exchanges(turns)
        for place, (asked, answered) in enumerate(pairs):
            found = NEW.fullmatch(asked.content)
            if not found:
                continue
            of_user = found[1] == "I asked"
            kinds.add(of_user)
            quote = found[2].removesuffix("...")
            before = [p for p in pairs[:place] if not NEW.fullmatch(p[0].content)]
            meant = [p for p in before if p[0 if of_user else 1].content.startswith(quote)]
            assert len(meant) == 1
            assert meant[0][1].trained
            assert answered == Turn("assistant", meant[0][1 if of_user else 0].content)
            places.append(place / len(pairs))
    assert kinds == {True, False}
    assert len(places) > 20
    assert min(places) < 0.3
    assert max(places) > 0.7


def test_related_conversations_are_found_and_spread(template, parts) -> None:
    """Of the first samples, where every topic still has many conversations left: one topic is well above its share."""

    def most(turns: Conversation) -> float:
        numbers = [int(found[1]) for turn in turns[::2] if (found := re.match(r"(\d+): ", turn.content))]
        return np.bincount([number % len(WORDS) for number in numbers]).max() / len(numbers)

    plain, related = (np.mean([most(t) for t in joined(parts, template, related=n)[:3]]) for n in (1, 14))
    assert related > 0.4
    assert plain < 0.35

    rng = np.random.default_rng(0)
    one = (Turn("user", "x"), Turn("assistant", "y"))
    spread, others = [Part(one, n) for n in range(4)], [Part(one, 100 + n) for n in range(40)]
    seen = []
    for _ in range(20):
        order = [part.tokens for part in spread_out(spread, others, rng)]
        assert [t for t in order if t >= 100] == [p.tokens for p in others]
        at = [order.index(n) for n in range(4)]
        assert at == sorted(at)
        assert all(10 * n <= place - n <= 11 * (n + 1) for n, place in enumerate(at))
        seen.append(at)
    assert len(set(map(tuple, seen))) > 15


def test_a_turn_that_cannot_be_told_apart_is_not_referred_to() -> None:
    same = [(Turn("user", "Why?"), Turn("assistant", "Because."))] * 3
    rng = np.random.default_rng(0)
    assert all(reference_to(same, rng) is None for _ in range(10))
    unlearnt = [(Turn("user", "Why?"), Turn("assistant", "Because.", trained=False))]
    assert all(reference_to(unlearnt, rng) is None for _ in range(10))


def test_a_system_message_begins_the_first_turn() -> None:
    turns = (Turn("system", "Be brief."), Turn("user", "Hi"), Turn("assistant", "Yes?"))
    assert without_system(turns) == (Turn("user", "Be brief.\n\nHi"), Turn("assistant", "Yes?"))


# ---- prepared

BLEND = """
name: long
tokenizer: {kind: bpe, vocab_size: 330}
chat_template: nemotron_h
sources:
  a:
    {category: chat, format: jsonl, chat: messages, path: a.jsonl, validation: 0.2, extend: {tokens: 2048}}
phases:
  - {name: all, weights: {chat: 100}}
"""


def test_the_masks_on_disk_are_exact_by_token_and_held_out_ones_are_apart(tmp_path: Path) -> None:
    """Against a construction by hand out of the decoded samples."""
    records = [
        {"messages": [{"role": t.role, "content": t.content, "weight": int(t.trained)} for t in conversation(n)]}
        for n in range(240)
    ]
    lines = [json.dumps(record) for record in records]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:7], '{"messages": []}', *lines[7:]]))
    (tmp_path / "long.yaml").write_text(BLEND)
    blend = load_blend(tmp_path / "long.yaml")
    manifest = prepare(blend, tmp_path / "data", workers=1, console=Console(quiet=True))
    assert manifest.sources["a"].quarantined == 1  # of 241: below max_bad though the samples are few
    tokenizer: BPETokenizer = load_tokenizer(manifest.tokenizer_path())
    turn = tokenizer.special_tokens["<SPECIAL_11>"]
    trained = {t.content: t.trained for n in range(240) for t in conversation(n) if t.role == "assistant"}
    numbers: dict[str, set[int]] = {}
    for split in ("train", "validation"):
        prefix = manifest.prefix("a", split)
        ids, loss = np.fromfile(prefix + ".bin", np.uint16), np.fromfile(prefix + ".loss", np.uint8)
        expected = np.zeros_like(loss)
        marks = np.flatnonzero(ids == turn)
        begin_of_answer = tokenizer.text_to_ids("Assistant\n")
        learnt = 0
        for mark, after in zip(marks, [*marks[1:], len(ids)], strict=True):
            start = mark + 1 + len(begin_of_answer)
            if ids[mark + 1 : start].tolist() != begin_of_answer:
                continue
            said = tokenizer.ids_to_text(ids[start:after].tolist()).removesuffix("\n")
            if trained.get(said, True):
                expected[start : after + 1] = 1
                learnt += 1
        assert learnt > 20
        assert np.array_equal(loss, expected)
        text = tokenizer.ids_to_text(ids.tolist())
        numbers[split] = {int(n) for n in re.findall(r"User\n(\d+): ", text)}
    assert numbers["train"] | numbers["validation"] == set(range(240))
    assert not numbers["train"] & numbers["validation"]
    assert len(numbers["validation"]) > 20
    again = prepare(blend, tmp_path / "data", workers=1, force=True, console=Console(quiet=True))
    assert again.sources == manifest.sources


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("{tokens: 2048}", "{}", "sources.a.extend.tokens"),
        ("{tokens: 2048}", "{tokens: 2048, min_tokens: 3000}", "min_tokens: 3000 is more than tokens"),
        ("{tokens: 2048}", "{tokens: 2048, references: -1}", "sources.a.extend.references = -1 is below 0"),
        ("validation: 0.2", "deduplicate: true", "not with extend"),
        ("chat: messages", "chat: preference", "extend: only for conversations"),
    ],
)
def test_mistakes_in_a_blend(tmp_path: Path, before: str, after: str, expected: str) -> None:
    assert before in BLEND
    (tmp_path / "long.yaml").write_text(BLEND.replace(before, after))
    with pytest.raises(UserError) as caught:
        load_blend(tmp_path / "long.yaml")
    assert expected in str(caught.value)
