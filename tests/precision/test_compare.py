"""`nemotron-h compare-precision`: the gap's arithmetic, what a cast loses, and a whole comparison."""

from __future__ import annotations

import io
import json
import math
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from rich.console import Console
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from forks import FORKS
from small_run import WORKER

from nemotron_h.architecture.gemms import CAST_STATISTICS, OPERANDS
from nemotron_h.cli.main import app
from nemotron_h.comparison.results import read_casts, results
from nemotron_h.comparison.runs import comparison
from nemotron_h.core import paired
from nemotron_h.core.errors import UserError
from nemotron_h.launch import runs as starting
from nemotron_h.launch.place import place_of
from nemotron_h.launch.runs import Run, is_finished, text_of, write_recipe
from nemotron_h.launch.runs import train as start_run
from nemotron_h.launch.several import check_same, train_several
from nemotron_h.precision import statistics
from nemotron_h.precision.statistics import CastStatistics, as_statistics, cast_counts

BLEND = """
name: words
tokenizer: {kind: bpe, vocab_size: 512}
sources:
  words: {category: web, format: jsonl, path: words.jsonl, licence: ours, validation: 0.2}
phases:
  - {name: all, weights: {web: 100}}
"""
RECIPE = """
# @package _global_
defaults:
  - /base/pretrain
  - _self_
name: small
tokens: 4096
model:
  name: small
  family: nemotron_h
  pattern: M-M*-
  hidden_size: 64
  ffn_hidden_size: 96
  num_attention_heads: 4
  num_query_groups: 2
  head_dim: 16
  mamba_num_heads: 16
  mamba_head_dim: 8
  mamba_num_groups: 2
  mamba_state_dim: 16
  vocab_size: 512
  conv_kernel: 4
  init_std: 0.1
  expect: {{mamba: 2, attention: 1, ffn: 2, parameters: 164448}}
data: {{blend: {folder}/words.yaml, root: {folder}/data, seq_length: 64, global_batch_size: 8, micro_batch_size: 4}}
optim: {{peak_lr: 1e-2, final_lr: 1e-4, warmup_tokens: 512}}
checkpoint: {{every_steps: 4}}
log: {{dir: {folder}/runs, validate_every_steps: 2, validation_batches: 1}}
"""


def test_gap_is_relative_to_the_reference_and_of_smoothed_losses() -> None:
    reference = paired.Losses({1: 4.0, 2: 2.0, 3: 3.0, 4: 1.0}, {2: 2.0, 4: 1.0})
    other = paired.Losses({1: 4.0, 2: 2.5, 3: 2.5, 4: 1.5}, {2: 2.0, 4: 1.25})
    plain = paired.train_curve(reference, other, 100, 1)
    assert plain.tokens.tolist() == [100, 200, 300, 400]
    assert plain.gap == pytest.approx([0, -0.25, 1 / 6, -0.5])
    over_two = paired.train_curve(reference, other, 100, 2)  # means 3, 2.5, 2 and 3.25, 2.5, 2
    assert over_two.tokens.tolist() == [200, 300, 400]
    assert over_two.gap == pytest.approx([-0.25 / 3, 0, 0])
    validation = paired.validation_curve(reference, other, 100)
    assert validation.tokens.tolist() == [200, 400]
    assert validation.gap == pytest.approx([0, -0.25])
    assert paired.validation_curve(reference, paired.Losses({}, {}), 100) is None
    assert plain.summary() == {
        "last": -0.5,
        "last_at_tokens": 400,
        "largest": -0.5,
        "largest_at_tokens": 400,
    }
    assert over_two.summary()["largest_at_tokens"] == 200, "the largest by magnitude"


def test_smoothing_is_a_mean_of_the_last_values() -> None:
    values = np.random.default_rng(0).normal(size=50)
    expected = [values[end - 7 : end].mean() for end in range(7, 51)]
    assert paired.smoothed(values, 7) == pytest.approx(expected)


def write_events(folder: Path, first: int, losses: list[float], began: float, validated: int = 0) -> None:
    """Losses of the steps from `first` on (from 1), as a process that began then logs them; after step `validated` a
    validation loss of 2.5, under a step that is one too early.
    """
    writer = EventFileWriter(str(folder))
    for number, loss in enumerate(losses):
        step = first + number
        events = [(paired.TRAIN, loss, step - 1, 0.0)]
        if step == validated:
            events.append((paired.VALIDATION, 2.5, step - 2, 0.5))
        for tag, value, logged, after in events:
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            writer.add_event(Event(wall_time=began + number + after, step=logged, summary=summary))
    writer.close()


def test_a_step_that_was_trained_twice_has_its_last_loss(tmp_path: Path) -> None:
    write_events(tmp_path / "b", 1, [5.0, 4.0, 9.0], began=100)
    write_events(tmp_path / "a", 3, [3.0, 2.0], began=200, validated=4)
    assert paired.read_losses(tmp_path, 4) == paired.Losses({1: 5.0, 2: 4.0, 3: 3.0, 4: 2.0}, {4: 2.5})
    with pytest.raises(UserError, match="lack the loss of 1 of 5 steps, from step 5"):
        paired.read_losses(tmp_path, 5)


def test_a_step_whose_loss_a_killed_process_took_along_is_left_out_of_both(tmp_path: Path) -> None:
    write_events(tmp_path, 1, [5.0, 4.0], began=100)
    write_events(tmp_path, 4, [3.0, 2.0], began=200)
    killed = paired.read_losses(tmp_path, 5)
    assert killed.missing == (3,)
    whole = paired.Losses({1: 4.0, 2: 5.0, 3: 100.0, 4: 3.0, 5: 4.0}, {})
    curve = paired.train_curve(whole, killed, 10, 1)
    assert curve.tokens.tolist() == [10, 20, 40, 50]
    assert curve.gap == pytest.approx([-0.25, 0.2, 0, 0.5])
    assert paired.train_curve(killed, whole, 10, 2).gap == pytest.approx([0, -0.25, 0, -0.4])
    write_events(tmp_path / "more", 8, [2.0], began=300)
    with pytest.raises(UserError, match="lack the loss of 3 of 8 steps, from step 3"):
        paired.read_losses(tmp_path, 8)


def test_casts_of_all_processes_count_the_last_measurement_of_a_step(tmp_path: Path) -> None:
    for number, (folder, rows) in enumerate(
        [("run_0", [(1, 0.1), (3, 0.3)]), ("run_1", [(3, 0.4), (6, 0.6)]), (".", [(6, 0.7)])]
    ):
        file = tmp_path / folder / CAST_STATISTICS
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps([{"step": step, "amax": amax} for step, amax in rows]))
        os.utime(file, (number, number))
    assert [(row["step"], row["amax"]) for row in read_casts(tmp_path)] == [(1, 0.1), (3, 0.4), (6, 0.7)]


@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("recipe", ["fp8_current_scaling", "fp8_blockwise"])
def test_cast_statistics_are_those_of_the_oracle(recipe: str, operand: str) -> None:
    rng = np.random.default_rng(3)
    wide = rng.normal(size=(130, 200)) * np.exp(rng.normal(size=(130, 200)) * 4)
    x = torch.from_numpy(np.where(rng.random(wide.shape) < 0.1, 0, wide)).bfloat16()
    name = "e5m2" if operand == "gradient" and recipe == "fp8_current_scaling" else "e4m3"
    block = None if recipe == "fp8_current_scaling" else (128, 128) if operand == "weight" else (1, 128)
    values = x.double().numpy()
    read, inverse = oracle.quantized(values, name, block, power_of_2=block is not None)
    high, wide = block or values.shape
    spread = np.repeat(np.repeat(inverse, high, 0)[:130], wide, 1)[:, :200].astype(np.float64)
    nonzero = values != 0
    expected = CastStatistics(
        np.abs(values).max(),
        int(nonzero.sum()),
        int((nonzero & (read == 0)).sum()),
        int((np.abs(read) == oracle.FORMATS[name][3] * spread).sum()),
        0,
    )
    assert expected.underflowed > 50
    assert expected.saturated > 0 or block == (128, 128), "four scales, powers of 2, need not reach the largest"
    assert as_statistics(cast_counts(x.view(10, 13, 200), operand, recipe)) == expected


def test_overflow_is_what_clips() -> None:
    # an infinite amax gives the scale 1, so values beyond E4M3's 448 are clipped, from half a step (16) above it on
    x = torch.tensor([[math.inf, 500.0, -470.0, 464.0, 448.0, 440.0, 1e-5, 0.0]])
    counted = as_statistics(cast_counts(x, "weight", "fp8_current_scaling"))
    assert counted == CastStatistics(math.inf, 7, 1, 6, 3)  # 440 is halfway to 448, whose bits are even
    assert counted.shares() == {"underflow": 1 / 7, "saturation": 6 / 7, "overflow": 3 / 7}


def test_statistics_add_up() -> None:
    total = CastStatistics(1.0, 10, 1, 2, 0) + CastStatistics(3.0, 30, 4, 1, 1)
    assert total == CastStatistics(3.0, 40, 5, 3, 1)
    for a, b in ((math.nan, 1.0), (1.0, math.nan)):
        assert math.isnan((CastStatistics(a, 1, 0, 0, 0) + CastStatistics(b, 1, 0, 0, 0)).amax)
    assert CastStatistics(0.0, 0, 0, 0, 0).shares() == {"underflow": 0, "saturation": 0, "overflow": 0}


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("again", ["none", "layer"])
def test_the_callback_measures_what_the_products_quantise(
    again: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from small_model import small_config, small_model, tokens

    from nemotron_h.precision import emulation
    from nemotron_h.precision.plugins import plugin
    from nemotron_h.training.callbacks.cast_statistics import CastStatisticsCallback

    quantised: dict[str, set] = {operand: set() for operand in OPERANDS}
    real = emulation.RECIPES["fp8_current_scaling"]

    def watching(operand: str):
        def quantise(x, dtype):
            quantised[operand].add((x.abs().amax().item(), int((x != 0).sum())))
            return getattr(real, operand)(x, dtype)

        return quantise

    config = small_config(
        pattern="M-M*-M-",
        fp8_emulation="fp8_current_scaling",
        first_last_layers_bf16=True,
        num_layers_at_start_in_bf16=2,
        num_layers_at_end_in_bf16=2,
        recompute_mamba=again,
        recompute_attention=again,
        recompute_ffn=again,
    )
    model = small_model(config).train()
    trainer = SimpleNamespace(
        precision_plugin=plugin("fp8_current_scaling"),
        global_step=2,
        world_size=1,
        is_global_zero=True,
        loggers=[],
        checkpoint_callback=SimpleNamespace(dirpath=str(tmp_path / "checkpoints")),
    )
    callback = CastStatisticsCallback([3])
    callback.on_train_start(trainer, model)
    callback.on_train_batch_start(trainer, model, None, 0)
    with monkeypatch.context() as patched:
        recipe = emulation.Recipe(*map(watching, OPERANDS), real.gradient_dtype)
        patched.setitem(emulation.RECIPES, "fp8_current_scaling", recipe)
        patched.setattr(statistics, "RECIPES", {"fp8_current_scaling": real})
        batch = tokens(2, 65)
        model(input_ids=batch[:, :-1], labels=batch[:, 1:].contiguous()).mean().backward()
    trainer.global_step = 3
    callback.on_train_batch_end(trainer, model, None, None, 0)
    rows = json.loads((tmp_path / CAST_STATISTICS).read_text())
    assert {(r["layer"], r["type"], r["product"]) for r in rows} == {
        (2, "mamba", "in_proj"),
        (2, "mamba", "out_proj"),
        (3, "attention", "linear_qkv"),
        (3, "attention", "linear_proj"),
        (4, "ffn", "linear_fc1"),
        (4, "ffn", "linear_fc2"),
    }
    assert {r["step"] for r in rows} == {3}
    for operand, seen in quantised.items():
        measured = {(r["amax"], r["nonzero"]) for r in rows if r["operand"] == operand}
        assert len(seen) == 6
        assert measured == seen, operand
    callback.on_train_batch_start(trainer, model, None, 0)
    assert not callback.hooks, "step 4 is not one to measure"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of a very small model over a prepared blend."""
    from nemotron_h.data.blend import load_blend
    from nemotron_h.data.prepare.pipeline import prepare

    folder = tmp_path_factory.mktemp("compare")
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(200)]
    documents = [" ".join(rng.choices(words, k=rng.randint(5, 120))) for _ in range(200)]
    (folder / "words.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    (folder / "words.yaml").write_text(BLEND)
    prepare(load_blend(str(folder / "words.yaml")), folder / "data")
    path = folder / "small.yaml"
    path.write_text(RECIPE.format(folder=folder))
    return path


def test_runs_differ_in_precision_or_initial_weights_alone(recipe: Path) -> None:
    edges = ["precision_options.bf16_edge_layers=1"]
    made = comparison(str(recipe), 8, seeds=3, overrides=edges)
    assert [run.name for run in made.runs] == ["fp8_current_scaling", "bf16", "bf16-seed-1235", "bf16-seed-1236"]
    fp8, bf16, *seeds = (run.recipe for run in made.runs)
    assert {r.tokens for r in (fp8, bf16, *seeds)} == {str(8 * 64 * 8)}
    assert fp8.precision_options.bf16_edge_layers == 1
    assert fp8.precision_options.measured_steps == [1, 2, 4, 6, 8]
    assert [r.init_seed for r in (fp8, bf16, *seeds)] == [1234, 1234, 1235, 1236]
    assert fp8.data == bf16.data == seeds[0].data == seeds[1].data
    assert fp8.optim == bf16.optim == seeds[0].optim
    assert fp8.model == bf16.model


def test_several_pairs_share_their_initial_weights(recipe: Path) -> None:
    edges = ["precision_options.bf16_edge_layers=1"]
    made = comparison(str(recipe), 8, pairs=2, overrides=edges)
    assert [(a.name, b.name) for a, b in made.paired] == [
        ("bf16", "fp8_current_scaling"),
        ("bf16-seed-1235", "fp8_current_scaling-seed-1235"),
    ]
    assert [run.name for run in made.others] == ["bf16-seed-1235"]
    for a, b in made.paired:
        assert a.recipe.init_seed == b.recipe.init_seed
        assert (a.recipe.precision, b.recipe.precision) == ("bf16", "fp8_current_scaling")


def test_the_mean_of_several_pairs_comes_with_its_error(recipe: Path, tmp_path: Path) -> None:
    edges = ["precision_options.bf16_edge_layers=1"]
    made = comparison(str(recipe), 8, pairs=3, out=tmp_path, overrides=edges)
    last = {"bf16": 1.0, "bf16-seed-1235": 2.0, "bf16-seed-1236": 4.0}
    last |= {"fp8_current_scaling": 1.01, "fp8_current_scaling-seed-1235": 1.98, "fp8_current_scaling-seed-1236": 4.08}
    for run in made.runs:
        write_events(run.folder, 1, [3.0] * 7 + [last[run.name]], 100.0)
    found = results(made, window=1)
    gaps = [-0.01, 0.01, -0.02]
    assert [c.summary()["last"] for c in found.train] == pytest.approx(gaps, rel=1e-5)
    over = found.as_dict()["over_pairs"]["train"]
    assert over["mean"] == pytest.approx(-0.02 / 3, rel=1e-4)
    assert over["standard_error"] == pytest.approx(0.0152753 / 3**0.5, rel=1e-4)
    assert over["median"] == pytest.approx(-0.01, rel=1e-4)
    assert [c.summary()["last"] for c in found.noise_train] == pytest.approx([-1.0, -3.0])


def test_an_override_that_fits_the_steps_need_not_fit_the_recipe(recipe: Path) -> None:
    made = comparison(str(recipe), 100, overrides=["optim.warmup_tokens=8192", "precision_options.measured_steps=[90]"])
    assert made.runs[0].recipe.precision_options.measured_steps == [90]
    assert made.runs[1].recipe.optim.warmup_tokens == "8192"


@pytest.mark.parametrize(
    ("steps", "options", "words"),
    [
        (1, {}, "with --steps 1 .512 tokens.: .*optim.warmup_tokens .512. is not shorter than the run"),
        (8, {"precision": "fp9"}, "--precision = 'fp9'"),
        (8, {"against": "bf61"}, "--against = 'bf61'"),
        (8, {"precision": "bf16"}, "are both bf16"),
        (8, {"overrides": ["tokens=5"]}, "set by --steps"),
        (8, {"overrides": ["precision=bf16"]}, "set by --precision"),
        (8, {"overrides": ["parallel.nodes=2"]}, "parallel.nodes = 2"),
        (8, {"overrides": ["overrides=[trainer.max_steps=3]"]}, "trainer.max_steps=3"),
        (8, {"overrides": ["precision_options.measured_steps=[9]"]}, "measured_steps has 9"),
        (8, {"overrides": ["data.root=/nowhere"]}, "not prepared"),
        (0, {}, "1 or more"),
    ],
)
def test_mistakes_are_found_before_a_run_starts(recipe: Path, steps: int, options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        comparison(str(recipe), steps, **options)


def test_a_comparison_of_several_nodes_goes_to_a_cluster(recipe: Path, tmp_path: Path) -> None:
    slurm = ["executor=slurm", "executor.account=a", "executor.partition=p", f"executor.work_dir={tmp_path}"]
    place, _ = place_of(slurm)
    made = comparison(str(recipe), 8, out=Path("pair"), overrides=["parallel.nodes=2"], place=place)
    assert made.out == tmp_path / "pair"
    assert {run.folder.parent for run in made.runs} == {made.out}
    assert {run.recipe.parallel.nodes for run in made.runs} == {2}


def test_a_recipe_without_a_length_is_refused(recipe: Path) -> None:
    path = recipe.with_name("endless.yaml")
    path.write_text(recipe.read_text().replace("tokens: 4096\n", ""))
    with pytest.raises(UserError, match="tokens is missing"):
        comparison(str(path), 8)


def test_a_folder_of_another_comparison_is_refused(recipe: Path, tmp_path: Path) -> None:
    first = comparison(str(recipe), 8, out=tmp_path)
    first.runs[0].recipe_file.write_text(text_of(first.runs[0]))
    check_same(comparison(str(recipe), 8, out=tmp_path).runs[0], "")
    check_same(comparison(str(recipe), 8, out=tmp_path / ".." / tmp_path.name).runs[0], "")
    with pytest.raises(UserError, match="tokens: 4096 there, 2048 now"):
        check_same(comparison(str(recipe), 4, out=tmp_path).runs[0], "")


class Forked:
    """A run of a command, over when it has begun: in a fork, which imports nothing."""

    def __init__(self, run: Run, *_: object) -> None:
        write_recipe(run)
        folder, output = run.recipe_file.parent, run.recipe_file.with_suffix(".out")
        self.output, self.steps = starting._Output(lambda: output), starting.Steps(run.folder)
        self.code = FORKS.run(str(WORKER), str(run.recipe_file), folder=folder, name=run.name)

    def over(self) -> bool:
        return True


@pytest.mark.slow
def test_a_whole_comparison_and_nothing_twice(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = recipe.with_name("pair")
    command = ["compare-precision", str(recipe), "--steps", "4", "--out", str(out)]
    command += ["precision_options.bf16_edge_layers=1"]
    monkeypatch.setattr(starting, "begin", Forked)

    def call() -> str:
        return CliRunner().invoke(app, command, catch_exceptions=False).stdout

    first = call()
    assert "bf16 finished; 2 of 2" in first
    found = json.loads((out / "comparison.json").read_text())
    (train,), (validation,) = found["pair"]["train"], found["pair"]["validation"]
    assert train["tokens"] == [512, 1024, 1536, 2048]
    assert validation["tokens"] == [512, 1024, 1536, 2048]
    assert all(0 < abs(value) < 0.02 for value in [*train["gap"], *validation["gap"]])
    losses = {name: paired.read_losses(out / name, 4) for name in ("bf16", "fp8_current_scaling")}
    bf16, fp8 = losses["bf16"], losses["fp8_current_scaling"]
    assert train["gap"] == pytest.approx([(bf16.train[n] - fp8.train[n]) / bf16.train[n] for n in range(1, 5)])
    orders = [json.loads((out / name / "run.json").read_text())["data"]["order"] for name in losses]
    assert orders[0] == orders[1], "they read the same samples"
    # layers 1 to 3 of M-M*- are in FP8: two products of three operands each, at every one of the four steps
    assert list(found["casts"]) == ["fp8_current_scaling"]
    casts = found["casts"]["fp8_current_scaling"]
    assert len(casts) == 3 * 2 * 3 * 4
    assert all(row["amax"] > 0 and row["overflow"] == 0 for row in casts)
    assert {row["format"] for row in casts if row["operand"] == "gradient"} == {"E5M2"}
    scalars = read_scalars(out / "fp8_current_scaling")
    row = next(r for r in casts if (r["step"], r["layer"], r["operand"]) == (3, 1, "gradient"))
    assert scalars[f"fp8_amax_gradient/layer_001_{row['product']}", 2] == pytest.approx(row["amax"])
    for picture in ("gap.png", "casts-fp8_current_scaling.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")

    records = [out / name / "run.json" for name in losses]
    before = [record.stat().st_mtime_ns for record in records]
    again = call()
    assert again.count("finished already") == 2
    assert [record.stat().st_mtime_ns for record in records] == before
    assert json.loads((out / "comparison.json").read_text()) == found


def test_a_run_on_two_ranks_in_an_environment_that_is_not_activated(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    made = comparison(str(recipe), 2, out=tmp_path, overrides=["parallel.devices=2"])
    run = next(run for run in made.runs if run.name == "bf16")
    log = run.recipe_file.with_suffix(".log")
    log.write_text("error: of an earlier try\n")
    start_run(run, "two ranks", 2, Console(file=io.StringIO()))
    assert "2 steps of 512 tokens, 2 ranks" in log.read_text()
    assert is_finished(run, 2)


def test_the_reason_of_a_failure_is_of_this_try(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = comparison(str(recipe), 2, out=tmp_path).runs[0]
    log = run.recipe_file.with_suffix(".log")
    log.write_text("error: of an earlier try\n")
    command = [sys.executable, "-c", "print('killed'); raise SystemExit(3)"]
    monkeypatch.setattr("nemotron_h.launch.runs.command_of", lambda _: command)
    with pytest.raises(UserError, match="ended with exit code 3: killed"):
        start_run(run, "fails", 2, Console(file=io.StringIO()))
    with pytest.raises(UserError, match="ended with exit code 3: killed"):
        train_several([(run, 2)], 1, Console(file=io.StringIO()))


def read_scalars(folder: Path) -> dict[tuple[str, int], float]:
    """(tag, step) -> value of every scalar."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for path in folder.rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0})
        events.Reload()
        found |= {(tag, e.step): e.value for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}
    return found
