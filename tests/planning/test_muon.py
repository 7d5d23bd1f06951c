"""Parts of every kind of block, and what a step of Muon costs, against numbers of other sources."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.architecture.rank import Layout
from nemotron_h.planning import saves
from nemotron_h.planning.memory import stage_memory
from nemotron_h.planning.muon import muon_cost, rank_matrices
from nemotron_h.planning.plan import make_plan
from nemotron_h.recipe.checks import definition_of
from nemotron_h.recipe.compose import compose


def shipped(name: str) -> ModelDefinition:
    return definition_of(compose(name), name)


def parts(name: str, kind: str) -> dict[str, tuple[tuple[int, ...], ...]]:
    block = next(block for block in shipped(name).blocks if block.name == kind)
    return {matrix.name: matrix.part_shapes() for matrix in block.matrices()}


def test_parts_of_the_8b() -> None:
    """4096 wide; 128 heads of 64, 8 groups of 128 states; 32 heads and 8 groups of 128; 21504 neurons (paper 2.1)."""
    sections = ((8192, 4096), (8192, 4096), (1024, 4096), (1024, 4096), (128, 4096))
    assert parts("nemotron_h_8b", "mamba") == {"in_proj": sections, "out_proj": ((4096, 8192),)}
    group = ((512, 4096), (128, 4096), (128, 4096))
    assert parts("nemotron_h_8b", "attention") == {"linear_qkv": group * 8, "linear_proj": ((4096, 4096),)}
    assert parts("nemotron_h_8b", "ffn") == {"linear_fc1": ((21504, 4096),), "linear_fc2": ((4096, 21504),)}


def test_parts_of_falcon_h1_and_experts() -> None:
    gate, up = parts("falcon_h1_tiny", "swiglu")["linear_fc1"]
    assert gate == up
    parallel = parts("falcon_h1_tiny", "parallel")
    assert len(parallel["in_proj"]) == 5
    assert len(parallel["linear_qkv"]) % 3 == 0
    experts = parts("nemotron_h_moe_tiny", "experts")
    assert experts["router"] == ()
    assert all(len(shapes) == 1 for name, shapes in experts.items() if name != "router")


@pytest.mark.parametrize(("name", "tensor"), [("nemotron_h_8b", 8), ("falcon_h1_7b", 2), ("nano_30b_a3b", 2)])
def test_a_rank_has_its_share_of_every_part(name: str, tensor: int) -> None:
    for block in set(shipped(name).blocks):
        for matrix in block.matrices():
            if matrix.parts is None:
                continue
            rows = matrix.part_rows(tensor)
            assert [r.start for r in rows] == [0, *[r.stop for r in rows[:-1]]]
            assert rows[-1].stop == matrix.on_rank(tensor)[0]
            whole = matrix.part_rows()
            if matrix.groups > 1:
                assert rows == whole[: len(whole) // tensor]
            else:
                shares = tensor if matrix.split == "outputs" else 1
                assert [len(r) * shares for r in rows] == [len(r) for r in whole]


def test_flops_of_the_8b_and_the_56b() -> None:
    """A published estimate of all 2-D matrices, input projections in one, has .65 and 10.2 PFLOP; parts take less."""
    for name, total in (("nemotron_h_8b", 0.65e15), ("nemotron_h_56b", 10.2e15)):
        cost = muon_cost(shipped(name), Layout(seq_length=8192, optimizer="muon"))
        assert 0.9 * total < cost.flops < total
        assert cost.rank_flops == cost.flops
        assert cost.sent == 0


def test_a_step_of_one_part_by_hand() -> None:
    d = shipped("nemotron_h_tiny")
    layout = Layout(seq_length=512, data=4, optimizer="muon")
    cost = muon_cost(d, layout)
    experts, others = rank_matrices(d, layout, 0)
    assert (experts, others) == (0, cost.parameters)
    assert cost.parameters == sum(matrix.size for block in d.blocks for matrix in block.matrices())
    assert cost.sent == 4 * cost.parameters // 4
    assert cost.saved == 4 * cost.parameters // 4
    assert muon_cost(d, replace(layout, optimizer="adamw")) is None


@pytest.mark.parametrize("name", ["nemotron_h_8b", "nano_30b_a3b"])
def test_one_moment_less_in_memory_and_in_a_checkpoint(name: str) -> None:
    d, layout = (
        shipped(name),
        Layout(seq_length=8192, tensor=2, sequence=True, data=4, expert=2 if "nano" in name else 1),
    )
    muon = replace(layout, optimizer="muon")
    experts, others = rank_matrices(d, muon, 0)
    saved = 4 * (others / 4 + experts / muon.expert_shards)
    before, after = stage_memory(d, layout, 0), stage_memory(d, muon, 0)
    assert before.optimizer - after.optimizer == pytest.approx(saved, abs=2)
    assert saves.rank_bytes(d, layout, 0) - saves.rank_bytes(d, muon, 0) == pytest.approx(saved, abs=2)
    assert muon_cost(d, muon).saved == pytest.approx(saved, abs=2)


def test_a_plan_has_it() -> None:
    plan, adamw = make_plan(compose("nemotron_h_tiny/pretrain_muon")), make_plan(compose("nemotron_h_tiny"))
    assert adamw.as_dict()["muon"] is None
    cost = plan.as_dict()["muon"]
    assert adamw.checkpoint["optimizer"] - plan.checkpoint["optimizer"] == 4 * cost["parameters"]
    assert plan.checkpoint["weights"] == adamw.checkpoint["weights"]
