"""Weights of a Mamba-2 mixer that begins from an attention layer (Mamba in the Llama, arXiv 2408.15237, 3.1).

Of the attention's Q, K, V and O, with a head of the mixer for each query head:

    C <- Q    B <- K    x <- V    out_proj <- O

Without softmax, positions and 1/sqrt(d), attention is sum over s <= t of (Q_t . K_s) V_s; a mixer computes sum over
s <= t of decay(t, s) dt_s (C_t . B_s) x_s. Heads of a group share B and C: with a group for each query head these are
its Q and a copy of its K; with fewer groups, the means over a group's query heads. Each x is a copy of its V.

Axes: n query heads, g groups of the mixer, d channels of a head, h hidden.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nemotron_h.architecture.blocks.mamba import Mamba
from nemotron_h.architecture.blocks.transplant import Transplant
from nemotron_h.model import init


def mixer_tensors(
    transplant: Transplant,
    mixer: Mamba,
    attention: tuple[Tensor, ...],
    layer: int,
    seed: int,
    start: str = "transplant",
) -> list[Tensor]:
    """Return the weights of a mixer, a tensor for each row of `Mamba.tensors`, in the attention's dtype or exact.

    What attention lacks begins as the code of 2408.15237 leaves it, which is as PyTorch and Mamba-2 make it: z, dt and
    convolution uniform in +-1/sqrt(inputs), A uniform in [1, 16), dt log-uniform in [1e-3, 1e-1], D and norm 1. The
    samples are a function of seed and layer.

    Args:
        attention: norm [h], Q [n d, h], K and V [key-value heads x d, h], O [h, n d].
        layer: its number.
        start: `transplant`; or `random`, a control whose projections are sampled too, as PyTorch makes linear layers.
    """
    norm, *projections, out = attention
    dim, queries, heads = transplant.heads.dim, transplant.heads.queries, mixer.mamba_num_heads
    q, k, v = (each.unflatten(0, (-1, dim)) for each in projections)
    k, v = (each.repeat_interleave(queries, dim=0) for each in (k, v))  # [n, d, h]

    def of_groups(each: Tensor) -> Tensor:
        # in float64 the mean of copies is the copy
        means = each.double().unflatten(0, (mixer.mamba_num_groups, -1)).mean(1)  # [g, d, h]
        return means.flatten(0, 1).to(each.dtype)

    def sampled(name: str, distribution: init.Distribution, *shape: int) -> Tensor:
        tensor = torch.empty(shape)
        init.fill(tensor, f"decoder.layers.{layer}.mixer.{name}", distribution, seed)
        return tensor

    of_inputs = init.uniform(-1 / math.sqrt(mixer.hidden_size), 1 / math.sqrt(mixer.hidden_size))
    of_taps = init.uniform(-1 / math.sqrt(mixer.conv_kernel), 1 / math.sqrt(mixer.conv_kernel))
    z, dt = (
        sampled(name, of_inputs, rows, mixer.hidden_size).to(norm.dtype)
        for name, rows in (("z", mixer.d_inner), ("dt", heads))
    )
    exact = torch.promote_types(norm.dtype, torch.float32)
    copied = {"x": v.flatten(0, 1), "B": of_groups(k), "C": of_groups(q)}
    if start == "random":
        copied = {name: sampled(name, of_inputs, *rows.shape).to(norm.dtype) for name, rows in copied.items()}
        of_heads = init.uniform(-1 / math.sqrt(mixer.d_inner), 1 / math.sqrt(mixer.d_inner))
        out = sampled("out_proj", of_heads, *out.shape).to(norm.dtype)
    return [
        norm,
        torch.cat([z, *copied.values(), dt]),
        sampled("conv1d.weight", of_taps, mixer.conv_channels, 1, mixer.conv_kernel).to(norm.dtype),
        sampled("conv1d.bias", of_taps, mixer.conv_channels).to(norm.dtype),
        sampled("A_log", init.log_uniform_a, heads).to(exact),
        torch.ones(heads, dtype=exact),
        sampled("dt_bias", init.dt_bias, heads).to(exact),
        *([torch.ones(mixer.d_inner, dtype=norm.dtype)] if mixer.mamba_norm else []),
        out,
    ]
