"""Plans, windows and the data module: the same global batches whatever the layout, also after a resume."""

import dataclasses
import json
import pickle
import random
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.strategies import SingleDeviceStrategy
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from nemotron_h.core.errors import UserError
from nemotron_h.data.feed.datamodule import BlendDataModule, BlendDataSampler
from nemotron_h.data.feed.phase_plan import DataOrder, DataPlan, PlannedPhase, PlannedSource
from nemotron_h.data.indexed import TokenStream, document_numbers
from nemotron_h.data.manifest import Manifest, SourceManifest, SplitManifest, TokenizerManifest
from nemotron_h.data.tokenizer import train_bpe

SEQ, EOD = 32, 0
LENGTHS = {"web": 400, "code": 150, "chat": 60}  # documents


def write_pair(prefix: Path, documents: int, seed: int) -> SplitManifest:
    rng = np.random.default_rng(seed)
    builder, tokens = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16), 0
    for _ in range(documents):
        text = rng.integers(1, 270, rng.integers(1, 60))
        builder.add_document(torch.from_numpy(np.append(text, EOD)), [len(text) + 1])
        tokens += len(text) + 1
    builder.finalize(f"{prefix}.idx")
    return SplitManifest(str(prefix), documents, tokens, 0, "uint16", f"bin{seed}", f"idx{seed}")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with one prepared blend, `three`, and its YAML file."""
    root = tmp_path_factory.mktemp("root")
    folder = root / "three"
    (folder / "tokenizer").mkdir(parents=True)
    tokenizer = train_bpe(["some text to train on"] * 50, 270, folder / "tokenizer")
    sources = {}
    for number, (name, documents) in enumerate(LENGTHS.items()):
        (folder / name).mkdir()
        splits = {
            "train": write_pair(folder / name / "train", documents, 2 * number),
            # chat holds out less than one window
            "validation": write_pair(folder / name / "validation", 1 if name == "chat" else 40, 2 * number + 1),
        }
        if name == "chat":
            assert splits["validation"].tokens < 2 * SEQ
        sources[name] = SourceManifest(name, "CC0", "0", splits)
    meta = TokenizerManifest("bpe", tokenizer.vocab_size, tokenizer.eod_id, tokenizer.fingerprint(), "tokenizer", True)
    Manifest(1, "three", "0", meta, sources, str(folder)).save()
    blend = {
        "name": "three",
        "tokenizer": {"vocab_size": 270},
        "sources": {name: {"category": name, "format": "text", "path": "x.txt"} for name in LENGTHS},
        "phases": [
            {"name": "broad", "weights": {"web": 75, "code": 25}, "until": {"fraction": 0.6}},
            {"name": "late", "weights": {"web": 20, "code": 30, "chat": 50}},
        ],
    }
    (root / "three.yaml").write_text(yaml.safe_dump(blend))
    return root


def module(root: Path, blend_change: str | None = None, **settings: object) -> BlendDataModule:
    settings = {"seq_length": SEQ, "global_batch_size": 16, "seed": 5, "horizon_steps": 100, **settings}
    data = BlendDataModule(blend=str(root / "three.yaml"), root=str(root), **settings)
    data.blend_change = blend_change  # as `ResumeRun` declares it
    return data


def started(data: BlendDataModule, step: int = 0, state: dict | None = None, limit_val_batches: float = 2):
    """`data` under a trainer that stands at `step`."""
    data.trainer = SimpleNamespace(
        global_step=step, max_steps=100, limit_val_batches=limit_val_batches, limit_train_batches=1.0
    )
    data.setup("fit")
    if state is not None:
        data.load_state_dict(state)
    return data


def loader(data: BlendDataModule, rank: int = 0, size: int = 1, validation: bool = False):
    class Sampler(BlendDataSampler):
        data_parallel = staticmethod(lambda: (rank, size))

    raw = data.val_dataloader() if validation else data.train_dataloader()
    return Sampler(data).transform_dataloader(raw)


def global_batches(data: BlendDataModule, count: int, size: int = 1, validation: bool = False) -> list[list[int]]:
    """The sample numbers of the next global batches, put together from all ranks' micro-batches."""
    ranks = [iter(loader(data, rank, size, validation).batch_sampler) for rank in range(size)]
    microbatches = data.global_batch_size // (data.micro_batch_size * size)
    return [[i for _ in range(microbatches) for rank in ranks for i in next(rank)] for _ in range(count)]


# windows


def test_windows_hold_the_tokens_of_the_indexed_dataset(prepared: Path) -> None:
    prefix = str(prepared / "three" / "code" / "train")
    dataset, stream = IndexedDataset(prefix), TokenStream(prefix)
    tokens = np.concatenate([dataset[i] for i in range(len(dataset))]).astype(np.int64)
    first = np.cumsum([0, *(len(dataset[i]) for i in range(len(dataset) - 1))])
    assert stream.tokens == len(tokens)
    twice = np.concatenate([tokens, tokens])
    begins = np.concatenate([first, first + len(tokens)])
    for start in [0, 1, len(tokens) - 1, len(tokens) - 20, *random.Random(1).choices(range(len(tokens)), k=200)]:
        window = stream.read(start, SEQ + 1)
        assert window.dtype == np.int64
        assert (window == twice[start : start + SEQ + 1]).all()
        inside = begins[(begins >= start) & (begins < start + SEQ)] - start
        assert stream.document_starts(start, SEQ).tolist() == inside.tolist()
        # A place belongs to the document after as many ends as were passed before it.
        ends = np.cumsum(window[:SEQ] == EOD)
        assert document_numbers(inside, SEQ).tolist() == [0, *ends[:-1].tolist()]
    copy = pickle.loads(pickle.dumps(stream))
    assert len(pickle.dumps(stream)) < 2000
    assert (copy.read(3, 50) == tokens[3:53]).all()


def test_a_window_may_be_longer_than_its_stream(tmp_path: Path) -> None:
    write_pair(tmp_path / "tiny", 1, 0)
    stream = TokenStream(str(tmp_path / "tiny"))
    tokens = stream.read(0, stream.tokens)
    assert stream.read(1, 3 * stream.tokens).tolist() == np.roll(np.tile(tokens, 3), -1).tolist()
    with pytest.raises(UserError, match=r"none\.idx"):
        TokenStream(str(tmp_path / "none"))


def test_items_are_windows_of_the_right_source(prepared: Path) -> None:
    data = started(module(prepared, document_reset=True))
    dataset = data.train_dataloader().dataset
    for i in (0, 7, 1599):
        item, sample = dataset[i], data.order.sampler[i]
        text = TokenStream(str(prepared / "three" / sample.source / "train")).read(sample.start, SEQ + 1)
        assert item["tokens"].tolist() == text[:-1].tolist()
        assert item["labels"].tolist() == text[1:].tolist()
        assert item["position_ids"].tolist() == list(range(SEQ))
        assert item["loss_mask"].tolist() == [1.0] * SEQ
        assert item["seq_idx"].tolist() == [0, *np.cumsum(text[: SEQ - 1] == EOD).tolist()]
        assert item["sample_ids"].item() == i
    assert "seq_idx" not in started(module(prepared)).train_dataloader().dataset[0]


# the order


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("micro", [1, 2])
def test_global_batches_do_not_depend_on_the_layout(prepared: Path, size: int, micro: int) -> None:
    data = started(module(prepared, micro_batch_size=micro))
    assert global_batches(data, 5, size) == [list(range(16 * g, 16 * g + 16)) for g in range(5)]
    assert global_batches(data, 2, size, validation=True) == [list(range(16)), list(range(16, 32))]


def test_batches_are_collated_and_workers_keep_their_order(prepared: Path) -> None:
    here, there = (loader(started(module(prepared, micro_batch_size=4, workers=n))) for n in (0, 2))
    for _, a, b in zip(range(6), here, there, strict=False):
        assert a["tokens"].shape == (4, SEQ)
        assert a["tokens"].dtype == torch.int64
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_after_a_resume_at_50_random_steps_the_batches_are_those_of_the_straight_run(prepared: Path) -> None:
    straight = started(module(prepared))
    sampler = straight.order.sampler
    rng = random.Random(2)
    state = None
    for step in sorted(rng.sample(range(1, 100), 50)):  # each resumes from the checkpoint that the one before left
        straight.trainer.global_step = step
        before = started(module(prepared, micro_batch_size=rng.choice([1, 2, 4])), step, straight.state_dict())
        state = json.loads(json.dumps(before.state_dict()))  # nothing but plain containers
        assert state == straight.state_dict()
        assert state["consumed_samples"] == 16 * step
        data = started(module(prepared, micro_batch_size=rng.choice([1, 2, 4])), step, state)
        size = rng.choice([1, 2, 4])
        assert global_batches(data, 1, size) == [list(range(16 * step, 16 * step + 16))]
        assert [data.order.sampler[i] for i in range(16 * step, 16 * step + 16)] == [
            sampler[i] for i in range(16 * step, 16 * step + 16)
        ]
        assert sum(sum(c["sources"].values()) for c in state["consumed"]) == 16 * step


def test_a_restored_step_without_data_state_is_an_error(prepared: Path) -> None:
    with pytest.raises(UserError, match="read its first samples again"):
        started(module(prepared), step=7).train_dataloader()
    state = started(module(prepared)).state_dict()
    with pytest.raises(UserError, match="of step 0"):
        started(module(prepared), 7, state).train_dataloader()


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"seed": 6}, "seed: 5 -> 6"),
        ({"seq_length": 16}, "seq_length: 32 -> 16"),
        ({"global_batch_size": 8}, "global_batch_size: 16 -> 8"),
    ],
)
def test_resuming_with_another_order_is_an_error_that_shows_the_difference(
    prepared: Path, settings: dict, line: str
) -> None:
    data = started(module(prepared))
    data.trainer.global_step = 70
    with pytest.raises(UserError, match=r"resume\.blend_change=from_step") as error:
        started(module(prepared, **settings), 70, data.state_dict())
    assert line in error.value.message


def test_moving_a_switch_that_is_still_to_come_keeps_the_past(prepared: Path) -> None:
    old = started(module(prepared))
    old.trainer.global_step = 40
    new = started(module(prepared, horizon_steps=200), 40, old.state_dict())
    assert [new.order.sampler[i] for i in range(16 * 60)] == [old.order.sampler[i] for i in range(16 * 60)]
    assert new.phase_number(119) == 1
    assert new.phase_number(120) == 2
    with pytest.raises(UserError, match="phase 'late' begins at step 60 -> 36"):  # it would have begun before step 40
        started(module(prepared, horizon_steps=60), 40, old.state_dict())


def test_a_run_that_is_made_longer_keeps_the_switches_behind_it(prepared: Path) -> None:
    old = started(module(prepared))
    old.trainer.global_step = 70  # the switch was at 60, a run of 200 steps has it at 120
    longer = started(module(prepared, horizon_steps=200), 70, old.state_dict())
    assert [longer.order.sampler[i] for i in range(16 * 100)] == [old.order.sampler[i] for i in range(16 * 100)]
    assert [longer.phase_number(step) for step in (59, 60, 119, 199)] == [1, 2, 2, 2]
    assert longer.order.plan.phases[-1].end_step == 200
    longer.trainer.global_step = 90
    again = started(module(prepared, horizon_steps=200), 90, longer.state_dict())  # as the same command repeats it
    assert again.order.plan == longer.order.plan


def windows_of(data: BlendDataModule, samples: int) -> list[tuple[str, int, int]]:
    """Source, epoch and window of the first samples."""
    return [(s.source, s.epoch, s.window) for s in map(data.order.sampler.__getitem__, range(samples))]


def test_random_order_reads_the_windows_of_all_phases_mixed(prepared: Path) -> None:
    """All but a few: a share of the samples is no whole number."""
    phased, random = (started(module(prepared, phase_order=order)) for order in ("blend", "random"))
    one, other = windows_of(phased, 1600), windows_of(random, 1600)
    assert len({*one} - {*other}) <= 6
    assert len({*one}) == len({*other}) == 1600
    first, last = ([source for source, *_ in part].count("chat") for part in (other[:800], other[800:]))
    assert first == pytest.approx(last, abs=3)
    assert "chat" not in [source for source, *_ in one[:960]]
    assert windows_of_validation(phased) == windows_of_validation(random)
    random.trainer.global_step = 40
    state = random.state_dict()
    assert windows_of(started(module(prepared, phase_order="random"), 40, state), 1600) == other
    with pytest.raises(UserError, match="phases: 1 -> 2"):
        started(module(prepared), 40, state)


def windows_of_validation(data: BlendDataModule) -> list:
    sampler, samples = data._validation
    return [sampler[number] for number in range(samples)]


def other_blend(prepared: Path) -> Path:
    blend = yaml.safe_load((prepared / "three.yaml").read_text())
    blend["phases"] = [{"name": "all", "weights": {"web": 10, "code": 10, "chat": 80}}]
    (prepared / "other.yaml").write_text(yaml.safe_dump(blend))
    return prepared / "other.yaml"


def test_a_declared_change_takes_over_at_its_step_and_repeats_nothing(prepared: Path) -> None:
    old = started(module(prepared))
    old.trainer.global_step = 30
    changed = module(prepared, blend_change="from_step", global_batch_size=8)
    changed.blend = str(other_blend(prepared))
    changed = started(changed, 30, old.state_dict())
    assert changed.next_sample() == 480
    assert global_batches(changed, 2) == [list(range(480, 488)), list(range(488, 496))]
    seen: dict[tuple[str, int], list[int]] = {}
    for sampler, numbers in ((old.order.sampler, range(480)), (changed.order.sampler, range(480, 640))):
        for i in numbers:
            seen.setdefault((sampler[i].source, sampler[i].epoch), []).append(sampler[i].window)
    assert all(len(set(windows)) == len(windows) for windows in seen.values())

    changed.trainer.global_step = 50
    state = changed.state_dict()
    assert state["consumed_samples"] == 480 + 20 * 8
    assert [record["plan"]["phases"][0]["name"] for record in state["history"]] == ["broad"]
    assert state["history"][0]["consumed_samples"] == 480
    assert sum(state["positions"].values()) == 640
    again = module(prepared, blend_change="from_step", global_batch_size=8)
    again.blend = changed.blend
    again = started(again, 50, state)  # the change was made: the same recipe only goes on
    assert again.state_dict() == state
    assert [again.order.sampler[i] for i in range(640, 700)] == [changed.order.sampler[i] for i in range(640, 700)]


def test_sources_with_other_windows_start_a_new_epoch_after_a_change() -> None:
    def plan(**settings: object) -> DataPlan:
        sources = {"a": PlannedSource(1000, "x"), "b": PlannedSource(2000, "y")}
        phases = [PlannedPhase("p", 0, 100, {"a": 0.5, "b": 0.5})]
        return dataclasses.replace(DataPlan("n", "h", 1, 10, 10, sources, phases), **settings)

    state = DataOrder(plan()).state_dict(30)
    a, b = state["positions"]["a"], state["positions"]["b"]
    assert a + b == 300
    assert abs(a - b) < 8
    grown = plan(sources={"a": PlannedSource(1000, "x"), "b": PlannedSource(3000, "z")})
    assert DataOrder.resume(grown, state, "from_step").origin.positions == {"a": a, "b": 300}
    assert DataOrder.resume(plan(seq_length=20), state, "from_step").origin.positions == {"a": 100, "b": 100}
    with pytest.raises(UserError, match="source b: 2,000 -> 3,000 tokens"):
        DataOrder.resume(grown, state)
    without = plan(sources={"b": PlannedSource(2000, "y")}, phases=[PlannedPhase("p", 0, 100, {"b": 1.0})])
    later = DataOrder.resume(without, state, "from_step").state_dict(40)
    assert later["positions"] == {"a": a, "b": b + 100}
    assert DataOrder.resume(plan(), later, "from_step").origin.positions == {"a": a, "b": b + 100}


# validation


def test_validation_is_the_same_list_whatever_the_state(prepared: Path) -> None:
    first = started(module(prepared))
    later = started(module(prepared, horizon_steps=1000, seed=99, micro_batch_size=2), limit_val_batches=2)
    lists = []
    for data in (first, later):
        batches = list(loader(data, validation=True))
        lists.append(torch.cat([batch["tokens"] for batch in batches]))
        again = torch.cat([batch["tokens"] for batch in loader(data, validation=True)])
        assert torch.equal(lists[-1], again)
    assert lists[0].shape == (32, SEQ)
    assert torch.equal(*lists)


def test_validation_length_and_sources_too_small_for_it(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("nemotron_h.data.feed.datamodule.say", said.append)
    monkeypatch.setattr("megatron.core.num_microbatches_calculator.get_num_microbatches", lambda: 4)
    data = started(module(prepared, micro_batch_size=4, seq_length=64), limit_val_batches=1.0)
    data.trainer.num_sanity_val_steps = 1
    data.reconfigure_limit_batches()
    assert [line for line in said if "validation leaves out chat" in line]
    windows = sum(TokenStream(str(prepared / "three" / s / "validation")).tokens // 64 for s in ("web", "code"))
    assert data.trainer.limit_val_batches == windows // 16 * 4
    assert data.trainer.num_sanity_val_steps == 4
    assert len(loader(data, validation=True)) == data.trainer.limit_val_batches
    everything = started(module(prepared, micro_batch_size=4, seq_length=64), limit_val_batches=10**9)
    assert everything.validation_samples == data.validation_samples
    assert [line for line in said if "not 1,000,000,000: more would repeat held-out text" in line]
    with pytest.raises(UserError, match="validation text"):
        started(module(prepared, seq_length=1500)).val_dataloader()


@pytest.mark.parametrize(("planned", "late"), [(1000, 600), (100, 60), (40, 60)])
def test_a_run_that_ends_earlier_is_the_beginning_of_the_planned_one(prepared: Path, planned: int, late: int) -> None:
    """The trainer makes 100 steps; the phases divide what the recipe plans, or those where they are more."""
    data = started(module(prepared, horizon_steps=None, horizon_tokens=planned * 16 * SEQ))
    assert [phase.first_step for phase in data.order.plan.phases] == [0, late]


# bad input


def test_bad_settings_are_errors_before_anything_starts(prepared: Path) -> None:
    for values, message in (
        ({"micro_batch_size": 3}, "data.global_batch_size 16 is not a multiple of micro_batch_size 3"),
        ({"seq_length": 0}, "data.seq_length = 0 is below 1"),
        ({"horizon_steps": -1}, "data.horizon_steps = -1 is below 1"),
        ({"too_long": "cut"}, "data.too_long is unused: pretraining reads text"),
        ({"seq_length": "???"}, "data.seq_length: '???' is not a number"),
    ):
        with pytest.raises(UserError) as caught:
            module(prepared, **values)
        assert caught.value.message == message
    data = module(prepared, horizon_steps=None)
    data.trainer = SimpleNamespace(max_steps=-1)
    with pytest.raises(UserError, match=r"trainer\.max_steps"):
        data.setup()
    with pytest.raises(UserError, match="not a multiple"):
        loader(started(module(prepared)), size=3)


def move_manifest(file: Path, before: Path, now: Path) -> None:
    content = json.loads(file.read_text().replace(str(before), str(now)))
    del content["sha256"]
    file.write_text(json.dumps(content))


def test_damaged_data_is_an_error_before_training(prepared: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(prepared, root)
    move_manifest(root / "three" / "manifest.json", prepared, root)
    started(module(root))
    file = root / "three" / "tokenizer" / "tokenizer.json"
    text = file.read_text()
    file.write_text(text + " ")
    with pytest.raises(UserError, match="is not the tokenizer"):
        started(module(root))
    file.write_text(text)
    file = root / "three" / "web" / "train.bin"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="truncated"):
        started(module(root))
    file.unlink()
    with pytest.raises(UserError, match="missing"):
        started(module(root))


def test_data_that_changes_under_a_run_is_named_with_file_and_sample(prepared: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(prepared, root)
    move_manifest(root / "three" / "manifest.json", prepared, root)
    windows = started(module(root)).windows("train")
    number = next(n for n in range(99) if (w := windows.sampler.long[n]).source == "web" and w.start > 40)
    start = windows.sampler.long[number].start
    whole = windows[number]["tokens"]
    file = root / "three/web/train.bin"
    content = np.fromfile(file, dtype=np.uint16)
    assert whole[7] == content[start + 7]
    for place, value, words in (
        (start + 7, 270, f"sample {number}: {file}: token {start + 7:,} has the id 270, the tokenizer has 270 ids"),
        (None, None, f"sample {number}: {file} ends at byte {2 * start + 9:,}: it was truncated"),
    ):
        with open(file, "r+b") as opened:
            if place is None:
                opened.truncate(2 * start + 9)
            else:
                opened.seek(2 * place)
                opened.write(np.uint16(value).tobytes())
        with pytest.raises(UserError) as caught:
            _ = windows[number]
        assert caught.value.message.startswith(words)


# inside Lightning


class Strategy(SingleDeviceStrategy):
    """As `MegatronStrategy` treats loaders."""

    def process_dataloader(self, dataloader):
        return self.lightning_module.trainer.datamodule.data_sampler.transform_dataloader(dataloader)


class Recorder(pl.LightningModule):
    """Takes the micro-batches of a step as NeMo does, and notes their sample numbers."""

    def __init__(self, microbatches: int) -> None:
        super().__init__()
        self.weight, self.microbatches = torch.nn.Parameter(torch.zeros(())), microbatches
        self.steps, self.validated = [], []

    def training_step(self, dataloader_iter):
        ids = [i for _ in range(self.microbatches) for i in next(dataloader_iter)[0]["sample_ids"].tolist()]
        self.steps.append(ids)
        return self.weight * 1.0

    def validation_step(self, dataloader_iter):
        for _ in range(self.microbatches):
            self.validated.extend(next(dataloader_iter)[0]["sample_ids"].tolist())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(root: Path, folder: Path, steps: int, checkpoint: Path | None = None, workers: int = 0, **trainer: object):
    data, model = module(root, micro_batch_size=4, horizon_steps=20, workers=workers), Recorder(4)
    data.data_sampler.data_parallel = lambda: (0, 1)
    lightning = pl.Trainer(
        accelerator="cpu",
        strategy=Strategy(device="cpu"),
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        use_distributed_sampler=False,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        **{"val_check_interval": 3, "limit_val_batches": 4, **trainer},
    )
    lightning.fit(model, data, ckpt_path=checkpoint)
    return lightning, model


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.filterwarnings("ignore")
def test_lightning_resumes_at_the_next_sample(prepared: Path, tmp_path: Path, workers: int) -> None:
    _, straight = fit(prepared, tmp_path, 10)
    assert straight.steps == [list(range(16 * g, 16 * g + 16)) for g in range(10)]
    trainer, before = fit(prepared, tmp_path, 4, workers=workers)
    trainer.save_checkpoint(tmp_path / "at4.ckpt")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "You're resuming")  # from a loader that cannot
        _, after = fit(prepared, tmp_path, 10, tmp_path / "at4.ckpt", workers=workers)
    assert before.steps + after.steps == straight.steps
    assert len(straight.validated) == 3 * 16
    assert straight.validated == list(range(16)) * 3


@pytest.mark.filterwarnings("ignore")
def test_a_second_lightning_epoch_reads_on(prepared: Path, tmp_path: Path) -> None:
    _, model = fit(prepared, tmp_path, 6, limit_train_batches=8, val_check_interval=2)
    assert model.steps == [list(range(16 * g, 16 * g + 16)) for g in range(6)]


def test_the_module_is_a_config_that_nemo_run_and_nemo_can_write_and_read(prepared: Path, tmp_path: Path) -> None:
    import nemo_run as run
    from nemo.lightning import io
    from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

    config = run.Config(BlendDataModule, blend=str(prepared / "three.yaml"), root=str(prepared), seq_length=SEQ)
    serializer = ZlibJSONSerializer()
    assert serializer.deserialize(serializer.serialize(config)) == config
    data = module(prepared, micro_batch_size=2)
    copy = io.reinit(data)
    assert (copy.blend, copy.micro_batch_size, copy.seed) == (data.blend, 2, 5)
