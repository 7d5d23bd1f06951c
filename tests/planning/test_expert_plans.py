"""Plans of models with experts: what is split over which ranks, what a token costs, and which layouts are refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from nemotron_h.architecture.adapters import coverage, trained_parameters
from nemotron_h.architecture.blocks.experts import Experts
from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.architecture.gemms import check_gemms, gemm_table
from nemotron_h.architecture.rank import Layout
from nemotron_h.cli.main import app
from nemotron_h.core.errors import UserError
from nemotron_h.planning.flops import flops_per_token
from nemotron_h.planning.layouts import best, expert_sizes, sweep
from nemotron_h.planning.memory import rank_experts, rank_parameters, rank_trained, stage_memory
from nemotron_h.planning.plan import make_plan
from nemotron_h.planning.saves import pieces, rank_bytes
from nemotron_h.recipe.check import examine
from nemotron_h.recipe.checks import definition_of
from nemotron_h.recipe.compose import compose
from nemotron_h.recipe.shipped import read_shipped
from nemotron_h.schema.recipe import AdapterSchema

NANO, TINY = "nano_30b_a3b", "nemotron_h_moe_tiny"
#: of Nano 30B, by hand: an expert's two matrices; all experts of a layer; a router with its bias
EXPERT = 2 * 2688 * 1856
LAYER = 128 * EXPERT
ROUTER = 128 * (2688 + 1)


@pytest.fixture(scope="module")
def nano() -> ModelDefinition:
    return definition_of(read_shipped(f"{NANO}/pretrain"), NANO)


def planned(model: str) -> ModelDefinition:
    return definition_of(compose("nano_30b_a3b", [f"model={model}"], trains=False), model)


@pytest.mark.parametrize("expert", [1, 4, 8, 128])
@pytest.mark.parametrize("tensor", [1, 2])
def test_experts_are_split_over_their_ranks_and_nothing_else_is(
    nano: ModelDefinition, tensor: int, expert: int
) -> None:
    layout = Layout(seq_length=8192, tensor=tensor, sequence=tensor > 1, data=128, expert=expert)
    total, in_float32 = rank_parameters(nano, layout, 0)
    assert rank_experts(nano, layout, 0) == 23 * LAYER // expert
    alone, _ = rank_parameters(nano, replace(layout, expert=1), 0)
    assert alone - total == 23 * (LAYER - LAYER // expert)
    # whole on each tensor-parallel rank: norms, routers, biases
    whole = 53 * 2688 + 23 * ROUTER
    assert total - 23 * LAYER // expert - whole == (nano.parameters - 23 * LAYER - whole) // tensor
    assert in_float32 == 23 * ROUTER + 23 * 3 * 64 // tensor


def test_the_optimizer_of_an_expert_is_sharded_over_the_ranks_that_have_it(nano: ModelDefinition) -> None:
    """In BF16 12 bytes a weight, 8 in float32: over data-parallel ranks, experts' over tensor * data / expert."""
    layout = Layout(seq_length=8192, tensor=2, sequence=True, data=64, expert=8)
    memory = stage_memory(nano, layout, 0)
    total, in_float32 = rank_parameters(nano, layout, 0)
    experts = 23 * LAYER // 8
    dense = 12 * (total - experts - in_float32) + 8 * in_float32
    assert memory.optimizer == pytest.approx(dense / 64 + 12 * experts / (2 * 64 // 8), abs=1)
    assert memory.weights == 2 * (total - in_float32) + 4 * in_float32
    assert memory.gradients == 4 * total
    whole = stage_memory(nano, replace(layout, distributed_optimizer=False), 0)
    assert whole.optimizer == dense + 12 * experts


def test_all_ranks_together_save_each_number_once(nano: ModelDefinition) -> None:
    for expert in (1, 8):
        layout = Layout(seq_length=8192, data=64, expert=expert)
        states = nano.parameters * 12 + 2 * nano.parameters + 2 * rank_parameters(nano, layout, 0)[1]
        assert 64 * rank_bytes(nano, layout, 0) == pytest.approx(states, rel=1e-6)


def test_tensors_of_a_checkpoint_and_the_pieces_that_ranks_write(nano: ModelDefinition) -> None:
    """Router and bias whole, a piece of each expert's two matrices, and the shared expert's on each of two ranks."""
    block = nano.block("E")
    norm, *inside = [len(row.ours) for row in block.tensors("", "")]
    assert (norm, sum(inside)) == (1, block.tensor_count()) == (1, 6)
    assert block.pieces(2) == 2 + 2 * 128 + 2 * 2
    stacked = next(row for row in block.tensors("", "") if row.stacked)
    assert stacked.ours == {"mlp.experts.experts.linear_fc1.weight": (128, 1856, 2688)}
    assert list(stacked.theirs)[-1] == "mixer.experts.127.up_proj.weight"


def test_a_token_costs_what_it_passes(nano: ModelDefinition) -> None:
    forward = flops_per_token(nano, 8192, training=False)
    assert forward.router == 23 * 2 * 128 * 2688
    assert forward.experts == 23 * 2 * (6 * EXPERT + 2 * 2688 * 3712)
    assert forward.experts < forward.linear < forward.total
    every = replace(nano, experts_per_token=128)
    assert flops_per_token(every, 8192).experts == 3 * 23 * 2 * (LAYER + 2 * 2688 * 3712)


def test_adapters_of_experts_by_hand(nano: ModelDefinition) -> None:
    """A pair of each expert, on the ranks that have it; a token passes six, DoRA's lengths take all."""
    routed, shared = ["experts.linear_fc1", "experts.linear_fc2"], ["shared_experts.linear_fc1"]
    lora, dora = (AdapterSchema(kind, 8, 8.0, 0.0, [*routed, *shared]) for kind in ("lora", "dora"))
    each, beside = 2 * 8 * (2688 + 1856), 8 * (2688 + 3712)
    assert trained_parameters(lora, nano) == 23 * (128 * each + beside)
    rows = {row.target: (row.layers, row.weights, row.trained) for row in coverage(lora, nano)}
    assert rows["experts.linear_fc1"] == (23, 23 * LAYER // 2, 23 * 128 * each // 2)
    assert "router" not in rows
    layout = Layout(seq_length=8192, tensor=2, sequence=True, data=64, expert=8, adapter=dora)
    others, experts = rank_trained(nano, layout, 0)
    assert others == (23 * (8 * (2688 + 3712 // 2) + 3712 // 2), 23 * 3712 // 2)
    assert experts == (23 * 16 * (each + 2688 + 1856), 23 * 16 * (2688 + 1856))
    memory = stage_memory(nano, layout, 0)
    dense, routed_states = (12 * (total - exact) + 8 * exact for total, exact in (others, experts))
    assert memory.optimizer == pytest.approx(dense / 64 + routed_states / (2 * 64 // 8), abs=1)
    forward = flops_per_token(nano, 8192, training=False, adapter=lora)
    assert forward.adapters == 23 * 2 * (6 * each + beside)
    more = flops_per_token(nano, 8192, training=False, adapter=dora).adapters - forward.adapters
    assert more == pytest.approx(23 * 2 * 8 * (LAYER + 2688 * 3712) / 8192)
    one = Layout(seq_length=8192, adapter=lora)
    assert pieces(nano, one) == 4 * 23 * (128 * 2 + 1) * 2  # and three states of each


def test_latent_and_further_tokens_by_hand() -> None:
    """3.5 Lightning's second head is a projection of two states, an attention layer, an expert layer and the output."""
    lightning, nano = planned("lightning_30b_a3b"), planned("nano_30b_a3b")
    one = flops_per_token(lightning, 8192, training=False)
    star, experts = (sum(step.forward for step in nano.block(x).operations(8192, 128)) for x in "*E")
    assert one.mtp == star + experts + 2 * (2 * 2688 * 2688 + 2688 * 131072)
    assert one.total - one.mtp == flops_per_token(nano, 8192, training=False).total
    latent = planned("super_120b_a12b").block("E")
    assert isinstance(latent, Experts)
    assert latent.expert_parameters == 512 * 2 * 1024 * 2688
    assert latent.active_parameters == 4096 + 512 * 4097 + 2 * 4096 * 1024 + 22 * 2 * 1024 * 2688 + 2 * 4096 * 5376
    last = Layout(seq_length=8192, pipeline=2, data=8, expert=8)
    without = sum(rank_parameters(nano, last, stage)[0] for stage in (0, 1))
    added = sum(rank_parameters(lightning, last, stage)[0] for stage in (0, 1)) - without
    whole = lightning.mtp_parameters - LAYER + LAYER // 8
    assert added == whole + 131072 * 2688  # the last stage embeds tokens too


def test_matmuls_of_one_rank(nano: ModelDefinition) -> None:
    """An expert's matmul has the mean of its tokens: those of all ranks that share the experts."""
    table = {
        g.name: g
        for g in gemm_table(nano, "fp8_current_scaling", 2, tokens=8192, sequence_parallel=True, expert_parallel=8)
        if g.layer == 3
    }
    first = table["experts.linear_fc1"]
    assert (first.m, first.n, first.k, first.count) == (4096 * 6 * 8 // 128, 1856, 2688, 16)
    assert (first.dtype, table["router"].dtype, table["router"].m) == ("FP8", "FP32", 4096)
    assert table["shared_experts.linear_fc1"].n == 3712 // 2
    odd = replace(nano, expert_hidden_size=1850)
    with pytest.raises(UserError) as error:
        check_gemms(odd, "fp8_current_scaling", seq_length=8192, micro_batch_size=1)
    assert "experts.linear_fc1 of the experts layers" in error.value.message
    assert "model.expert_hidden_size = 1850" in error.value.message
    assert "model.expert_hidden_size to 1856" in error.value.hint


def test_layouts_of_a_sweep(nano: ModelDefinition) -> None:
    assert expert_sizes(nano, 96) == [1, 2, 4, 8, 16, 32]
    assert expert_sizes(nano, 1024)[-1] == 128
    plan = make_plan(compose(NANO, ["parallel.nodes=8"]))
    rows = plan.sweep()
    assert {row.layout.expert for row in rows} >= {1, 2, 8, 64}
    assert all((row.layout.ranks // row.layout.pipeline) % row.layout.expert == 0 for row in rows)
    chosen = best(rows)
    assert chosen is not None
    assert chosen.fits
    assert {row.recompute for row in rows} == {"none", "experts layer", "all layers"}
    unsplit = [row for row in rows if row.layout.pipeline == row.layout.expert == 1]
    assert unsplit
    assert not any(row.fits for row in unsplit), "all experts on every rank"
    peaks = {
        row.layout.expert: row.peak
        for row in rows
        if replace(row.layout, expert=1) == replace(rows[0].layout, expert=1)
    }
    assert [peaks[size] for size in sorted(peaks)] == sorted(peaks.values(), reverse=True)
    dense = make_plan(read_shipped("nemotron_h_8b/pretrain"))
    assert {row.layout.expert for row in sweep(dense.definition, dense.layout, dense.gpu, 1.0)} == {1}


def test_what_does_not_fit_would_with_experts_split() -> None:
    plan = make_plan(compose(NANO, ["parallel.expert=1"]))
    assert not plan.fits
    assert any(remedy.settings.startswith("parallel.expert=") for remedy in plan.remedies)


def test_tables_say_what_is_active() -> None:
    done = CliRunner().invoke(app, ["plan", NANO, "model=super_120b_a12b"])
    assert done.exit_code == 0, done.output
    words = " ".join(done.output.split())
    assert "120,668,707,840 parameters, 12,770,237,440 of them active" in words
    assert "2,942,325,248 in *E, which predicts 2 further tokens: 123,611,033,088 together" in words
    assert "planned only: training does not have model.expert_latent_size = 1024" in words
    found = json.loads(CliRunner().invoke(app, ["plan", NANO, "--json"]).output)
    assert (found["parameters"], found["active_parameters"]) == (31_577_940_288, 3_580_076_352)
    assert found["layout"]["expert"] == 8


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        (NANO, ["parallel.expert=3"], ("parallel.expert = 3 does not divide num_experts = 128", "nearest: 2")),
        (NANO, ["parallel.nodes=6", "parallel.expert=32"], ("does not divide the 48 ranks of a pipe", "nearest: 16")),
        ("nemotron_h_8b", ["parallel.expert=8"], ("parallel.expert = 8 is unused", "leave parallel.expert out")),
        ("nemotron_h_8b", ["experts.bias_update=0"], ("experts.bias_update = 0.0 is unused", "leave")),
        ("nemotron_h_8b", ["recompute.experts=layer"], ("recompute.experts = 'layer' is unused", "leave")),
        (NANO, ["parallel.sequence=false"], ("parallel.tensor = 2 without parallel.seq", "parallel.sequence: true")),
        (NANO, ["model.experts_per_token=200"], ("experts_per_token = 200 is above model.num_experts", "128 or less")),
        (NANO, ["model.expert_scaling=0"], ("model.expert_scaling is 0.0; it has to be positive", "give")),
        ("nemotron_h_8b", ["model.num_experts=8"], ("model.num_experts = 8 has no use", "add E to model.pattern")),
        (NANO, ["model.mtp_steps=1"], ("model.mtp_pattern = '' and model.mtp_steps = 1", "state both")),
        (NANO, ["model.mtp_pattern='-'", "model.mtp_steps=1"], ("has -, which model.pattern has not", "use M E *")),
        (NANO, ["model=super_120b_a12b"], ("model.expert_latent_size = 1024 of model super", "nemotron-h plan")),
        (NANO, ["model=lightning_30b_a3b"], ("model.mtp_pattern = *E of model", "model/lightning_30b_a3b.yaml")),
        (
            "nano_30b_a3b/sft_lora",
            ["adapter.targets=[router]"],
            ("'router', which matches nothing", "experts.linear_fc1"),
        ),
    ],
)  # fmt: skip
def test_a_mistake_names_key_and_fix(name: str, overrides: list[str], words: tuple[str, str]) -> None:
    with pytest.raises(UserError) as error:
        examine(name, overrides)
    assert words[0] in error.value.message
    assert words[1] in error.value.hint


def test_the_tiny_one_splits_over_two_ranks() -> None:
    split = ["parallel.devices=2", "parallel.expert=2", "data.micro_batch_size=8"]
    assert compose(TINY, split).parallel.expert == 2
    assert compose(TINY, [*split, "parallel.tensor=2", "parallel.sequence=true"]).parallel.tensor == 2
