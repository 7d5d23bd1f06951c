"""Mixers that begin from attention: what they compute, what training leaves of their error, and `nemotron-h transplant`.

Axes: b batch, l tokens, n query heads, g groups, d channels of a head, h hidden.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from plain_model import definition
from small_model import relative_error
from test_prune_cli import invoke, place  # noqa: F401
from torch import Tensor

from nemotron_h.architecture.blocks.transplant import attention_layers, transplants
from nemotron_h.compression.transplant.layers import all_but_every, child_definition, listed
from nemotron_h.model.blocks.registry import RUNNING
from nemotron_h.model.blocks.transplant import mixer_tensors
from nemotron_h.ops.conv1d import causal_conv1d
from nemotron_h.ops.select import Ops

#: three query heads for each of two keys
HEADS = {"num_attention_heads": 6, "num_query_groups": 2}


def _rows(name: str, heads: int) -> Tensor:
    g = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(heads * 16, 48, dtype=torch.float64, generator=g) / math.sqrt(48)


@pytest.mark.parametrize("groups", [6, 3, 2, 1])
def test_a_bare_mixer_is_the_attention_without_softmax(groups: int) -> None:
    """With steps of 1, no decay, no D, no gate, no norm and a convolution that does nothing."""
    d = definition("*-", **HEADS)
    chosen = transplants(d.blocks, [0], groups, "")
    mixer = child_definition(d, chosen, "child").blocks[0]
    norm, q, k, v = torch.ones(48, dtype=torch.float64), _rows("q", 6), _rows("k", 2), _rows("v", 2)
    out = _rows("o", 6).T.contiguous()
    tensors = mixer_tensors(chosen[0], mixer, (norm, q, k, v, out), layer=0, seed=0)
    running = RUNNING[mixer.letter](mixer, d.norm_epsilon)
    w = running.loaded(running.weights(tensors))
    w.in_proj[-6:] = 0
    w.dt_bias.fill_(math.log(math.expm1(1)))
    w.A, w.D = torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    w.conv_weight.zero_()[:, -1] = 1
    w.conv_bias.zero_()
    bare = Ops(conv1d=partial(causal_conv1d, activation=None), gated_rms_norm=lambda y, z, *_, **__: y)
    h = torch.randn(2, 50, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    actual = running.whole(bare, w, h, None, None, {})

    queries, keys, values = ((h @ each.T).unflatten(-1, (-1, 16)).numpy() for each in (q, k, v))
    size, heads = 6 // groups, []
    for head in range(6):
        shared = range(head // size * size, head // size * size + size)  # query heads of its group
        query = np.mean([queries[:, :, each] for each in shared], axis=0)
        key = np.mean([keys[:, :, each // 3] for each in shared], axis=0)
        scores = np.tril(np.einsum("btd,bsd->bts", query, key))
        heads.append(np.einsum("bts,bsd->btd", scores, values[:, :, head // 3]))
    expected = torch.from_numpy(np.concatenate(heads, axis=-1)) @ out.T
    assert relative_error(actual, expected) < 1e-10


def test_children_are_ordinary_definitions() -> None:
    """Positions and switches stay where attention does, and other widths are those of a layer alone."""
    rotary = {"position_embedding": "rope", "rope_base": 100, "rope_percent": 1.0}
    parent = definition("*-*-", **rotary, qkv_bias=True)
    assert parent.family == "transformer"
    half = child_definition(parent, transplants(parent.blocks, [0], None, ""), "half")
    assert (half.pattern, half.family, half.position_embedding, half.qkv_bias) == ("M-*-", "pruned", "rope", True)
    assert (half.mamba_num_heads, half.mamba_num_groups, half.mamba_head_dim, half.mamba_state_dim) == (4, 4, 16, 16)
    assert (half.conv_kernel, half.overrides, half.sources["pattern"]) == (4, {}, "transplanted from small")
    none = child_definition(parent, transplants(parent.blocks, [0, 2], 2, ""), "none")
    assert (none.position_embedding, none.rope_base, none.qkv_bias, none.head_dim) == ("none", 0, False, 0)
    assert none.mamba_num_groups == 2
    assert none.family == "pruned"  # without attention, and M- is no Mamba-2 alone
    plain = definition("*-*-")
    assert child_definition(plain, transplants(plain.blocks, [0], None, ""), "half").family == "nemotron_h"
    hybrid = definition("M*-M*-")
    mixed = child_definition(hybrid, transplants(hybrid.blocks, [1], None, ""), "mixed")
    own = {"mamba_num_heads": 4, "mamba_num_groups": 4}
    assert (mixed.pattern, mixed.overrides, mixed.mamba_num_heads) == ("MM-M*-", {1: own}, 16)
    wide = definition("*-*-", overrides={2: {"num_attention_heads": 8}})
    of_wide = child_definition(wide, transplants(wide.blocks, [0, 2], None, ""), "wide")
    assert of_wide.overrides == {2: {"mamba_num_heads": 8, "mamba_num_groups": 8}}


def test_layers_are_listed_or_every_so_many_th_stays() -> None:
    d = definition("*-" * 6)
    assert attention_layers(d.blocks) == [0, 2, 4, 6, 8, 10]
    assert listed(d, " 8,0", "") == [0, 8]
    assert all_but_every(d, 2, "") == [0, 4, 8]
    assert all_but_every(d, 3, "") == [0, 2, 6, 8]
    assert all_but_every(d, 6, "") == [0, 2, 4, 6, 8]


def _text(rows: int, seed: int, length: int = 24) -> np.ndarray:
    """Return tokens [rows, length] of which each is one of the last three, or the next number."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 300, (rows, length))
    for at in range(3, length):
        again = tokens[np.arange(rows), at - rng.integers(1, 4, rows)]
        tokens[:, at] = np.where(rng.random(rows) < 0.8, (again + 1) % 300, tokens[:, at])
    return tokens
