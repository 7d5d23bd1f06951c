"""`nemotron-h plan`: what it says, how fast it says it, and that it says no."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nemotron_h.architecture.definition import definition_from_dict
from nemotron_h.cli.main import app
from nemotron_h.core.errors import UserError
from nemotron_h.core.units import BYTES
from nemotron_h.planning.flops import flops_per_token
from nemotron_h.planning.gpus import gpu
from nemotron_h.planning.inference import Serving, inference_memory
from nemotron_h.planning.layouts import best, layout_of, relative_speed
from nemotron_h.planning.memory import HostInputs
from nemotron_h.planning.plan import make_plan
from nemotron_h.recipe.compose import compose, known_recipes

MILLION_TOKENS = 2**20


def definition(name: str):
    return definition_from_dict(asdict(compose(name).model), name)


def run(*arguments: str) -> dict:
    result = CliRunner().invoke(app, ["plan", *arguments, "--json"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return json.loads(result.output)


# host memory


def test_offloaded_inputs_move_from_the_gpu_to_the_node() -> None:
    """By hand, of the 8B at 524,288 tokens over 8 x 2 ranks, 48 layers recomputed: an input is 65,536 x 4,096 x 2 / 2
    bytes over tensor parallel 8. The peak is the last Mamba-2 layer's, when the FFN behind it is through: of the 47 of
    before, its own and the one that is fetched stay.
    """
    name, size = "nemotron_h_8b/sft_512k", 524_288 // 2 * 4096 * 2 // 8
    kept, moved = run(name), run(name, "recompute.offload=true")
    assert moved["memory"]["host_inputs"] == {"size": size, "count": 48}
    assert kept["memory"]["host_inputs"] is None
    peaks = [each["memory"]["peak"] for each in (kept, moved)]
    assert peaks[0] - peaks[1] == (47 - 2) * size
    assert moved["memory"]["node_host_bytes"] == 8 * 48 * size + moved["saves"]["node_bytes"]
    assert HostInputs(3 << 20, 2).bytes == 8 << 20
    one_node = ("parallel.nodes=1", "parallel.context=1", "recompute.attention=layer", "--gpu", "l40s")
    remedies = {each["settings"]: each["peak"] for each in run(name, *one_node)["memory"]["remedies"]}
    offloaded = run(name, *one_node, "recompute.offload=true")["memory"]
    assert remedies["recompute.offload=true"] == offloaded["peak"] <= offloaded["limit"]
    staged = run(name, "recompute.offload=true", "parallel.pipeline=2", "parallel.context=1")["memory"]
    assert staged["host_inputs"] == {"size": 2 * size, "count": 2 * 24}  # two micro-batches in flight


def test_a_node_without_room_for_inputs_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(gpu("h100"), node_memory_gb=100)
    monkeypatch.setattr("nemotron_h.planning.plan.gpu", lambda name: small)
    shown = CliRunner().invoke(app, ["plan", "nemotron_h_8b/sft_512k", "recompute.offload=true"]).output
    assert "does not fit the memory of a node: leave recompute.offload out" in shown
    assert "host memory keeps 48 layers' inputs, 12.00 GiB per GPU" in shown
    assert "fits h100" in CliRunner().invoke(app, ["plan", "nemotron_h_8b/sft_512k"]).output


# lengths


def test_flops_are_the_mean_over_the_lengths_of_the_rows() -> None:
    """Half of the tokens of the 8B's long phase in sequences of 4,096: attention's part by hand, all else the same."""
    plan, name = run("nemotron_h_8b/pretrain_long"), "nemotron_h_8b"
    flops, of_length = plan["flops_per_token"], plan["flops_per_token_of_length"]
    long, short = (flops_per_token(definition(name), length) for length in (524_288, 4096))
    assert of_length == {"524288": long.total, "4096": short.total}
    heads = 4 * 3 * 4 * 32 * 128  # layers, passes, a multiply-add of scores and of values, their width
    assert flops["attention_core"] == heads * ((524_288 + 1) / 2 + (4096 + 1) / 2) / 2
    assert flops["total"] == pytest.approx((long.total + short.total) / 2)
    assert flops["total"] - flops["attention_core"] == pytest.approx(short.total - short.attention_core)
    alone = run("nemotron_h_8b/pretrain_long", "data.blend=nemotron_h_phase3")
    assert alone["flops_per_token"]["total"] == pytest.approx(long.total)
    speeds = [each["schedule"]["tokens_per_second"] for each in (plan, alone)]
    assert speeds[0] / speeds[1] == pytest.approx(long.total / flops["total"])
    shown = CliRunner().invoke(app, ["plan", "nemotron_h_8b/pretrain_long"]).output
    assert "sequences of 524,288 (50.0%) and 4,096 (50.0%)" in shown
    assert "97.391 in sequences of 524,288, 46.254 in sequences of 4,096" in shown


def test_lengths_of_phases_count_by_their_steps(tmp_path: Path) -> None:
    """Two phases of 60 and 40 %, with short rows of two lengths."""
    (tmp_path / "blend.yaml").write_text(
        "defaults: [nemotron_h_short, _self_]\nname: two\nphases:\n"
        "  - {name: a, weights: {code: 100}, until: {fraction: 0.6}, short: {seq_length: 4096, share: 0.5}}\n"
        "  - {name: b, weights: {web_crawl: 10, academic: 10, multilingual: 10, crawl_plus_plus: 20, math: 20, "
        "wiki: 10, sft: 20}, short: {seq_length: 2048, share: 0.25}}\n"
    )
    recipe = compose(
        "nemotron_h_8b", [f"data.blend={tmp_path / 'blend.yaml'}", "tokens=6_291_456_000", "optim.warmup_tokens=1M"]
    )
    layout = layout_of(recipe)
    assert layout.lengths == pytest.approx({8192: 0.6, 4096: 0.3, 2048: 0.1})
    assert layout.documents


# schedule


@pytest.mark.parametrize(
    ("name", "steps", "warmup", "switches"),
    [
        ("nemotron_h_8b", 2_384_186, 1_319, [1_430_511, 1_907_349, 2_323_786]),
        ("nemotron_h_56b", 3_178_914, 3_974, [1_907_349, 2_543_132, 3_118_515]),
    ],
)
def test_paper_s_schedule(name: str, steps: int, warmup: int, switches: list[int]) -> None:
    schedule = run(name)["schedule"]
    assert (schedule["steps"], schedule["warmup_steps"]) == (steps, warmup)
    assert [phase["first_step"] for phase in schedule["phases"]] == [0, *switches]


def test_dates_and_cost_follow_from_the_utilisation() -> None:
    plan = run("nemotron_h_8b", "--gpus", "64", "--mfu", "0.4", "--start", "2026-01-01")
    schedule = plan["schedule"]
    # 989.4 TFLOP/s * 0.4 / 46.66 GFLOP per token
    assert schedule["tokens_per_second"] / 64 == pytest.approx(8_478, rel=2e-3)
    assert schedule["gpu_hours"] == pytest.approx(0.49e6, rel=0.01)
    begin, end = (datetime.fromisoformat(schedule["phases"][0]["date"]), datetime.fromisoformat(schedule["end"]))
    assert (end - begin).total_seconds() == pytest.approx(schedule["seconds"], abs=60)
    assert run("nemotron_h_8b", "--gpus", "64", "--mfu", "0.2")["schedule"]["gpu_hours"] == pytest.approx(
        2 * schedule["gpu_hours"]
    )


def test_default_utilisation_is_the_published_run_s() -> None:
    """56B on 128 H100 in FP8: 2,070 tokens/s per GPU were published."""
    schedule = run("nemotron_h_56b", "--gpus", "128")["schedule"]
    assert schedule["tokens_per_second"] / 128 == pytest.approx(2070, rel=0.005)
    assert "dgxc-benchmarking" in schedule["mfu_source"]


# adapters


def test_a_plan_of_adapters_counts_what_is_trained() -> None:
    lora, whole = run("nemotron_h_8b/sft_lora"), run("nemotron_h_8b/sft")
    assert lora["trained_parameters"] < 0.02 * lora["parameters"] == 0.02 * whole["trained_parameters"]
    assert lora["flops_per_token"]["adapters"] > 0 == whole["flops_per_token"]["adapters"]
    assert 0.6 < lora["flops_per_token"]["total"] / whole["flops_per_token"]["total"] < 0.75
    assert lora["checkpoint_bytes"]["weights"] == 2 * lora["trained_parameters"]
    result = CliRunner().invoke(app, ["plan", "nemotron_h_8b/sft_lora"])
    assert "lora of rank 32 on in_proj, out_proj" in result.output
    assert "its adapters alone" in result.output


def test_a_plan_of_frozen_parts_counts_what_is_trained() -> None:
    whole, frozen = (run("nemotron_h_8b", *own) for own in ((), ("optim.frozen=[ffn,embedding]",)))
    definition = compose("nemotron_h_8b").model
    ffn = 2 * definition.hidden_size * definition.ffn_hidden_size + definition.hidden_size
    still = definition.expect.ffn * ffn + definition.vocab_size * definition.hidden_size
    assert frozen["trained_parameters"] == whole["trained_parameters"] - still
    assert whole["checkpoint_bytes"]["optimizer"] - frozen["checkpoint_bytes"]["optimizer"] == 12 * still
    assert whole["checkpoint_bytes"]["weights"] == frozen["checkpoint_bytes"]["weights"]
    flops, all_train = frozen["flops_per_token"], whole["flops_per_token"]
    assert flops["ffn"] == pytest.approx(all_train["ffn"] * 2 / 3)
    assert flops["total"] - flops["ffn"] == pytest.approx(all_train["total"] - all_train["ffn"])
    bytes_of = [plan["memory"]["stages"][0] for plan in (whole, frozen)]
    assert bytes_of[0]["weights"] == bytes_of[1]["weights"]
    assert bytes_of[0]["gradients"] > bytes_of[1]["gradients"]
    assert bytes_of[0]["activations"]["mamba"] == bytes_of[1]["activations"]["mamba"]
    assert bytes_of[0]["activations"]["ffn"] > 1.7 * bytes_of[1]["activations"]["ffn"]  # inputs of matmuls
    said = CliRunner().invoke(app, ["plan", "nemotron_h_8b", "optim.frozen=[ffn,embedding]"]).output
    assert "frozen: ffn, embedding; " in said


# inference


def test_paper_s_memory_of_the_56b_in_fp4() -> None:
    """Paper 3: 29.5 GiB for the weights of the 56B in FP4."""
    memory = inference_memory(definition("nemotron_h_56b"), Serving(MILLION_TOKENS, weight_bytes=BYTES["fp4"]))
    assert memory.weights / 2**30 == pytest.approx(29.5, abs=0.05)


def test_the_47b_fits_the_paper_s_budget_only_with_fp4_keys_and_values() -> None:
    """Paper 3: below 31.7 GiB at a context of a million tokens; the 56B is not."""
    four, eight = (
        inference_memory(
            definition("nemotron_h_47b"), Serving(MILLION_TOKENS, weight_bytes=BYTES["fp4"], kv_bytes=BYTES[kind])
        ).total
        / 2**30
        for kind in ("fp4", "fp8")
    )
    assert four == pytest.approx(30.8, abs=0.1)
    assert four < 31.7 < eight
    parent = inference_memory(
        definition("nemotron_h_56b"), Serving(MILLION_TOKENS, weight_bytes=BYTES["fp4"], kv_bytes=BYTES["fp4"])
    )
    assert parent.total / 2**30 > 31.7


@pytest.mark.parametrize(
    ("name", "ssm_mib", "kv_kib"),
    [
        ("nemotron_h_4b", 84, 16),
        ("nemotron_h_8b", 96, 16),
        ("nemotron_h_47b", 720, 20),
        ("nemotron_h_56b", 864, 40),
        ("nano_4b", 78.75, 16),
        ("nano_9b_v2", 135, 16),
        ("nano_12b_v2", 140, 24),
    ],
)
def test_states_per_sequence(name: str, ssm_mib: float, kv_kib: int) -> None:
    memory = inference_memory(definition(name), Serving(1000))
    assert memory.ssm_states / 2**20 == ssm_mib
    assert memory.kv_cache / 1000 / 2**10 == kv_kib


def test_states_are_those_that_generation_allocates() -> None:
    import torch

    from nemotron_h.inference.states import States
    from nemotron_h.model.blocks.mamba import MambaState
    from nemotron_h.model.blocks.registry import running_layers

    d = definition("nemotron_h_tiny")
    states = States.empty(running_layers(d), 3, 200, torch.bfloat16, torch.device("meta"))
    mamba = [layer for layer in states.layers if isinstance(layer, MambaState)]
    memory = inference_memory(d, Serving(200, sequences=3))
    assert memory.ssm_states == sum(layer.ssm.nbytes for layer in mamba)
    assert memory.conv_states == sum(layer.conv.nbytes for layer in mamba)
    caches = [layer for layer in states.layers if layer is not None and not isinstance(layer, MambaState)]
    assert memory.kv_cache == sum(layer.keys.nbytes + layer.values.nbytes for layer in caches)


# layouts


def test_a_layout_that_does_not_fit_says_what_would() -> None:
    too_much = ["parallel.tensor=1", "parallel.sequence=false", "data.micro_batch_size=4"]
    plan = run("nemotron_h_8b", *too_much, "--gpus", "8")
    assert not plan["memory"]["fits"]
    assert plan["memory"]["remedies"]
    for remedy in plan["memory"]["remedies"]:
        settings = remedy["settings"].split()
        keys = {setting.split("=")[0] for setting in settings}
        kept = [setting for setting in too_much if setting.split("=")[0] not in keys]
        again = run("nemotron_h_8b", *kept, *settings, *([] if "--gpus" in settings else ["--gpus", "8"]))
        assert again["memory"]["fits"], remedy
        assert again["memory"]["peak"] == remedy["peak"]


def test_sweep_marks_the_fastest_that_fits_and_trains() -> None:
    plan = make_plan(compose("nemotron_h_8b", ["parallel.nodes=1", "parallel.devices=8"]))
    rows = plan.sweep()
    chosen = best(rows)
    assert chosen is not None
    assert chosen.fits
    assert all(not row.fits or row.refused or row.tokens_per_second <= chosen.tokens_per_second for row in rows)
    assert any(row.layout.context > 1 and not row.refused for row in rows)
    own = [row for row in rows if row.layout == plan.layout]
    assert len(own) == 1
    assert own[0].tokens_per_second == pytest.approx(plan.schedule.tokens_per_second)
    assert own[0].peak == plan.largest.peak


def test_bubbles_and_recomputation_cost_time() -> None:
    d = definition("nemotron_h_8b")
    plain = layout_of(compose("nemotron_h_8b", ["parallel.nodes=1", "parallel.devices=64"]))
    from dataclasses import replace

    piped = replace(plain, pipeline=4, micro_batches=12)
    assert relative_speed(d, piped) / relative_speed(d, plain) == pytest.approx(12 / 15)
    ffn = relative_speed(d, replace(plain, recompute_ffn="layer")) / relative_speed(d, plain)
    assert ffn == pytest.approx(1 / (1 + 0.544 / 3), rel=1e-3)  # the FFN's share of the FLOPs, a third is its forward


# errors


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--gpus", "63"], "the nearest is 64"),
        (["--gpus", "80"], "data.global_batch_size"),
        (["--gpu", "h10"], "Did you mean h100?"),
        (["--gpu", "a100-80g", "precision=fp8_current_scaling"], "has no FP8"),
        (["--mfu", "40"], "0.4 is 40 %"),
        (["--start", "9999-12-31"], "dates end with the year 9999"),
        (["--out", "plan.xyz"], "--out plan.xyz: Format 'xyz' is not supported"),
        (["--out", "no/such/folder/plan.png"], "--out no/such/folder/plan.png: No such file or directory"),
        (["--context", "0"], "--context = 0"),
        (["parallel.tensor=3"], "parallel.tensor"),
    ],
)
def test_mistakes_are_named(arguments: list[str], expected: str) -> None:
    with pytest.raises(UserError) as error:
        run("nemotron_h_8b", *arguments)
    assert expected in str(error.value)


def test_every_gpu_has_a_source() -> None:
    for name in ("h100", "h200", "a100-80g", "b200", "gb200", "l40s", "rtx-5090"):
        assert gpu(name).source


# the command


@pytest.mark.parametrize("name", known_recipes())
def test_every_recipe_has_a_plan(name: str) -> None:
    plan = make_plan(compose(name))
    d, matrices = plan.definition, 1 if plan.definition.tied_embeddings else 2
    layers = sum(part["parameters"] for part in plan.layers().values())
    assert d.parameters == layers + (matrices * d.vocab_size + 1) * d.hidden_size
    assert plan.as_dict()["memory"]["peak"] == plan.largest.peak
    assert plan.fits, f"{plan.largest.peak / 2**30:.1f} GiB"


def test_tables_and_picture(tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    result = CliRunner().invoke(app, ["plan", "nemotron_h_56b", "--gpus", "64", "--out", str(picture)])
    assert result.exit_code == 0, result.output
    for said in ("56,324,350,464 parameters", "does not fit", "would fit with", "GPU-hours", "FP8", "SSM states"):
        assert said in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    swept = CliRunner().invoke(app, ["plan", "nemotron_h_8b", "--gpus", "8", "--sweep"])
    assert swept.exit_code == 0, swept.output
    assert swept.output.count("best") == 1


def test_takes_less_than_a_second_and_no_torch(tmp_path: Path) -> None:
    """In the processor's time, which is what an idle machine's clock shows. A second is five times what importing the
    libraries of every command takes on the machine of the documents; others are faster or slower.
    """
    plan = (
        "import sys; from nemotron_h.cli.main import app\n"
        "try: app(['plan', 'nemotron_h_8b', '--gpus', '64'])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'nemo', 'megatron', 'numpy', 'matplotlib', 'transformer_engine', 'nemo_run'}\n"
        "found = heavy & set(sys.modules); assert not found, found\n"
    )
    libraries = "import typer, rich.table, hydra, yaml"
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    seconds: dict[str, list[float]] = {plan: [], libraries: []}
    for _ in range(3):  # the first may compile bytecode
        for code, taken in seconds.items():
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment, cwd=tmp_path)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds[plan]) < 5 * min(seconds[libraries]), list(seconds.values())


# distillation


def test_a_teacher_counts() -> None:
    """The 56B beside the 47B: its weights on each of 8 ranks, a third of its step's operations, none from a cache."""
    made = make_plan(compose("nemotron_h_47b/distill"))
    alone = make_plan(compose("nemotron_h_47b/distill", ["distill.teacher_logits=runs/x", "distill.top_k=64"]))
    assert made.layout.teacher == definition("nemotron_h_56b")
    assert made.as_dict()["teacher"]["parameters"] == 56_324_350_464
    assert made.teacher_flops.total == pytest.approx(flops_per_token(made.layout.teacher, 8192).total / 3)
    longer = made.schedule.seconds / alone.schedule.seconds
    assert longer == pytest.approx(1 + made.teacher_flops.total / made.flops.total)
    # 2 bytes a weight, and a byte more where its product is in FP8
    assert 2 <= made.largest.teacher / (56_324_350_464 / 8) <= 3
    assert alone.layout.teacher is None
    assert alone.largest.teacher == 0
    # 10,014 steps and 8 validation batches of 768 windows, 388 bytes a token
    assert alone.teacher_logits == (10_014 + 8) * 768 * 8192 * 388
    assert made.teacher_logits == 0


def test_a_teacher_that_has_only_begun_is_the_shipped_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/nemotron_h_56b/tensorboard").mkdir(parents=True)
    assert make_plan(compose("nemotron_h_47b/distill")).layout.teacher.name == "nemotron_h_56b"


def test_a_teacher_of_unknown_size_is_an_error() -> None:
    with pytest.raises(UserError, match=r"distill\.teacher: runs/elsewhere is no checkpoint on this machine") as error:
        make_plan(compose("nemotron_h_47b/distill", ["distill.teacher=runs/elsewhere"]))
    assert "distill.teacher=runs/nemotron_h_56b" in error.value.hint
