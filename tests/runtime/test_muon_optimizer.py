"""Muon beside AdamW in one optimizer: what each updates, its states, and pieces that ranks exchange."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nemotron_h.architecture.blocks.block import Matrix
from nemotron_h.core.errors import UserError
from nemotron_h.ops.newton_schulz import COEFFICIENTS, orthogonalize, scale
from nemotron_h.platform.adamw import CheckpointableAdamW
from nemotron_h.schema.recipe import NEWTON_SCHULZ
from nemotron_h.training.muon import MOMENTUM, MuonMixin, Shard, with_muon
from nemotron_h.training.muon_parts import Exchange, Holding, Role, parts_of
from nemotron_h.training.optimizer import scheduled_adamw

MATRIX = Matrix("in_proj", 40, 24, "outputs", "", ("", ""), parts=(20, 16, 4))
LR, DECAY, MU = 0.01, 0.1, 0.95


class AsOnGpus(CheckpointableAdamW):
    """AdamW whose states are read by name to be saved, as Transformer Engine's are."""

    def get_unscaled_state(self, param: Tensor, state_name: str) -> Tensor:
        return {"exp_avg": self.state[param]["exp_avg"], "exp_avg_sq": self.state[param]["exp_avg_sq"]}[state_name]

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        params = [p for group in self.param_groups for p in group["params"]]
        for key, values in state["state"].items():
            state["state"][key] = {name: self.get_unscaled_state(params[key], name) for name in values}
        return state


def optimizer(matrix: Tensor, other: Tensor) -> MuonMixin:
    """One of a rank that holds all of a matrix, and another weight."""
    built = with_muon(AsOnGpus)([{"params": [matrix, other]}], lr=LR, weight_decay=DECAY)
    role = Role("mamba.in_proj", MATRIX, 1)
    built.shards[matrix] = Shard(role, 0, 0)
    built.momentum, built.coefficients = MU, "simple"
    alone = torch.distributed.HashStore()
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=alone, rank=0, world_size=1)
    holding = Holding(0, {0: (0, matrix.numel())})
    built.exchange = Exchange([role], [24], holding, torch.distributed.group.WORLD, matrix.device)
    return built


@pytest.fixture(autouse=True)
def no_group():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_each_part_by_its_formula_and_the_rest_by_adamw() -> None:
    rng = torch.Generator().manual_seed(0)
    start, other = torch.randn(40 * 24, generator=rng), torch.randn(24, generator=rng)
    ours, rest, alone = start.clone(), other.clone(), other.clone()
    built, plain = optimizer(ours, rest), CheckpointableAdamW([alone], lr=LR, weight_decay=DECAY)
    expected, sums = start.view(40, 24).clone(), torch.zeros(40, 24)
    for _ in range(3):
        gradient, alone.grad = torch.randn(40, 24, generator=rng), torch.randn(24, generator=rng)
        ours.grad, rest.grad = gradient.flatten().clone(), alone.grad.clone()
        built.step()
        plain.step()
        sums = MU * sums + gradient
        parts = (gradient + MU * sums).bfloat16().split(MATRIX.parts)
        update = torch.cat([scale(*part.shape) * orthogonalize(part).float() for part in parts])
        expected = expected - LR * (update + DECAY * expected)
    assert torch.equal(rest, alone)
    assert torch.allclose(ours.view(40, 24), expected, atol=1e-6)
    assert built.param_groups[0]["step"] == 3
    assert (set(built.state[ours]), set(built.state[rest])) == ({MOMENTUM}, {"exp_avg", "exp_avg_sq"})


def test_states_are_saved_and_loaded() -> None:
    weights = [torch.ones(40 * 24), torch.ones(24)]
    built = optimizer(*weights)
    for weight in weights:
        weight.grad = torch.arange(float(weight.numel()))
    built.step()
    state = built.state_dict()
    again = [torch.ones(40 * 24), torch.ones(24)]
    other = optimizer(*again)
    other.load_state_dict(state)
    assert torch.equal(other.state[again[0]][MOMENTUM], weights[0].grad)
    assert torch.equal(other.state[again[1]]["exp_avg"], built.state[weights[1]]["exp_avg"])
    # as Megatron does before it reads the states: Adam's, without values
    names = ("exp_avg", "exp_avg_sq")
    empty = {key: {name: torch.empty_like(weight) for name in names} for key, weight in enumerate(again)}
    other = optimizer(*again)
    other.load_state_dict({**state, "state": empty})
    assert set(other.state[again[0]]) == {MOMENTUM}


def holdings(tensor: int, data: int, size: int) -> list[Holding]:
    """Of tensor x data ranks, with ranges that are not whole rows."""
    cuts = [size * rank // data for rank in range(data + 1)]
    return [
        Holding(t, {0: (cuts[d], cuts[d + 1])}) if cuts[d] < cuts[d + 1] else Holding(t, {})
        for d in range(data)
        for t in range(tensor)
    ]


@pytest.mark.parametrize(("tensor", "data"), [(1, 3), (2, 1), (2, 3), (4, 2)])
@pytest.mark.parametrize("split", ["outputs", "inputs", ""])
def test_pieces_make_the_parts_whatever_the_ranks(split: str, tensor: int, data: int) -> None:
    """What ranks send makes each part of the whole matrix, bit for bit, and what they get back their own."""
    rows, columns = 40, 24
    parts = (20, 16, 4) if split == "outputs" else ()
    matrix = Matrix("m", rows, columns, split, "", ("", ""), parts=parts)
    whole = torch.arange(rows * columns).view(rows, columns)
    if split == "outputs":
        shares = [torch.cat([part.chunk(tensor)[t] for part in whole.split(parts)]) for t in range(tensor)]
    else:
        shares = list(whole.chunk(tensor, dim=1)) if split else [whole] * tensor
    flat = [share.reshape(-1) for share in shares]
    ranks = holdings(tensor, data, flat[0].numel())
    role = Role("m", matrix, tensor if split else 1)
    made = list(parts_of(0, role, shares[0].shape[1], tensor))
    assert len(made) == max(1, len(parts))
    for part, expected in zip(made, whole.split(parts) if parts else [whole], strict=True):
        built = {share: torch.full((part.size,), -1) for share in part.shares}
        for rank in ranks:
            start, stop = part.source(rank)
            if stop:
                first = part.rows.start * part.columns
                built[rank.tensor][start:stop] = flat[rank.tensor][first + start : first + stop]
        assert torch.equal(part.join(built), expected)
        assert part.shape == tuple(expected.shape)
        for rank in ranks:
            start, stop = part.piece(rank)
            first = part.rows.start * part.columns
            back = part.split(expected, rank.tensor)[start:stop]
            assert torch.equal(back, flat[rank.tensor][first + start : first + stop])


def test_groups_stay_whole_on_their_ranks() -> None:
    matrix = Matrix("linear_qkv", 32, 24, "outputs", "", ("", ""), parts=(4, 2, 2), groups=4)
    made = list(parts_of(0, Role("qkv", matrix, 2), 24, 2))
    assert [(part.shape, part.shares) for part in made[:4]] == [
        ((4, 24), (0,)),
        ((4, 24), (1,)),
        ((2, 24), (0,)),
        ((2, 24), (1,)),
    ]
    assert sum(part.size for part in made) == 32 * 24


def test_the_vocabulary_names_all_sets_of_coefficients() -> None:
    assert tuple(COEFFICIENTS) == NEWTON_SCHULZ


def test_muon_and_what_it_cannot_have() -> None:
    built = {"peak_lr": 1e-3, "final_lr": 1e-5, "warmup_steps": 1}
    assert "name" not in scheduled_adamw(**built).settings
    assert scheduled_adamw(**built, name="muon").muon
    for wrong, key in (
        ({"name": "moun"}, "optim.name"),
        ({"name": "muon", "moments": "bf16"}, "optim.moments"),
        ({"name": "muon", "distributed_optimizer": False}, "parallel.distributed_optimizer"),
        ({"name": "muon", "newton_schulz": "simpel"}, "optim.newton_schulz"),
    ):
        with pytest.raises(UserError, match=key):
            scheduled_adamw(**built, **wrong)
