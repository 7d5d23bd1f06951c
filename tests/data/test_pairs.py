"""Pairs of answers: every shape of records to tokens and masks, what is refused, and what lies in a window."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from nemotron_h.core.errors import UserError
from nemotron_h.data.blend import load_blend
from nemotron_h.data.chat import FAMILY_SOURCE, ChatTemplate
from nemotron_h.data.messages import ChatError, Turn
from nemotron_h.data.pairs import REJECTED, encode_pair, read_pair
from nemotron_h.data.prepare.pipeline import prepare
from nemotron_h.data.prepare.verify import verify
from nemotron_h.data.tokenizer import BPETokenizer, load_tokenizer, train_bpe

USER = {"role": "user", "content": "Name a sea."}
GOOD, BAD = {"role": "assistant", "content": "The North Sea."}, {"role": "assistant", "content": "No."}
MORE = [{"role": "system", "content": "Be brief."}, USER, GOOD, {"role": "user", "content": "Another?"}]
#: shape -> a record, its prompt as (role, text), and the two answers
RECORDS = {
    "texts": ({"prompt": "Hi", "chosen": "Hello.", "rejected": "What?"}, [("user", "Hi")], "Hello.", "What?"),
    "texts and a system": (
        {"system": "Be brief.", "prompt": "Hi", "chosen": "Hello.", "rejected": "What?"},
        [("system", "Be brief."), ("user", "Hi")],
        "Hello.",
        "What?",
    ),
    "openai": (
        {"messages": MORE, "chosen": GOOD, "rejected": BAD},
        [(m["role"], m["content"]) for m in MORE],
        "The North Sea.",
        "No.",
    ),
    "lists": (
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        [("user", "Name a sea.")],
        "The North Sea.",
        "No.",
    ),
    "whole conversations": (
        {"prompt": "Name a sea.", "chosen": [*MORE, GOOD], "rejected": [*MORE, BAD]},
        [(m["role"], m["content"]) for m in MORE],
        "The North Sea.",
        "No.",
    ),
    "sharegpt": (
        {
            "conversations": [{"from": "human", "value": "Größe?"}],
            "chosen": {"from": "gpt", "value": "日本 🙂"},
            "rejected": {"from": "gpt", "value": " groß "},
        },
        [("user", "Größe?")],
        "日本 🙂",
        "groß",
    ),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> BPETokenizer:
    texts = ["User Assistant System name a sea and another, be brief.\nHello. What? The North Sea. No. " * 5]
    return train_bpe(texts, 300, tmp_path_factory.mktemp("bpe"))


def by_hand(tokenizer, prompt: list[tuple[str, str]], answer: str) -> tuple[list[int], list[bool]]:
    """Ids and mask of one side, piece by piece: the answer and its end marker alone are learnt."""
    system, turn = (tokenizer.special_tokens[name] for name in ("<SPECIAL_10>", "<SPECIAL_11>"))
    ids: list[int] = []
    for place, (role, text) in enumerate(prompt):
        if role == "system":
            ids += [system, *tokenizer.text_to_ids(f"System\n{text}\n")]
        elif role == "user":
            opened = place and prompt[place - 1][0] == "assistant"  # the answer's end marker opens the turn
            ids += [*([] if opened else [turn]), *tokenizer.text_to_ids(f"User\n{text}\n")]
        else:
            ids += [turn, *tokenizer.text_to_ids("Assistant\n"), *tokenizer.text_to_ids(f"{text}\n"), turn]
    ids += [turn, *tokenizer.text_to_ids("Assistant\n")]
    said = [*tokenizer.text_to_ids(f"{answer}\n"), turn]
    return [*ids, *said], [False] * len(ids) + [True] * len(said)


@pytest.mark.parametrize("shape", RECORDS)
def test_the_mask_is_exact_by_token(tokenizer, shape: str) -> None:
    record, prompt, chosen, rejected = RECORDS[shape]
    encoded = encode_pair(ChatTemplate(FAMILY_SOURCE, tokenizer), read_pair(record))
    sides = [by_hand(tokenizer, prompt, answer) for answer in (chosen, rejected)]
    assert encoded.ids == [*sides[0][0], *sides[1][0]]
    assert encoded.loss == [*map(int, sides[0][1]), *(REJECTED + learnt for learnt in sides[1][1])]
    assert encoded.rewards is not None
    assert all(map(math.isnan, encoded.rewards))


@pytest.mark.parametrize("names", [("chosen_reward", "rejected_reward"), ("score_chosen", "score_rejected")])
def test_rewards_are_read(names: tuple[str, str]) -> None:
    record = RECORDS["texts"][0]
    assert read_pair({**record, names[0]: 2, names[1]: -0.5}).rewards == (2.0, -0.5)
    with pytest.raises(ChatError, match=f"'{names[1]}' is None, not a number"):
        read_pair({**record, names[0]: 1.0})
    with pytest.raises(ChatError, match="nan, not a number"):
        read_pair({**record, names[0]: 1.0, names[1]: math.nan})


def test_whole_conversations_are_the_source_whatever_repeats_them() -> None:
    whole = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
    expected = read_pair(whole)
    for more in (
        {"prompt": USER["content"], "messages": [USER, GOOD], "score_chosen": None},
        {"prompt": [USER], "conversations": [{"from": "human", "value": USER["content"]}]},
        {"question": USER["content"]},
    ):
        assert read_pair({**whole, **more}) == expected
    system = {"role": "developer", "content": "Be brief."}
    with_system = read_pair({"chosen": [system, USER, GOOD], "rejected": [system, USER, BAD]})
    assert read_pair({**whole, "system": "Be brief."}) == with_system  # it stands beside them
    assert (
        read_pair({"system": "Be brief.", "question": USER["content"], "chosen": GOOD, "rejected": BAD}) == with_system
    )


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "the record is list"),
        ({"prompt": "a", "chosen": "b"}, "no field 'rejected'"),
        ({"chosen": "b", "rejected": "c"}, "no prompt"),
        ({"prompt": "a", "messages": [USER], "chosen": "b", "rejected": "c"}, "one prompt is needed"),
        ({"prompt": "a", "chosen": "b", "rejected": "b "}, "answers? are equal|answer are equal"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "'rejected': turn 2 \\(assistant\\) is empty"),
        ({"prompt": [USER, GOOD], "chosen": "b", "rejected": "c"}, "does not end with the user's turn"),
        ({"prompt": "a", "chosen": [USER, GOOD], "rejected": "c"}, "'chosen' begins with a user turn"),
        ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "x"}, BAD]}, "different prompts"),
        ({"prompt": "other", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "than the record's 'prompt'"),
        (
            {"messages": [{**USER, "content": "x"}], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            "than the record's 'messages'",
        ),
        (
            {"system": "x", "prompt": [{"role": "system", "content": "y"}, USER], "chosen": "b", "rejected": "c"},
            "turn 2 is a system message",
        ),
        ({"prompt": "a", "question": "a", "chosen": "b", "rejected": "c"}, "one prompt is needed"),
        (
            {"prompt": "a", "chosen": {**GOOD, "thinking": "x"}, "rejected": {**GOOD, "thinking": "x "}},
            "answer are equal",
        ),
        ({"prompt": "a", "chosen": {"role": "robot", "content": "b"}, "rejected": "c"}, "unknown role 'robot'"),
        ({"prompt": "a", "chosen": 3, "rejected": "c"}, "'chosen' is int, neither text nor messages"),
        ({"prompt": "a", "chosen": {**GOOD, "tool_calls": [1]}, "rejected": "c"}, "calls a tool"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "tools": [1]}, "offers tools"),
    ],
)
def test_what_is_refused(record, message: str) -> None:
    with pytest.raises(ChatError, match=message):
        read_pair(record)


def test_answers_that_a_template_writes_alike_are_refused(tokenizer) -> None:
    blind = "{% for m in messages if m.role == 'assistant' %}{% generation %}x{% endgeneration %}{% endfor %}"
    with pytest.raises(ChatError, match="equal as tokens"):
        encode_pair(ChatTemplate(blind, tokenizer), read_pair(RECORDS["texts"][0]))


# ---- prepared, and in windows

BLEND = """
name: pairs
tokenizer: {kind: bpe, vocab_size: 280}
chat_template: nemotron_h
sources:
  a: {category: p, format: jsonl, chat: preference, path: a.jsonl, licence: ours, validation: 0.2, deduplicate: true}
phases:
  - {name: all, weights: {p: 100}}
"""
SEQ, BATCH = 96, 4
SIZES = {"seq_length": SEQ, "global_batch_size": BATCH, "too_long": "drop"}


def record(number: int) -> dict:
    rng = np.random.default_rng(number)
    said = ["".join(rng.choice(list("abcdefgh"), int(rng.integers(3, 40)))) for _ in range(3)]
    made = dict(zip(("prompt", "chosen", "rejected"), said, strict=True))
    return made if number % 10 == 3 else {**made, "chosen_reward": number / 8, "rejected_reward": -1.0}


def answer_of(ids: np.ndarray, learnt: np.ndarray, tokenizer) -> str:
    return tokenizer.ids_to_text(ids[learnt > 0].tolist())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    lines = [json.dumps(record(n)) for n in [*range(120), 5]]
    (folder / "a.jsonl").write_text(
        "\n".join([*lines[:2], json.dumps({**record(0), "rejected": record(0)["chosen"]}), *lines[2:]])
    )
    (folder / "pairs.yaml").write_text(BLEND)
    prepare(load_blend(folder / "pairs.yaml"), folder / "data", workers=1, console=Console(quiet=True))
    return folder


def module(root: Path, **settings):
    from nemotron_h.data.feed.preference_module import PreferenceDataModule

    values = {**SIZES, "blend": str(root / "pairs.yaml"), "root": str(root / "data"), "seed": 5}
    data = PreferenceDataModule(**{**values, **settings})
    data.trainer = SimpleNamespace(global_step=0, max_steps=10, limit_val_batches=1.0)
    data.setup()
    data.reference = {
        split: {
            name: np.stack([10.0 * np.arange(len(p.lengths)), -np.arange(len(p.lengths))], 1) for name, p in s.items()
        }
        for split, s in data.splits().items()
    }
    return data


def test_bad_pairs_are_counted_with_file_and_line_and_rewards_kept(root: Path) -> None:
    blend = load_blend(root / "pairs.yaml")
    manifest = verify(blend, root / "data", console=Console(quiet=True))
    entry = manifest.sources["a"]
    assert (entry.quarantined, entry.duplicates_dropped) == (1, 1)
    bad = json.loads((Path(manifest.folder) / "a" / "quarantine.jsonl").read_text())
    assert (Path(bad["file"]).name, bad["position"]) == ("a.jsonl", "line 3")
    assert "answer are equal" in bad["reason"]
    file = root / "data" / "pairs" / "a" / "train.rewards"
    content = file.read_bytes()
    try:
        file.write_bytes(bytes([1 ^ content[0]]) + content[1:])
        with pytest.raises(UserError, match=r"a/train\.bin/\.idx/\.loss/\.rewards are not the files"):
            verify(blend, root / "data", console=Console(quiet=True))
    finally:
        file.write_bytes(content)


def test_a_tokenizer_that_is_damaged_names_the_command_that_makes_it_again(root: Path) -> None:
    file = root / "data" / "pairs" / "tokenizer" / "nemotron_h_tokenizer.json"
    content = file.read_bytes()
    try:
        file.write_bytes(content[:-1])
        with pytest.raises(UserError, match="is not the tokenizer that the data of blend 'pairs' was made") as refused:
            _ = module(root).tokenizer
        assert refused.value.hint == f"Run: nemotron-h data prepare --blend {root}/pairs.yaml --root {root}/data"
    finally:
        file.write_bytes(content)


@pytest.mark.parametrize("too_long", ["drop", "cut"])
def test_windows_hold_whole_pairs_with_their_reference_and_rewards(root: Path, too_long: str) -> None:
    data = module(root, too_long=too_long, reward_gap=7.0)
    tokenizer = load_tokenizer(root / "data" / "pairs" / "tokenizer")
    by_answer = {(f"{r['chosen']}\n", f"{r['rejected']}\n"): r for r in map(record, range(120))}
    seen, halves = 0, 0
    for split, sources in data.splits().items():
        pairs = sources["a"]
        dataset = data._dataset(
            data.reference_dataset(split).windows, sources, 10**6, training=False, reference=data.reference[split]
        )
        numbers = []
        for window in range(dataset.windows.filled):
            item = dataset[window]
            ids, mask, seq_idx = (item[key].numpy() for key in ("labels", "loss_mask", "seq_idx"))
            assert int(seq_idx[-1]) in (2 * int(item["pairs"]) - 1, 2 * int(item["pairs"]))
            for n in range(int(item["pairs"])):
                number = round(float(item["reference"][n, 0]) / 10)
                numbers.append(number)
                assert float(item["reference"][n, 1]) == -number
                here = [seq_idx == 2 * n + side for side in (0, 1)]
                said = tuple(answer_of(ids[h], mask[h], tokenizer).replace("<SPECIAL_11>", "") for h in here)
                assert pairs.lengths[number] == sum(h.sum() for h in here)
                if said not in by_answer:
                    halves += 1
                    assert too_long == "cut"
                    assert all(h.sum() <= SEQ for h in here)
                    continue
                chosen_reward = by_answer[said].get("chosen_reward")
                expected = 7.0 if chosen_reward is None else chosen_reward + 1.0
                assert float(item["reward_gap"][n]) == expected
        assert sorted(numbers) == list(range(len(pairs.lengths)))
        seen += len(numbers)
        assert data.manifest.sources["a"].splits[split].documents == len(pairs.lengths) + pairs.dropped
        lost = data.manifest.sources["a"].splits[split].tokens - int(pairs.lengths.sum()) - 2 * len(pairs.lengths)
        assert pairs.tokens_lost == lost
    assert (seen > 110) == (too_long == "cut")
    assert (halves > 5) == (too_long == "cut")


def test_missing_rewards_are_an_error_for_losses_that_read_them(root: Path) -> None:
    module(root, reward_gap=1.0).check_rewards()
    with pytest.raises(UserError, match=r"pairs of source a \(train\) state none"):
        module(root).check_rewards()


def test_the_first_windows_of_training_are_the_reference_s(root: Path) -> None:
    """So that a policy is its reference at the first step, bit for bit."""
    data = module(root)
    dataset = data.reference_dataset("train")
    assert [dataset.windows.window(n) for n in range(8)] == [data.order.window(n) for n in range(8)]


def test_blends_of_other_kinds_are_told_apart(root: Path, tmp_path: Path) -> None:
    from nemotron_h.data.feed.preference_module import PreferenceDataModule
    from nemotron_h.data.feed.sft_module import ConversationDataModule

    with pytest.raises(UserError, match="holds conversations: preference training reads pairs of answers"):
        PreferenceDataModule(blend="sft_sample", **SIZES).blend_spec  # noqa: B018 - reads the file
    with pytest.raises(UserError, match="holds pairs of answers: fine-tuning reads conversations"):
        ConversationDataModule(blend="preference_sample", **SIZES).blend_spec  # noqa: B018
    line = next(line for line in BLEND.splitlines() if line.startswith("  a:"))
    mixed = line.replace("a:", "b:").replace("preference", "messages")
    (tmp_path / "mixed.yaml").write_text(BLEND.replace(line, f"{line}\n{mixed}"))
    with pytest.raises(UserError, match="either all have `chat: preference` or none has"):
        load_blend(tmp_path / "mixed.yaml")


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_nemo_records_every_argument_whatever_was_made_before(order: tuple[int, int]) -> None:
    """NeMo wraps a class's constructor at its first object, and finds a parent's wrapper in a class that has none."""
    from nemo.lightning import io

    from nemotron_h.data.feed.preference_module import PreferenceDataModule
    from nemotron_h.data.feed.sft_module import ConversationDataModule

    class Parent(ConversationDataModule):
        pass

    class Child(PreferenceDataModule, Parent):
        pass

    values = {**SIZES, "micro_batch_size": 2, "workers": 1}
    kinds = [(Parent, {**values, "blend": "a"}), (Child, {**values, "blend": "b", "reward_gap": 3.0})]
    made = [kinds[n][0](**kinds[n][1]) for n in order]
    for data, (kind, arguments) in zip(made, [kinds[n] for n in order], strict=True):
        assert (data.__io__.__fn_or_cls__, data.__io__.__arguments__) == (kind, arguments)
        copy = io.reinit(data)
        assert type(copy) is kind
        assert {key: getattr(copy, key) for key in arguments} == arguments
        assert copy != data
        assert hash(copy)


def test_turns_of_the_prompt_are_never_learnt() -> None:
    pair = read_pair({"messages": MORE, "chosen": GOOD, "rejected": BAD})
    assert [turn.trained for turn in pair.chosen if turn.role == "assistant"] == [False, True]
    assert pair.chosen[:-1] == pair.rejected[:-1]
    assert pair.chosen[-1] == Turn("assistant", GOOD["content"])
