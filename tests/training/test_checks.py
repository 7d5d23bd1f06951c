"""Checks that need no training: disk, integrity of checkpoints, the schedule's length."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest

from nemotron_h.errors import UserError
from nemotron_h.training import checkpoints


def checkpoint(run: Path, step: int) -> Path:
    """A small finished checkpoint folder."""
    folder = run / "checkpoints" / f"step-{step:06d}"
    (folder / "weights").mkdir(parents=True)
    (folder / "weights" / "a.distcp").write_bytes(bytes(range(256)) * 10)
    (folder / "run.json").write_text("{}")
    checkpoints.write_integrity(folder, checkpoints.describe(folder, checkpoints.content(folder)))
    return folder


def test_damage_of_every_kind_is_found(tmp_path: Path) -> None:
    whole = checkpoint(tmp_path, 1)
    assert checkpoints.damage(whole) == []
    shard = whole / "weights" / "a.distcp"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    assert checkpoints.damage(whole) == ["weights/a.distcp: its content changed"]
    shard.write_bytes(content[:-1])
    assert "2,559 bytes, 2,560 were written" in checkpoints.damage(whole)[0]
    shard.unlink()
    assert checkpoints.damage(whole) == ["weights/a.distcp: missing"]
    (whole / checkpoints.INTEGRITY).write_text("{")
    assert checkpoints.damage(whole)[0].startswith("integrity.json")


def test_ranks_share_the_reading_and_together_see_all_damage(tmp_path: Path) -> None:
    whole = checkpoint(tmp_path, 1)
    for name in ("b", "c", "d"):
        (whole / "weights" / name).write_bytes(name.encode() * 100)
    names = checkpoints.content(whole)
    assert names == ["run.json", "weights/a.distcp", "weights/b", "weights/c", "weights/d"]
    checkpoints.write_integrity(whole, checkpoints.describe(whole, names))
    for name in names:
        content = (whole / name).read_bytes()
        (whole / name).write_bytes(content[:-1] + b"?")
        found = [checkpoints.damage(whole, rank, 3) for rank in range(3)]
        assert sorted(found) == [[], [], [f"{name}: its content changed"]]
        (whole / name).write_bytes(content[:-1])  # sizes are cheap: every rank sees them
        assert all(name in problem for rank in range(3) for problem in checkpoints.damage(whole, rank, 3))
        (whole / name).write_bytes(content)
    assert [checkpoints.damage(whole, rank, 3) for rank in range(3)] == [[], [], []]


def test_unfinished_checkpoints_are_not_taken(tmp_path: Path) -> None:
    first, second, third = (checkpoint(tmp_path, step) for step in (10, 9, 100))
    assert checkpoints.finished(tmp_path) == [third, first, second]
    third.with_name(third.name + "-unfinished").touch()
    (first / checkpoints.INTEGRITY).unlink()
    assert checkpoints.finished(tmp_path) == [second]


def test_a_full_disk_is_an_error_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemotron_h.training import preflight

    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**30))
    with pytest.raises(UserError, match=r"1\.0 GiB free, one checkpoint takes up to 2\.0 GiB"):
        preflight.check_disk(2 * 2**30, tmp_path)
    preflight.check_disk(2**29, tmp_path)


def test_a_model_far_larger_than_the_machine_is_an_error_before_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 8B on this machine, or as a frozen teacher beside a tiny student, whatever the layout."""
    from nemotron_h.checks import definition_of
    from nemotron_h.compose import compose
    from nemotron_h.runtime import memory
    from nemotron_h.schema import AdapterSchema
    from nemotron_h.training import preflight

    monkeypatch.setattr(memory, "available", lambda: 12 * 2**30)
    large, tiny = (definition_of(compose(name), name) for name in ("nemotron_h_8b", "nemotron_h_tiny"))
    strategy = SimpleNamespace(tensor_model_parallel_size=1, pipeline_model_parallel_size=1, context_parallel_size=1)
    trainer = SimpleNamespace(strategy=strategy, num_devices=8, num_nodes=1)
    lora = AdapterSchema(kind="lora", rank=8, alpha=16, targets=["in_proj"])
    for first, adapter, others, least in (
        (large, None, [], 75.4),
        (large, lora, [], 15.1),
        (tiny, None, [large], 15.2),
    ):
        config = SimpleNamespace(
            definition=lambda first=first: first,
            definitions=lambda first=first, others=others: dict(enumerate([first, *others])),
            adapter=adapter,
        )
        with pytest.raises(UserError, match=rf"model {first.name}: training takes at least {least} GiB"):
            preflight.check_layout(trainer, SimpleNamespace(config=config))


def test_a_run_shorter_than_its_warmup_is_an_error() -> None:
    from nemotron_h.training.optimizer import scheduled_adamw

    module = scheduled_adamw(peak_lr=1e-3, final_lr=1e-5, warmup_steps=10)
    module.lr_scheduler.max_steps = 10
    with pytest.raises(UserError, match="10 steps, its warm-up 10"):
        module.optimizers(model=None)


def test_a_stable_rate_decays_linearly_over_the_last_steps() -> None:
    import torch

    from nemotron_h.training.optimizer import scheduled_adamw

    module = scheduled_adamw(peak_lr=1e-3, final_lr=1e-5, warmup_steps=4, decay_steps=5)
    module.lr_scheduler.max_steps = 20
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1e-3)
    schedule = module.lr_scheduler.scheduler(None, optimizer)["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(21):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(1e-3 / 5)
    assert rates[4:16] == [pytest.approx(1e-3)] * 12
    steps = [a - b for a, b in itertools.pairwise(rates[15:21])]
    assert steps == [pytest.approx(0.99e-3 / 5)] * 5
    assert rates[20] == pytest.approx(1e-5)
    module.lr_scheduler.max_steps = 8
    with pytest.raises(UserError, match="8 steps, its warm-up 4 and its decay 5"):
        module.lr_scheduler.scheduler(None, optimizer)
