"""A cache of a teacher's logits is refused where it is of another run or not whole; its size is as announced."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from nemotron_h.core.errors import UserError
from nemotron_h.planning.teacher_logits import token_bytes
from nemotron_h.training.stages.distillation import teacher_cache as cache
from nemotron_h.training.stages.distillation.teacher_cache import Header
from nemotron_h.training.stages.distillation.teacher_shards import (
    WithTeacher,
    kept_probability,
    text_digest,
    write_shard,
)

LENGTH, BATCH, VOCABULARY = 6, 2, 32
PLAN = {
    "blend": "words",
    "blend_hash": "b",
    "seed": 1,
    "seq_length": LENGTH,
    "global_batch_size": BATCH,
    "sources": {"low": {"tokens": 100, "sha256": "c"}},
    "phases": [{"name": "all", "first_step": 0, "end_step": 4, "shares": {"low": 1.0}}],
}
HEADER = Header(
    teacher={"checkpoint": "runs/parent/checkpoints/step-000012", "model": {}, "weights": "w"},
    plan=PLAN,
    validation={"low": "v"},
    document_reset=False,
    top_k=3,
    vocabulary=VOCABULARY,
    precision="fp32",
    steps=4,
    validation_windows=2,
).sized()


class Windows:
    """Stands for a `WindowDataset`."""

    training = True

    def __init__(self, first: int = 0) -> None:
        self.first = first

    def __len__(self) -> int:
        return HEADER.windows("train")

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"tokens": torch.arange(LENGTH) + 10 * index + self.first}


def tensors(windows: range, top_k: int | None = 3) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(windows.start)
    logits = torch.randn(len(windows), LENGTH, VOCABULARY, generator=rng)
    kept = logits.topk(top_k or VOCABULARY)
    return {
        "values": kept.values if top_k else logits,
        **({"ids": kept.indices.to(torch.uint16)} if top_k else {}),
        "logsumexp": logits.logsumexp(-1),
        "text": torch.tensor([text_digest(Windows()[index]["tokens"]) for index in windows]),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole cache."""
    cache.write_header(tmp_path, HEADER)
    for split in cache.SPLITS:
        for number, windows in HEADER.shards(split).items():
            write_shard(cache.shard_path(tmp_path, split, number), tensors(windows))
    return tmp_path


def test_a_window_is_read_as_it_was_written(folder: Path) -> None:
    held = cache.read_header(folder)
    assert held == HEADER
    assert list(held.shards("train").values()) == [range(2), range(2, 4), range(4, 6), range(6, 8)]
    cache.check_complete(folder, held, HEADER)
    dataset = WithTeacher(Windows(), folder, held, "train")
    for index in range(len(dataset)):
        item, written = dataset[index], tensors(range(index - index % 2, index - index % 2 + 2))
        assert torch.equal(item["teacher_values"], written["values"][index % 2])
        assert torch.equal(item["teacher_ids"].int(), written["ids"][index % 2].int())
    sums = [tensors(windows) for windows in HEADER.shards("train").values()]
    kept = torch.stack([(t["values"] - t["logsumexp"].unsqueeze(-1)).exp().sum(-1).mean() for t in sums]).mean()
    assert kept_probability(folder, held) == pytest.approx(float(kept), abs=1e-5)


@pytest.mark.parametrize("top_k", [3, None])
def test_the_announced_size_is_that_of_the_files(tmp_path: Path, top_k: int | None) -> None:
    header = dataclasses.replace(HEADER, top_k=top_k)
    path = cache.shard_path(tmp_path, "train", 0)
    windows = range(40)
    write_shard(path, tensors(windows, top_k))
    assert 0 <= path.stat().st_size - len(windows) * header.window_bytes < 1500  # names, shapes, hashes of the text


def test_a_published_run_in_bytes() -> None:
    """By hand: 64 values of 2 bytes, ids of 4 (131,072 words), and 4 of the log-sum-exp."""
    assert token_bytes(64, 131_072, "bf16") == 64 * 6 + 4
    assert token_bytes(64, 65_536, "fp32") == 64 * 6 + 4
    assert token_bytes(None, 131_072, "fp8_current_scaling") == 2 * 131_072 + 4


def test_files_that_are_missing_or_cut_off(folder: Path) -> None:
    cache.shard_path(folder, "train", 2).unlink()
    cut = cache.shard_path(folder, "validation", 0)
    cut.write_bytes(cut.read_bytes()[:-1])
    assert cache.missing(folder, HEADER) == [("train", 2), ("validation", 0)]
    with pytest.raises(UserError, match=r"not complete: 2 files are missing or cut off, train-000002") as error:
        cache.check_complete(folder, HEADER, HEADER)
    assert "distill-cache RECIPE goes on" in error.value.hint
    with pytest.raises(UserError, match=r"train-000002\.safetensors is damaged"):
        WithTeacher(Windows(), folder, HEADER, "train")[5]


def test_a_longer_run_is_not_served(folder: Path) -> None:
    phases = [{**PLAN["phases"][0], "end_step": 6}]
    longer = dataclasses.replace(HEADER, steps=6, plan={**PLAN, "phases": phases}, validation_windows=4)
    cache.check_fits(folder, HEADER, longer)  # the same beginning: the rest can be written
    with pytest.raises(UserError, match="8 of 12 windows of train; 2 of 4 windows of validation"):
        cache.check_complete(folder, HEADER, longer)
    shorter = dataclasses.replace(HEADER, steps=3, plan={**PLAN, "phases": [{**PLAN["phases"][0], "end_step": 3}]})
    cache.check_fits(folder, HEADER, shorter)
    cache.check_complete(folder, HEADER, shorter)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": {"checkpoint": "runs/other", "weights": "x"}}, "distill.teacher: runs/parent.* -> runs/other"),
        ({"plan": {**PLAN, "seed": 2}}, "data.seed: 1 -> 2"),
        ({"plan": {**PLAN, "seq_length": 12}}, "data.seq_length: 6 -> 12"),
        ({"plan": {**PLAN, "sources": {"low": {"tokens": 100, "sha256": "d"}}}}, "data.blend: source low: other cont"),
        ({"validation": {"low": "w"}}, "data.blend: source low: other validation text"),
        ({"document_reset": True}, "data.document_reset: False -> True"),
        ({"top_k": 4}, "distill.top_k: 3 -> 4"),
        ({"top_k": None}, "distill.top_k: 3 -> null"),
        ({"vocabulary": 64}, "parallel.tensor: .* 32 words -> 64"),
    ],
)
def test_a_cache_of_another_run(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        cache.check_fits(folder, HEADER, dataclasses.replace(HEADER, **changes))
    assert "distill.teacher_logits" in error.value.message
    assert "distill-cache" in error.value.hint


def test_fewer_tokens_than_are_kept(folder: Path) -> None:
    cache.check_fits(folder, HEADER, dataclasses.replace(HEADER, top_k=2, teacher={}))


def test_another_text_in_the_same_place(folder: Path) -> None:
    with pytest.raises(UserError, match="holds another text than the run's window 3 of train"):
        WithTeacher(Windows(first=1), folder, HEADER, "train")[3]


def test_folders_that_are_no_cache(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no cache in") as error:
        cache.read_header(tmp_path)
    assert "nemotron-h distill-cache" in error.value.hint
    (tmp_path / cache.HEADER).write_text('{"format": 1, "steps": 3}')
    with pytest.raises(UserError, match=r"cache\.json is not readable"):
        cache.read_header(tmp_path)
