"""Checks that need no training: disk, integrity of checkpoints, the schedule's length."""

from __future__ import annotations

import errno
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from small_run import layout_of_strategy

from nemotron_h.checkpoint import folders
from nemotron_h.core.errors import UserError
from nemotron_h.core.locks import locked


def checkpoint(run: Path, step: int) -> Path:
    """A small finished checkpoint folder."""
    folder = run / "checkpoints" / f"step-{step:06d}"
    (folder / "weights").mkdir(parents=True)
    (folder / "weights" / "a.distcp").write_bytes(bytes(range(256)) * 10)
    (folder / "run.json").write_text("{}")
    folders.write_integrity(folder, folders.describe(folder, folders.content(folder)))
    return folder


def test_damage_of_every_kind_is_found(tmp_path: Path) -> None:
    whole = checkpoint(tmp_path, 1)
    assert folders.damage(whole) == []
    shard = whole / "weights" / "a.distcp"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    assert folders.damage(whole) == ["weights/a.distcp: its content changed"]
    shard.write_bytes(content[:-1])
    assert "2,559 bytes, 2,560 were written" in folders.damage(whole)[0]
    shard.unlink()
    assert folders.damage(whole) == ["weights/a.distcp: missing"]
    (whole / folders.INTEGRITY).write_text("{")
    assert folders.damage(whole)[0].startswith("integrity.json")


def test_ranks_share_the_reading_and_together_see_all_damage(tmp_path: Path) -> None:
    whole = checkpoint(tmp_path, 1)
    for name in ("b.distcp", "c.distcp", "d.distcp"):
        (whole / "weights" / name).write_bytes(name.encode() * 100)
    names = folders.content(whole)
    assert names == ["run.json", "weights/a.distcp", "weights/b.distcp", "weights/c.distcp", "weights/d.distcp"]
    folders.write_integrity(whole, folders.describe(whole, names))
    for name in names:
        content = (whole / name).read_bytes()
        (whole / name).write_bytes(content[:-1] + b"?")
        found = [folders.damage(whole, rank, 3) for rank in range(3)]
        assert sorted(found) == [[], [], [f"{name}: its content changed"]]
        (whole / name).write_bytes(content[:-1])  # sizes are cheap: every rank sees them
        assert all(name in problem for rank in range(3) for problem in folders.damage(whole, rank, 3))
        (whole / name).write_bytes(content)
    assert [folders.damage(whole, rank, 3) for rank in range(3)] == [[], [], []]


def test_unfinished_checkpoints_are_not_taken(tmp_path: Path) -> None:
    first, second, third = (checkpoint(tmp_path, step) for step in (10, 9, 100))
    assert folders.finished(tmp_path) == [third, first, second]
    mark = third.with_name(third.name + "-unfinished")
    mark.touch()
    (first / folders.INTEGRITY).unlink()
    assert folders.finished(tmp_path) == [third, second]  # all of it is written, its mark is late
    assert not folders.unfinished(tmp_path)
    folders.remove_late_marks(tmp_path)
    assert not mark.exists()
    mark.touch()
    (third / folders.INTEGRITY).unlink()
    folders.remove_late_marks(tmp_path)
    assert folders.finished(tmp_path) == [second]
    assert folders.unfinished(tmp_path) == [third]
    assert folders.size_of(second) == 2562


def test_a_torn_folder_is_named_unless_a_newer_one_is_whole(tmp_path: Path) -> None:
    first, torn = checkpoint(tmp_path, 4), checkpoint(tmp_path, 8)
    (torn / folders.INTEGRITY).unlink()
    with pytest.raises(UserError, match=f"{torn} has no integrity.json: it was copied in part") as refused:
        folders.newest(tmp_path)
    assert f"mv {torn} {torn.parent}/aside-step-000008 (step-000004 is then the newest)" in refused.value.hint
    from nemotron_h.checkpoint.reader import find_checkpoint

    with pytest.raises(UserError, match=f"{torn} has no integrity.json"):
        find_checkpoint(tmp_path)
    third = checkpoint(tmp_path, 12)
    assert folders.newest(tmp_path) == third
    assert list(folders.torn(tmp_path)) == [torn]
    second = third.rename(third.with_name(third.name + "-v1"))  # of a second run, which was killed
    with pytest.raises(UserError, match=f"{second} was written by a second run of {tmp_path}"):
        folders.newest(tmp_path)
    second.with_name(second.name + "-unfinished").touch()
    (second / folders.INTEGRITY).unlink()
    torn.rename(torn.with_name("aside-step-000008"))
    assert folders.newest(tmp_path) == first
    first.rename(first.with_name("aside-step-000004"))
    assert folders.newest(tmp_path) is None


def test_a_full_disk_is_an_error_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemotron_h.training import preflight

    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**30))
    with pytest.raises(UserError, match=r"1\.00 GiB free, one checkpoint takes up to 2\.00 GiB"):
        preflight.check_disk(2 * 2**30, tmp_path)
    preflight.check_disk(2**29, tmp_path)


def test_a_start_says_what_it_removes_and_what_nothing_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from nemo import lightning as nl

    from nemotron_h.training.callbacks.checkpoint import StepCheckpoint

    torn, *whole, last = (checkpoint(tmp_path, step) for step in (4, 5, 6, 8, 12))
    (torn / folders.INTEGRITY).unlink()
    (last / folders.INTEGRITY).unlink()
    last.with_name(last.name + "-unfinished").touch()
    callback = StepCheckpoint(every_steps=4)
    callback.dirpath = last.parent
    monkeypatch.setattr(
        nl.ModelCheckpoint, "setup", lambda self, trainer: self._remove_unfinished_checkpoints(self.dirpath)
    )
    callback.setup(SimpleNamespace(is_global_zero=True))
    said = capsys.readouterr().out
    assert f"removed {last}: it was not written to its end" in said
    assert f"checkpoint {torn} has no integrity.json" in said
    assert f"removed {whole[0]}: checkpoint.keep is 2" in said  # left by a process that was killed before it did
    assert sorted(path.name for path in last.parent.iterdir()) == ["step-000004", "step-000006", "step-000008"]
    assert sorted(callback.best_k_models) == sorted(map(str, whole[1:]))


def test_a_checkpoint_that_cannot_be_written_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo import lightning as nl
    from torch.distributed.checkpoint import CheckpointException

    from nemotron_h.training import preflight
    from nemotron_h.training.callbacks.checkpoint import StepCheckpoint

    older = checkpoint(tmp_path, 4)
    alone = SimpleNamespace(broadcast=lambda problem: problem, reduce_boolean_decision=lambda decision, all: decision)
    model = torch.nn.Linear(1, 1)
    trainer = SimpleNamespace(is_global_zero=True, global_rank=0, strategy=alone, lightning_module=model)
    callback, folder = StepCheckpoint(every_steps=4), older.with_name("step-000008")
    raised: list[BaseException] = []

    def save(self: object, trainer: object, filepath: str) -> None:
        raise raised.pop()

    def refused() -> UserError:
        with pytest.raises(UserError, match=f"checkpoint {folder} ") as error:
            callback._save_checkpoint(trainer, str(folder))
        return error.value

    monkeypatch.setattr(nl.ModelCheckpoint, "_save_checkpoint", save)
    full = OSError(errno.ENOSPC, "No space left on device", str(folder / "weights" / "__0_0.distcp"))
    raised.append(CheckpointException("write", {1: (RuntimeError(f"Worker failure: {full}"), None)}))
    error = refused()
    assert f"rank 1: Worker failure: [Errno 28] No space left on device: '{full.filename}'" in error.message
    assert "it continues from the newest checkpoint" in error.hint
    raised.append(CheckpointException("write", {}))  # as ranks other than the first see it
    assert refused().message.endswith("the first rank says why")
    raised.append(full)
    assert refused().message == f"checkpoint {folder} cannot be written: {full.filename}: No space left on device"
    raised.append(RuntimeError("basic_ios::clear: iostream error"))  # of torch.save
    assert refused().message.endswith("iostream error, as PyTorch says where the disk is full or a file may not grow")
    bug = CheckpointException("write", {1: (RuntimeError("a bug"), None)})
    raised.append(bug)
    with pytest.raises(CheckpointException):
        callback._save_checkpoint(trainer, str(folder))
    model.bias.data.fill_(torch.inf)
    assert refused().message == f"checkpoint {folder} is not written (rank 0): NaN or infinite weights in bias"
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2_000))
    with pytest.raises(UserError, match=f"{tmp_path} has 0.0 MiB free, one checkpoint takes up to 0.0 MiB"):
        callback._save_checkpoint(trainer, str(folder))
    folder.mkdir()
    error = refused()
    assert "is there already: it appeared while this run trained" in error.message
    assert f"mv {folder} {older.parent}/aside-step-000008" in error.hint


def test_a_second_ctrl_c_or_a_lost_rank_leaves_what_is_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from nemotron_h.platform import checkpoint_writer
    from nemotron_h.training.callbacks import checkpoint as callbacks

    abandoned: list[str] = []
    monkeypatch.setattr(checkpoint_writer, "abandon", lambda: abandoned.append("abandoned"))
    monkeypatch.setattr(callbacks, "lost_ranks", lambda grace, place: [1])
    trainer = SimpleNamespace(is_global_zero=True, world_size=2, strategy=SimpleNamespace(checkpoint_io=None))
    callback = callbacks.StepCheckpoint(every_steps=4)
    callback.end(trainer, None)
    assert not abandoned, "nothing is being written"
    for number, (ranks, error) in enumerate(
        ((1, KeyboardInterrupt()), (2, ValueError("of rank 0 alone")), (1, ValueError("the GPU is gone"))), 1
    ):
        callback.save, trainer.world_size = callbacks.Save(tmp_path / "step-000008"), ranks
        callback.end(trainer, error)
        assert callback.save is None
        assert len(abandoned) >= number
    assert "checkpoint not finished: AttributeError" in capsys.readouterr().out, "the last one was tried"


def test_a_shell_of_a_slurm_job_is_no_task_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from nemotron_h.platform import ranks
    from nemotron_h.training.strategy import NemotronHTrainer

    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "6", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "sh"}
    for step, known in ((None, False), ("4294967290", False), ("0", True)):
        environment = job if step is None else {**job, "SLURM_STEP_ID": step}
        shell = dict(environment)
        ranks.forget_tasks_of_others(shell)
        assert ("SLURM_NTASKS" in shell, "SLURM_PROCID" in shell) == (known, known)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(UserError, match="You set `--ntasks=6`") as refused:
        NemotronHTrainer()
    assert refused.value.hint == "Use `--ntasks-per-node=6` instead."


def test_a_run_has_its_folder_or_says_why_not(tmp_path: Path) -> None:
    from nemotron_h.training.preflight import RunFolder

    trainer = SimpleNamespace(is_global_zero=True)
    (tmp_path / "runs").touch()
    with pytest.raises(UserError, match=f"log.dir .*: {tmp_path}/runs/tiny: Not a directory"):
        RunFolder(explicit_log_dir=str(tmp_path / "runs" / "tiny")).setup(trainer)
    with pytest.raises(UserError, match=r"log.dir .*: /proc/x: No such file"):
        RunFolder(explicit_log_dir="/proc/x").setup(trainer)
    with pytest.raises(UserError, match=r"log.dir .* is not set"):
        RunFolder().setup(trainer)
    folder = tmp_path / "run"
    with locked(folder, "trained", ""):
        before = sorted(folder.iterdir())
        with pytest.raises(UserError, match=f"{folder} is being trained by another process: pid"):
            RunFolder(explicit_log_dir=str(folder)).setup(trainer)
        assert sorted(folder.iterdir()) == before


def test_a_model_far_larger_than_the_machine_is_an_error_before_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 8B on this machine, or as a frozen teacher beside a tiny student, whatever the layout."""
    from nemotron_h.platform import memory
    from nemotron_h.recipe.checks import definition_of
    from nemotron_h.recipe.compose import compose
    from nemotron_h.schema.recipe import AdapterSchema
    from nemotron_h.training import preflight

    monkeypatch.setattr(memory, "available", lambda: 12 * 2**30)
    large, tiny = (definition_of(compose(name), name) for name in ("nemotron_h_8b", "nemotron_h_tiny"))
    strategy = layout_of_strategy()
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
            frozen=[],
            seq_length=8192,
        )
        with pytest.raises(UserError, match=rf"model {first.name}: training takes at least {least} GiB"):
            preflight.check_layout(trainer, SimpleNamespace(config=config))


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("nemotron_h_tiny", {"expert_model_parallel_size": 2}, "parallel.expert = 2 is unused: model nemotron_h_tiny"),
        (
            "nemotron_h_moe_tiny",
            {"expert_model_parallel_size": 3},
            "parallel.expert = 3 does not divide num_experts = 8",
        ),
        ("nemotron_h_moe_tiny", {"tensor_model_parallel_size": 2}, "parallel.tensor = 2 without parallel.sequence"),
        (
            "nemotron_h_8b",
            {"tensor_model_parallel_size": 8, "context_parallel_size": 32},
            "parallel.context = 32 does not split the heads of model nemotron_h_8b",
        ),
        (
            "nemotron_h_8b",
            {"tensor_model_parallel_size": 4, "context_parallel_size": 4},
            "= 8 is not a multiple of parallel.tensor * parallel.pipeline * parallel.context = 4 * 1 * 4",
        ),
        ("super_120b_a12b", {}, "model.expert_latent_size = 1024 of model super_120b_a12b: training does not have it"),
    ],
)
def test_layouts_that_cannot_be(name: str, changes: dict[str, int], words: str) -> None:
    """Set on the command line, behind the recipe's checks."""
    from nemotron_h.architecture.definition import definition_from_dict
    from nemotron_h.core.strict_yaml import read_config
    from nemotron_h.recipe.compose import configs_dir
    from nemotron_h.schema.recipe import ModelSchema
    from nemotron_h.training.preflight import check_split

    written = OmegaConf.merge(ModelSchema, read_config(configs_dir() / "model" / f"{name}.yaml"))
    definition = definition_from_dict(OmegaConf.to_container(written), name)
    with pytest.raises(UserError) as error:
        check_split(definition, layout_of_strategy(**changes), 8)
    assert words in str(error.value)


def test_a_run_shorter_than_its_warmup_is_an_error() -> None:
    from nemotron_h.training.optimizer import scheduled_adamw

    module = scheduled_adamw(peak_lr=1e-3, final_lr=1e-5, warmup_steps=10)
    module.lr_scheduler.max_steps = 10
    with pytest.raises(UserError, match="10 steps, its warm-up 10"):
        module.optimizers(model=None)


def rates_of(schedule, optimizer: torch.optim.Optimizer) -> list[float]:
    """The learning rates of 21 steps."""
    scheduler = schedule.scheduler(None, optimizer)["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(21):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_a_stable_rate_decays_linearly_over_the_last_steps() -> None:
    from nemotron_h.training.optimizer import scheduled_adamw

    module = scheduled_adamw(peak_lr=1e-3, final_lr=1e-5, warmup_steps=4, decay_steps=5)
    module.lr_scheduler.max_steps = 20
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1e-3)
    rates = rates_of(module.lr_scheduler, optimizer)
    assert rates[0] == pytest.approx(1e-3 / 5)
    assert rates[4:16] == [pytest.approx(1e-3)] * 12
    steps = [a - b for a, b in itertools.pairwise(rates[15:21])]
    assert steps == [pytest.approx(0.99e-3 / 5)] * 5
    assert rates[20] == pytest.approx(1e-5)
    module.lr_scheduler.max_steps = 8
    with pytest.raises(UserError, match="8 steps, its warm-up 4 and its decay 5"):
        module.lr_scheduler.scheduler(None, optimizer)


def test_an_exponential_decay_has_one_factor_every_step() -> None:
    """To a 256th over eight steps: half the rate of the step before."""
    from nemotron_h.training.optimizer import scheduled_adamw

    module = scheduled_adamw(peak_lr=1e-3, final_lr=1e-3 / 256, warmup_steps=4, decay_steps=8, exponential_decay=True)
    assert module.settings["exponential_decay"]
    assert "exponential_decay" not in scheduled_adamw(peak_lr=1e-3, final_lr=0, warmup_steps=4).settings
    module.lr_scheduler.max_steps = 20
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1e-3)
    rates = rates_of(module.lr_scheduler, optimizer)
    assert rates[:4] == [pytest.approx(1e-3 * step / 5) for step in range(1, 5)]
    assert rates[4:13] == [pytest.approx(1e-3)] * 9
    assert rates[12:] == [pytest.approx(1e-3 / 2**step) for step in range(9)]
