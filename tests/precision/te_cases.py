"""Inputs of the comparison with Transformer Engine: drawn from seeds on the CPU, the same on every machine."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

#: values kept of each tensor, evenly spread
SAMPLES = 1024


@dataclass(frozen=True)
class Case:
    """A linear layer's inputs: x [tokens, inputs], weight [outputs, inputs], dy [tokens, outputs], all bfloat16.

    Attributes:
        kind: `normal` (scale 1), `outliers` (a few 100 times larger), `small` (2^-40: tiny gradients), or `zero`
            (`x` is 0).
        norm: an RMSNorm with weights before the product, as the model's layers have it.
    """

    name: str
    tokens: int
    inputs: int
    outputs: int
    kind: str = "normal"
    norm: bool = False


CASES = (
    Case("tile", 128, 128, 128),
    Case("several tiles", 256, 384, 256),
    Case("odd multiples of 16", 272, 400, 144),
    Case("smaller than a tile", 48, 80, 112),
    Case("outliers", 128, 256, 144, "outliers"),
    Case("small", 128, 256, 144, "small"),
    Case("zero", 128, 128, 144, "zero"),
    Case("after a norm", 256, 256, 144, norm=True),
)


def inputs(case: Case) -> dict[str, Tensor]:
    """`x`, `weight`, `dy`, and `norm` where the case has one."""
    rng = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(case.name.encode()).digest()[:4], "little"))

    def normal(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=rng)
        if case.kind == "outliers":
            values = torch.where(torch.rand(shape, generator=rng) < 1e-3, 100 * values, values)
        return (values * (2.0**-40 if case.kind == "small" else 1)).to(torch.bfloat16)

    x, weight, dy = (
        normal(case.tokens, case.inputs),
        normal(case.outputs, case.inputs),
        normal(case.tokens, case.outputs),
    )
    made = {"x": torch.zeros_like(x) if case.kind == "zero" else x, "weight": weight, "dy": dy}
    if case.norm:
        made["norm"] = (0.5 + torch.rand(case.inputs, generator=rng)).to(torch.bfloat16)
    return made


def digest(tensors: dict[str, Tensor]) -> str:
    """sha256 over the values, so that other inputs than the recorded ones are noticed."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def sample(t: Tensor) -> Tensor:
    """`SAMPLES` of the values, evenly spread over the tensor; all of a smaller one."""
    flat = t.detach().flatten()
    if flat.numel() <= SAMPLES:
        return flat.clone()
    return flat[torch.linspace(0, flat.numel() - 1, SAMPLES, dtype=torch.float64).round().long().to(flat.device)]
