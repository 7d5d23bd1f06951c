"""Rows of short sequences among long ones: shares, windows, counts, resumes, and what is refused."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from test_datamodule import EOD, SEQ, global_batches, loader, module, prepared, started

from nemotron_h.core.errors import UserError
from nemotron_h.data.blend import load_blend
from nemotron_h.data.feed.datamodule import BlendDataModule
from nemotron_h.data.feed.peek import Peek, RunSettings, show
from nemotron_h.data.feed.phase_plan import DataOrder, DataPlan
from nemotron_h.data.feed.rows import Positions, RowSampler, RowSegment, ShortSegment
from nemotron_h.data.indexed import TokenStream
from nemotron_h.recipe.compose import compose

__all__ = ["prepared"]  # a fixture
TOKENS = {"long": 3200, "web": 1111, "code": 777}
LONG, MIX = {"long": 0.7, "web": 0.3}, {"web": 0.6, "code": 0.4}


def sampler(batch: int, share: float, steps: int = 60) -> RowSampler:
    """Three phases: of long rows alone, half of sequences of 8, and of the share in sequences of 16."""
    shorts = [None, ShortSegment(8, 0.5, MIX), ShortSegment(16, share, LONG)]
    rows = steps // 3 * batch
    segments = [RowSegment(f"p{n}", n * rows, (n + 1) * rows, LONG, short) for n, short in enumerate(shorts)]
    return RowSampler(segments, batch, TOKENS, 32, 7, Positions())


@pytest.mark.parametrize(("batch", "share"), [(12, 0.5), (8, 0.3), (1, 0.25), (5, 0.999)])
def test_every_step_and_every_run_of_steps_has_its_share(batch: int, share: float) -> None:
    mixed = sampler(batch, share)
    short = np.array([len(mixed.row(i)) > 1 for i in range(60 * batch)])
    by_step = short.reshape(60, batch).sum(1)
    assert not by_step[:20].any()
    for first, planned in ((20, 0.5), (40, share)):
        counts = by_step[first : first + 20]
        assert counts.sum() == int(20 * batch * planned)
        sums = np.cumsum([0, *counts])
        for begin in range(20):
            for end in range(begin + 1, 21):
                assert abs(sums[end] - sums[begin] - (end - begin) * batch * planned) < 1
    for ranks in (n for n in (2, 3, 4) if batch % n == 0):
        shares = short.reshape(60, batch // ranks, ranks).sum(1)  # ranks take the rows of a step in turn
        assert (shares.max(1) - shares.min(1)).max() <= 1


def test_every_window_comes_once_an_epoch_among_those_of_its_length_and_is_counted() -> None:
    mixed = sampler(12, 0.25)
    seen: dict[tuple, list[int]] = {}
    counted: list[dict[str, Counter]] = [{}, {}, {}]
    for i in range(60 * 12):
        row, phase = mixed.row(i), mixed.phase_of(i)
        length = 32 // len(row)
        assert length in ((32,), (32, 8), (32, 16))[phase]
        for window in row:
            seen.setdefault((length, window.source, window.epoch), []).append(window.window)
            counted[phase].setdefault("short" if len(row) > 1 else "sources", Counter())[window.source] += 1
        if i % 97 == 0:
            held = [{key: dict(n) for key, n in phase.items()} for phase in mixed.consumed(i + 1)]
            assert [{k: v for k, v in phase.items() if v} for phase in held] == counted
    positions = mixed.positions(60 * 12)
    for length, given in ((32, positions.long), *((int(n), p) for n, p in positions.short.items())):
        for source, count in given.items():
            epochs = [windows for (n, name, _), windows in sorted(seen.items()) if (n, name) == (length, source)]
            assert sum(map(len, epochs)) == count
            assert all(len(set(windows)) == len(windows) for windows in epochs)
            assert all(sorted(windows) == list(range(TOKENS[source] // length)) for windows in epochs[:-1])
    assert any(epoch > 0 for _, _, epoch in seen)


def mixed_module(root: Path, short: dict | None, **settings: object) -> BlendDataModule:
    blend = yaml.safe_load((root / "three.yaml").read_text())
    blend["phases"][1]["short"] = short
    path = root / f"mixed{abs(hash(str(short)))}.yaml"
    path.write_text(yaml.safe_dump(blend))
    data = module(root, **settings)
    data.blend = str(path)
    return data


SHORT = {"seq_length": 8, "share": 0.25, "weights": {"web": 40, "code": 60}}


@pytest.mark.parametrize("documents", [False, True])
def test_a_short_row_is_its_windows_side_by_side(prepared: Path, documents: bool) -> None:
    data = started(mixed_module(prepared, SHORT, document_reset=documents))
    dataset = data.train_dataloader().dataset
    kinds = Counter()
    for i in range(60 * 16, 62 * 16):
        item, row = dataset[i], data.order.rows.row(i)
        kinds[len(row)] += 1
        tokens, labels, numbers = [], [], []
        for window in row:
            length = SEQ // len(row)
            stream = TokenStream(str(prepared / "three" / window.source / "train"))
            text = stream.read(window.start, length + 1)
            tokens += text[:-1].tolist()
            labels += text[1:].tolist()
            ends = [0, *np.cumsum(text[: length - 1] == EOD).tolist()]
            before = numbers[-1] + 1 if numbers else 0
            numbers += [before + (n if documents else 0) for n in ends]
        assert item["tokens"].tolist() == tokens
        assert item["labels"].tolist() == labels
        assert item["seq_idx"].tolist() == numbers
        assert item["seq_idx"].dtype == torch.int32
    assert kinds == {1: 24, 4: 8}
    batch = next(iter(loader(started(mixed_module(prepared, SHORT, micro_batch_size=16)))))
    assert batch["seq_idx"].shape == (16, SEQ)
    assert "seq_idx" not in data.val_dataloader().dataset[0] or documents
    assert data.lengths(0) == {SEQ: 1.0}
    assert data.lengths(99) == {SEQ: 0.75, 8: 0.25}


def test_a_resumed_run_reads_the_rows_of_a_straight_one(prepared: Path) -> None:
    straight, rng, state = started(mixed_module(prepared, SHORT)), random.Random(3), None
    for step in sorted(rng.sample(range(1, 100), 8)):
        straight.trainer.global_step = step
        data = started(mixed_module(prepared, SHORT, micro_batch_size=rng.choice([1, 2])), step, straight.state_dict())
        state = json.loads(json.dumps(data.state_dict()))
        assert state == straight.state_dict()
        rows = range(16 * step, 16 * step + 16)
        assert global_batches(data, 1, 2) == [list(rows)]
        assert [data.order.rows.row(i) for i in rows] == [straight.order.rows.row(i) for i in rows]
    counts = state["consumed"][1]
    long, short = (sum(counts[key].values()) for key in ("sources", "short"))
    assert long + short // 4 == 16 * (state["step"] - 60)
    assert short == 4 * int(16 * 0.25) * (state["step"] - 60)
    assert sum(state["short_positions"]["8"].values()) == short
    longer = started(mixed_module(prepared, SHORT, horizon_steps=300), 70, {**straight.order.state_dict(70)})
    assert [longer.order.rows.row(i) for i in range(1600)] == [straight.order.rows.row(i) for i in range(1600)]


def test_a_declared_change_to_short_rows_and_back_repeats_nothing(prepared: Path) -> None:
    def plan(short: dict | None) -> DataPlan:
        data = mixed_module(prepared, short)
        data.trainer = None
        return started(data).order.plan

    plain, mixed = plan(None), plan(SHORT)
    state = DataOrder(plain).state_dict(70)
    with pytest.raises(UserError, match=r"short rows: none -> 0.25 of the rows, sequences of 8"):
        DataOrder.resume(mixed, state)
    second = DataOrder.resume(mixed, state, "from_step")
    assert second.state_dict(70)["positions"] == state["positions"]
    back = DataOrder.resume(plain, second.state_dict(80), "from_step")
    third = DataOrder.resume(mixed, back.state_dict(90), "from_step")
    seen: dict[tuple, list[int]] = {}
    for order, steps in ((DataOrder(plain), (0, 70)), (second, (70, 80)), (back, (80, 90)), (third, (90, 100))):
        for i in range(*(16 * step for step in steps)):
            for window in (row := order.rows.row(i)):
                seen.setdefault((len(row), window.source, window.epoch), []).append(window.window)
    assert all(len(set(windows)) == len(windows) for windows in seen.values())
    assert {n for n, *_ in seen} == {1, 4}
    given = third.state_dict(100)
    assert sum(given["short_positions"]["8"].values()) == 20 * 16
    assert sum(given["positions"].values()) == 1600 - 20 * 4
    other_text = replace(mixed, seed=6)
    assert DataOrder.resume(other_text, given, "from_step").origin.short_positions["8"].keys() == {"web", "code"}


@pytest.mark.parametrize(
    ("short", "message"),
    [
        ({"seq_length": 8, "share": 0.0}, "share = 0.0 is not above 0"),
        ({"seq_length": 8, "share": 1.0}, "share = 1.0 is not below 1"),
        ({"share": 0.5}, "seq_length"),
        ({"seq_length": 8, "share": 0.5, "weights": {"wob": 100}}, "short.weights.wob: no source.*Did you mean web"),
        ({"seq_length": 8, "share": 0.5, "weights": {"web": 60}}, "short.weights: sum to 60, not 100"),
        ({"seq_length": 8, "share": 0.5, "normalize": True}, "short.normalize: unused"),
        ({"seq_length": 9, "share": 0.5}, "seq_length = 9 of phase 'late'.*The nearest below is 8"),
        ({"seq_length": 32, "share": 0.5}, "not a multiple of it, twice or more"),
        ({"seq_length": 8, "share": 0.001}, "share = 0.001 of the 640 rows of phase 'late' is less than a row"),
    ],
)
def test_short_rows_that_cannot_be_are_refused(prepared: Path, short: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"(?s){message}"):
        started(mixed_module(prepared, short))


def test_short_rows_are_refused_before_work(prepared: Path) -> None:
    blend = mixed_module(prepared, SHORT).blend
    with pytest.raises(UserError, match="phase_order = random"):
        started(mixed_module(prepared, SHORT, phase_order="random"))
    recipe = ["tokens=1M", f"data.blend={blend}", "model.vocab_size=8192"]
    with pytest.raises(UserError, match=r"nemotron_h_tiny.*data.blend.*data.seq_length = 60 is not a multiple"):
        compose("nemotron_h_tiny", [*recipe, "data.seq_length=60"])
    chat = yaml.safe_load(Path("data_blends/sft_sample.yaml").read_text())
    chat["phases"][0]["short"] = {"seq_length": 8, "share": 0.5}
    (prepared / "chat.yaml").write_text(yaml.safe_dump(chat))
    with pytest.raises(UserError, match=r"phases\[0\].short: for texts"):
        load_blend(prepared / "chat.yaml")


def test_shares_of_a_phase_are_of_both_kinds_of_rows_and_plain_blends_keep_their_hash(prepared: Path) -> None:
    blend = load_blend(mixed_module(prepared, SHORT).blend)
    shares = blend.source_shares(1)
    assert shares == pytest.approx({"web": 0.15 + 0.1, "code": 0.225 + 0.15, "chat": 0.375})
    assert load_blend("sample_small").hash() == "a8736ded0265b7415399daac171cf604b5a4b47bfba0f3b5f1dc936dd554c1fa"


def test_peek_shows_the_sequences_that_training_reads(prepared: Path) -> None:
    data = started(mixed_module(prepared, SHORT))
    settings = RunSettings(tokens=100 * 16 * SEQ, seq_length=SEQ, global_batch_size=16, seed=5)
    peek = Peek(load_blend(data.blend), settings, prepared)
    dataset, found = data.train_dataloader().dataset, list(peek.samples(80))
    assert [(item.part, item.parts) for item in found[-5:]] == [(3, 4), *((n, 4) for n in range(4))]
    for number in range(80 * 16, 81 * 16):
        tokens = np.concatenate([item.tokens for item in found if item.row == number])
        assert tokens.tolist() == dataset[number]["tokens"].tolist()
    console = Console(record=True, width=160)
    show(peek, 80, console, limit=14)
    text = console.export_text()
    assert "sample 1,292, sequence 2 of 4  source " in text
    assert "and 4 more samples or parts of them" in text
