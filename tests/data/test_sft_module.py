"""Packed conversations as batches: what a window holds, which rank takes it, and what is cut, left out and held out."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from nemotron_h.core.errors import UserError
from nemotron_h.data.blend import load_blend
from nemotron_h.data.chat import FAMILY_SOURCE, ChatTemplate
from nemotron_h.data.feed.sft_module import ConversationDataModule
from nemotron_h.data.messages import read_conversation
from nemotron_h.data.prepare.pipeline import prepare
from nemotron_h.data.tokenizer import load_tokenizer

SEQ, BATCH = 64, 8
SIZES = {"seq_length": SEQ, "global_batch_size": BATCH, "too_long": "cut"}
BLEND = """
name: talk
tokenizer: {kind: bpe, vocab_size: 270}
chat_template: nemotron_h
sources:
  talk: {category: chat, format: jsonl, chat: prompt_response, path: talk.jsonl, licence: ours, validation: 0.1}
phases:
  - {name: all, weights: {chat: 100}}
"""


def records() -> list[dict]:
    """Conversations of 30 to some 80 tokens, and two whose prompts alone fill a window."""
    rng = np.random.default_rng(0)
    said = ["".join(rng.choice(list("abcdefgh"), rng.integers(2, 12))) for _ in range(300)]
    short = [{"prompt": said[n], "response": said[n] * int(rng.integers(1, 6))} for n in range(200)]
    return [*short, {"prompt": "ab" * SEQ, "response": "yes"}, {"prompt": "cd" * SEQ, "response": "no"}]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    (folder / "talk.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records()))
    (folder / "talk.yaml").write_text(BLEND)
    prepare(load_blend(folder / "talk.yaml"), folder / "data", workers=1, console=Console(quiet=True))
    return folder


def module(root: Path, step: int = 0, **settings) -> ConversationDataModule:
    values = {**SIZES, "blend": str(root / "talk.yaml"), "root": str(root / "data"), "seed": 5}
    data = ConversationDataModule(**{**values, **settings})
    data.trainer = SimpleNamespace(global_step=step, max_steps=10, limit_val_batches=1.0)
    data.setup()
    return data


def batches(data: ConversationDataModule, rank: int = 0, size: int = 1, validation: bool = False):
    data.data_sampler.data_parallel = lambda: (rank, size)
    loader = data.val_dataloader() if validation else data.train_dataloader()
    return iter(data.data_sampler.transform_dataloader(loader))


def encoded(root: Path) -> list[tuple[list[int], list[bool]]]:
    """Every conversation by the template, without the preparation."""
    template = ChatTemplate(FAMILY_SOURCE, load_tokenizer(root / "data" / "talk" / "tokenizer"))
    found = [template.encode(read_conversation(record, "prompt_response")) for record in records()]
    return [(e.ids, e.loss) for e in found]


def parts(batch: dict[str, torch.Tensor]) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]]:
    """The conversations of a batch, cut apart by seq_idx: inputs, labels, mask; padding left out."""
    found = []
    for row in range(len(batch["tokens"])):
        seq_idx = batch["seq_idx"][row]
        for number in range(int(seq_idx[-1]) + 1):
            here = seq_idx == number
            columns = tuple(tuple(batch[key][row][here].tolist()) for key in ("tokens", "labels", "loss_mask"))
            if any(columns[2]):
                found.append(columns)
            else:
                assert number == seq_idx[-1]
                assert not batch["loss_mask"][row][here].any()
    return found


@pytest.mark.parametrize("too_long", ["cut", "drop"])
def test_train_and_validation_hold_every_conversation_once(root: Path, too_long: str) -> None:
    data = module(root, too_long=too_long)
    expected = []
    for ids, loss in encoded(root):
        if len(ids) - 1 > SEQ and (too_long == "drop" or not any(loss[1 : SEQ + 1])):
            continue
        ids, loss = ids[: SEQ + 1], loss[: SEQ + 1]
        expected.append((tuple(ids[:-1]), tuple(ids[1:]), tuple(map(float, loss[1:]))))
    held_out = [part for batch in batches(data, validation=True) for part in parts(batch)]
    windows = len(data.order.round(0))
    dataset = data.train_dataloader().dataset
    trained = [part for n in range(windows) for part in parts({k: v[None] for k, v in dataset[n].items()})]
    assert sorted(trained + held_out) == sorted(expected)
    kept = data.training["talk"]
    counted = data.manifest.sources["talk"].splits["train"]
    assert len(kept.lengths) + kept.dropped == counted.documents
    assert kept.tokens_lost == counted.tokens - sum(kept.lengths + 1)
    assert (kept.cut > 10) == (too_long == "cut")
    assert kept.dropped >= (1 if too_long == "cut" else 10)


def test_a_step_reads_the_same_windows_in_every_layout(root: Path) -> None:
    one = batches(module(root, micro_batch_size=2))
    two = [batches(module(root, micro_batch_size=1), rank, 2) for rank in range(2)]
    for step in range(5):
        alone = [i for _ in range(4) for i in next(one)["sample_ids"].tolist()]
        shared = [i for loader in two for _ in range(4) for i in next(loader)["sample_ids"].tolist()]
        assert sorted(alone) == sorted(shared) == list(range(BATCH * step, BATCH * step + BATCH))


def test_a_resumed_run_reads_on_and_other_data_is_refused(root: Path) -> None:
    straight = batches(module(root))
    expected = [next(straight) for _ in range(5 * BATCH)][3 * BATCH :]
    state = module(root, step=3).state_dict()
    resumed = module(root, step=3)
    with pytest.raises(UserError, match="checkpoint's data state is of step 0"):
        resumed.train_dataloader()
    resumed.load_state_dict(json.loads(json.dumps(state)))
    loader = batches(resumed)
    for batch in expected:
        found = next(loader)
        assert all(torch.equal(found[key], batch[key]) for key in batch)
    with pytest.raises(UserError, match="seed: 5 -> 6"):
        module(root, step=3, seed=6).load_state_dict(state)
    with pytest.raises(UserError, match="not conversations"):
        module(root, step=3).load_state_dict({"step": 3, "plan": {"blend": "words"}})


def test_validation_is_fixed_and_padded(root: Path) -> None:
    first, second = (module(root, seed=seed) for seed in (1, 2))
    one, two = (list(batches(data, validation=True)) for data in (first, second))
    assert len(one) % BATCH == 0
    assert all(torch.equal(a[key], b[key]) for a, b in zip(one, two, strict=True) for key in a)
    limited = module(root)
    limited.trainer.limit_val_batches = 1
    assert len(list(batches(limited, validation=True))) == BATCH


def test_mistakes(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds texts"):
        ConversationDataModule(blend="sample_small", **SIZES).blend_spec  # noqa: B018 - reads the file
    with pytest.raises(UserError, match=r"data\.too_long = 'trim'"):
        module(root, too_long="trim")
    with pytest.raises(UserError, match="no conversation that fits"):
        module(root, seq_length=4)
    file = tmp_path / "none.yaml"
    file.write_text(BLEND.replace("validation: 0.1", "validation: 0").replace("talk.jsonl", str(root / "talk.jsonl")))
    prepare(load_blend(file), tmp_path / "none" / "data", workers=1, console=Console(quiet=True))
    data = module(tmp_path / "none", blend=str(file))
    with pytest.raises(UserError, match="holds out no conversation"):
        data.val_dataloader()


def test_pretraining_refuses_conversations(root: Path) -> None:
    from nemotron_h.data.feed.datamodule import BlendDataModule

    with pytest.raises(UserError, match="holds conversations: pretraining reads text"):
        BlendDataModule(blend=str(root / "talk.yaml"), seq_length=SEQ, global_batch_size=BATCH).blend_spec  # noqa: B018
