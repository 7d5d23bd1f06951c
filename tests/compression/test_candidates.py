"""Candidates: exact counts, the published budget, lazy enumeration, impossible budgets."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import product

import numpy as np
import plain_model
import pytest
import yaml

from nemotron_h.architecture.blocks.ffn import FFN
from nemotron_h.architecture.blocks.registry import KINDS
from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.compression.candidates import Candidate, Candidates, Cost, whole
from nemotron_h.compression.child import child_definition
from nemotron_h.compression.importance import Scores
from nemotron_h.compression.selection import child_of
from nemotron_h.core.errors import UserError
from nemotron_h.core.units import BYTES
from nemotron_h.planning.inference import Serving, inference_memory
from nemotron_h.recipe.checks import definition_of
from nemotron_h.recipe.compose import compose, configs_dir
from nemotron_h.schema.minipuzzle import BudgetSchema, GridSchema

GIB = 2**30
MILLION = 2**20
FP4 = {"weights": "fp4", "kv_cache": "fp4"}


def shipped(name: str) -> ModelDefinition:
    return definition_of(compose(name), name)


@pytest.fixture(scope="module")
def parent() -> ModelDefinition:
    return shipped("nemotron_h_56b")


def config(name: str) -> tuple[GridSchema, BudgetSchema]:
    part = yaml.safe_load((configs_dir() / "compression" / f"{name}.yaml").read_text())["minipuzzle"]
    return GridSchema(**part["grid"]), BudgetSchema(**part["budget"])


def paper() -> tuple[GridSchema, BudgetSchema]:
    return config("minipuzzle_56b")


def of(definition: ModelDefinition) -> Candidate:
    return whole(definition)


def test_paper_s_grid(parent: ModelDefinition) -> None:
    """About 400 (paper 3.3), with all published architectures among them."""
    found = Candidates(parent, *paper())
    fitting = list(found)
    assert (len(found), len(fitting), len(set(fitting))) == (576, 389, 389)
    assert of(shipped("nemotron_h_47b")) in fitting
    assert of(shipped("nemotron_h_47b_paper")) in fitting
    for counts in ((4, 46, 48), (5, 44, 49)):  # figure 11
        assert Candidate(*counts, 30720, 8192, 256, 64) in fitting
    assert whole(parent) not in fitting
    assert all(found.cost(candidate).memory.total <= 31.7 * GIB for candidate in fitting)


@pytest.mark.parametrize("name", ["nemotron_h_56b", "nemotron_h_47b", "nemotron_h_47b_paper"])
def test_costs_are_the_model_s_own(parent: ModelDefinition, name: str) -> None:
    budget = BudgetSchema(memory_gib=100, context=MILLION, sequences=3, **FP4)
    definition, found = shipped(name), Candidates(parent, GridSchema(), budget)
    cost = found.cost(of(definition))
    assert cost.parameters == definition.parameters
    expected = inference_memory(definition, Serving(MILLION, 3, BYTES["fp4"], BYTES["fp4"]))
    for key in ("weights", "kv_cache", "ssm_states", "conv_states", "total"):
        assert getattr(cost.memory, key) == pytest.approx(getattr(expected, key), rel=1e-12)
    embedding = 131072 * 8192 * BYTES["fp4"]
    assert cost.read == pytest.approx(expected.total - embedding, rel=1e-12)


def test_the_47b_in_the_paper_s_budget(parent: ModelDefinition) -> None:
    """24.5 GiB of weights, 5.6 of keys and values for 2^20 tokens, 0.7 of states: 30.8 of the 31.7 GiB (paper 3.3)."""
    memory = Candidates(parent, *paper()).cost(of(shipped("nemotron_h_47b"))).memory
    parts = (memory.weights, memory.kv_cache, memory.ssm_states, memory.conv_states, memory.total)
    assert [round(part / GIB, 2) for part in parts] == [24.51, 5.62, 0.70, 0.01, 30.85]
    _, budget = paper()
    eight = Candidates(parent, GridSchema(), replace(budget, memory_gib=100, kv_cache="fp8"))
    assert eight.cost(of(shipped("nemotron_h_47b"))).memory.total / GIB == pytest.approx(35.22, abs=0.01)


def test_enumeration_is_the_filtered_product(parent: ModelDefinition) -> None:
    grid = GridSchema(
        attention=[9, 4],
        mamba=[40, 54],
        ffn=[40, 50, 54],
        ffn_hidden_size=[16384, 32768],
        hidden_size=[7168, 8192],
        mamba_num_heads=[128, 256],
        mamba_head_dim=[32, 64],
    )
    budget = BudgetSchema(memory_gib=27, context=MILLION, parameters="38B", speedup=1.5, **FP4)
    found = Candidates(parent, grid, budget)
    mine = set()
    for counts in product(*(sorted(values) for values in vars(grid).values() if values)):
        a, m, f = counts[:3]
        pattern = "M" * m + "*-" * a + "-" * (f - a)
        keys = ("ffn_hidden_size", "hidden_size", "mamba_num_heads", "mamba_head_dim")
        d = replace(parent, pattern=pattern, **dict(zip(keys, counts[3:], strict=True)))
        memory = inference_memory(d, Serving(MILLION, 1, BYTES["fp4"], BYTES["fp4"]))
        whole_read = (
            inference_memory(parent, Serving(MILLION, 1, BYTES["fp4"], BYTES["fp4"])).total - 131072 * 8192 * 0.5625
        )
        read = memory.total - 131072 * d.hidden_size * 0.5625
        if memory.total <= 27 * GIB and d.parameters <= 38e9 and whole_read / read >= 1.5:
            mine.add(Candidate(*counts))
    assert 10 < len(mine) < len(found)
    assert set(found) == mine


def test_a_million_candidates_in_seconds_and_without_torch() -> None:
    code = (
        "import sys, time\n"
        "from nemotron_h.recipe.compose import compose\n"
        "from nemotron_h.recipe.checks import definition_of\n"
        "from nemotron_h.compression.candidates import Candidates\n"
        "from nemotron_h.schema.minipuzzle import BudgetSchema, GridSchema\n"
        "parent = definition_of(compose('nemotron_h_56b'), '')\n"
        "grid = GridSchema(attention=list(range(1, 11)), mamba=list(range(14, 54)), ffn=list(range(14, 54)),\n"
        "                  ffn_hidden_size=list(range(24576, 32769, 1024)), hidden_size=list(range(4096, 8193, 512)))\n"
        "kv = {'kv_cache': 'fp4'}\n"
        "found = Candidates(parent, grid, BudgetSchema(memory_gib=31.7, context=2**20, weights='fp4', **kv))\n"
        "first = next(iter(found))\n"
        "start = time.process_time()\n"
        "count = sum(1 for _ in found)\n"
        "assert not {'torch', 'nemo', 'megatron'} & set(sys.modules)\n"
        "print(len(found), count, time.process_time() - start)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    size, count, seconds = done.stdout.split()
    assert int(size) == 1_296_000
    assert 1_000_000 < int(count) < int(size)
    assert float(seconds) < 10


def test_impossible_budgets_name_the_smallest(parent: ModelDefinition) -> None:
    grid, budget = paper()

    def size(cost: Cost) -> float:
        return cost.memory.total

    with pytest.raises(UserError) as error:
        Candidates(parent, grid, replace(budget, memory_gib=20))
    assert error.value.message == (
        "no candidate of the grid fits budget.memory_gib = 20: the smallest (44M/47-/4*, FFN 24,576, hidden 8,192) "
        "needs 26.66 GiB for 1 x 1,048,576 tokens: fp4 weights 21.46, fp4 keys and values 4.50, states 0.69"
    )
    assert "26.66 or more" in error.value.hint
    smallest = Candidates(parent, grid, replace(budget, memory_gib=26.66))
    assert next(iter(smallest)) == smallest.smallest(size)
    with pytest.raises(UserError, match=r"fits budget.parameters = 30B: the smallest .* has 40,") as error:
        Candidates(parent, grid, replace(budget, parameters="30B"))
    count = Candidates(parent, grid, budget).cost(smallest.smallest(size)).parameters
    assert f"{count} or more" in error.value.hint
    assert list(Candidates(parent, grid, replace(budget, parameters=str(count)))) == [smallest.smallest(size)]
    with pytest.raises(UserError, match=r"is 3 times as fast as nemotron_h_56b: the smallest .* makes 1\.\d+ times"):
        Candidates(parent, grid, replace(budget, speedup=3.0))


def test_heads_are_kept_by_group(parent: ModelDefinition) -> None:
    with pytest.raises(UserError, match="mamba_num_heads has 100, which is no multiple of the 8 groups"):
        Candidates(parent, GridSchema(mamba_num_heads=[100, 128]), BudgetSchema(memory_gib=100))


# depth


def test_minitron_s_grid() -> None:
    """All five axes of 2504.11409, with the released 4B among the candidates."""
    grandparent = shipped("nemotron_h_8b")
    scores = np.abs(np.arange(52) - 30.0)
    found = Candidates(grandparent, *config("minitron_ssm_4b"), layer_scores=scores)
    fitting = list(found)
    assert len(fitting) == 139
    assert whole(shipped("nemotron_h_4b")) in fitting
    assert {candidate.attention for candidate in fitting} == {4}
    for key in ("mamba", "ffn_hidden_size", "hidden_size", "mamba_num_heads", "mamba_head_dim"):
        assert len({getattr(candidate, key) for candidate in fitting}) > 1, key
    assert all(4.45e9 <= found.cost(candidate).parameters <= 4.5e9 for candidate in fitting)


def test_depth_takes_the_most_important_of_the_types_without_a_list() -> None:
    d = plain_model.definition("M-M*-M-")
    scores = np.array([6.0, 0, 5, 1, 4, 3, 2])  # layers 0 M, 2 M, 4 -, 5 M, 6 -, 3 *, 1 -
    everything = BudgetSchema(memory_gib=1)

    def layers(**grid: list[int]) -> list[tuple[int, ...]]:
        return [candidate[:3] for candidate in Candidates(d, GridSchema(**grid), everything, scores)]

    assert layers(depth=[1, 3, 5, 6]) == [(0, 1, 0), (0, 2, 1), (0, 3, 2), (1, 3, 2)]
    assert layers(depth=[4], attention=[0, 1]) == [(0, 3, 1), (1, 2, 1)]
    with pytest.raises(UserError, match=r"depth = 7 cannot be made of 0 layers .* at most 6 others"):
        layers(depth=[7], attention=[0])
    with pytest.raises(ValueError, match="needs the layers' scores"):
        Candidates(d, GridSchema(depth=[3]), everything)


def test_layers_of_a_kind_without_a_list_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """They count, and are as narrow as the others whose width they share."""

    class Other(FFN):
        letter, name = "G", "other"

    monkeypatch.setitem(KINDS, "G", Other)
    d = plain_model.definition("MG-M*G-")
    scores = Scores(
        np.arange(7.0),
        np.arange(48.0),
        {n: {"neurons": np.arange(80.0)} for n in (1, 2, 5, 6)} | {n: {"x": np.ones((16, 16))} for n in (0, 3)},
    )
    grid = GridSchema(depth=[4], ffn_hidden_size=[40])
    (candidate,) = candidates = Candidates(d, grid, BudgetSchema(context=64), scores.layers)
    assert (candidate.layers, candidate.name) == ({"*": 1, "M": 0, "-": 1}, "a1-m0-f1-ffn40-h48-heads16x16")
    child = child_of(d, scores, candidate)
    assert child.layers == (1, 4, 5, 6)
    definition = child_definition(d, child, "child")
    assert (definition.pattern, definition.ffn_hidden_size, definition.overrides) == ("G*G-", 40, {})
    cost = candidates.cost(candidate)
    assert cost.parameters == definition.parameters
    assert cost.memory == inference_memory(definition, Serving(64))


def test_widths_of_experts() -> None:
    """Every combination costs what its model does, and is named by what the parent has."""
    d = plain_model.definition("MEM*E")
    grid = GridSchema(num_experts=[2, 4, 6], expert_hidden_size=[20, 40], shared_expert_hidden_size=[32])
    candidates = Candidates(d, grid, BudgetSchema(context=64))
    assert len(list(candidates)) == 6
    of_experts = {
        layer: {"experts": np.arange(6.0), "expert_neurons": np.ones((6, 40)), "shared_neurons": np.arange(64.0)}
        for layer in (1, 4)
    }
    scores = Scores(np.arange(5.0), np.arange(48.0), of_experts)
    for candidate in candidates:
        definition = child_definition(d, child_of(d, scores, candidate), "child")
        assert (definition.num_experts, definition.expert_hidden_size) == candidate[-3:-1]
        assert (definition.experts_per_token, definition.expert_scaling) == (2, 1.5)
        assert candidates.cost(candidate).parameters == definition.parameters
        assert candidates.cost(candidate).memory == inference_memory(definition, Serving(64))
    smallest = next(iter(candidates))
    assert smallest.name == "a1-m2-f0-h48-heads16x16-experts2x20-shared32"
    assert "ffn_hidden_size" not in smallest.sizes
    assert Candidate(**smallest.sizes) == smallest
    with pytest.raises(UserError, match=r"the smallest \(2M/0-/1\*, 2 experts of 20, hidden 48\) has"):
        Candidates(d, grid, BudgetSchema(parameters="1K"))


@pytest.mark.parametrize(
    ("pattern", "changes", "grid", "message"),
    [
        ("M-M*-", {}, {"num_experts": [4]}, r"small has no layers that can be pruned by num_experts"),
        ("MEM*E", {}, {"ffn_hidden_size": [40]}, r"small has no layers that can be pruned by ffn_hidden_size"),
        ("MEM*E", {}, {"num_experts": [1]}, r"num_experts has 1, less than the experts_per_token of small, 2"),
        ("MEM*E", {}, {"num_experts": [8]}, r"num_experts has 8; small has 6"),
        (
            "MEM*E",
            {"expert_latent_size": 24},
            {"expert_hidden_size": [20]},
            r"small has no layers that can be pruned by expert_hidden_size",
        ),
    ],
)
def test_widths_that_no_child_can_have(pattern: str, changes: dict, grid: dict, message: str) -> None:
    with pytest.raises(UserError, match=rf"^grid\..*{message}"):
        Candidates(plain_model.definition(pattern, **changes), GridSchema(**grid), BudgetSchema())


def test_limits_that_exclude_each_other(parent: ModelDefinition) -> None:
    grid, budget = paper()
    with pytest.raises(
        UserError, match=r"no candidate of the grid meets all limits at once: budget\.memory_gib = 31\.7, "
    ):
        Candidates(parent, grid, replace(budget, least_parameters="55B"))
