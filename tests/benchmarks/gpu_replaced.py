"""What runs in place of a library's own code on a GPU, each against it: milliseconds, and how far results differ."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from gpu_sides import ON_GPU, Shape, sync

#: warps per multiprocessor of the gated norm's backward; mamba-ssm starts 4
WARPS = (4, 8, 16, 32, 64, 128)
#: a word that makes up so much of the text beside ones drawn from a skewed distribution
FREQUENT = 0.05


def milliseconds(call: Callable[[], Any]) -> float:
    """Median of single calls, after some."""
    times = []
    for _ in range(20):
        sync()
        began = time.perf_counter()
        call()
        sync()
        times.append(time.perf_counter() - began)
    return round(median(times[5:]) * 1e3, 3)


def difference(a: torch.Tensor, b: torch.Tensor) -> str:
    """||a - b|| / ||b||."""
    return f"{float((a.float() - b.float()).norm() / b.float().norm()):.1e}"


def gated_norm_backward(shape: Shape) -> Iterator[dict[str, Any]]:
    """mamba-ssm's launch, then ours by warps; z and its gradient are views of the projection, as in the mixer."""
    from mamba_ssm.ops.triton import layernorm_gated

    from nemotron_h.ops import mamba_ssm_fixes

    mamba_ssm_fixes.install()
    ours = layernorm_gated._layer_norm_bwd
    w, rng = shape.widths, torch.Generator("cuda").manual_seed(0)
    groups, inner = w["mamba_num_groups"], w["mamba_num_heads"] * w["mamba_head_dim"]
    projected = 2 * inner + 2 * groups * w["mamba_state_dim"] + w["mamba_num_heads"]

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, device="cuda", generator=rng).bfloat16()

    rows = shape.seq_length
    z, x, dy, weight = normal(rows, projected)[:, :inner], normal(rows, inner), normal(rows, inner), normal(inner)
    dz = torch.empty(rows, projected, device="cuda", dtype=torch.bfloat16)[:, :inner]
    options = {"group_size": inner // groups, "norm_before_gate": False, "is_rms_norm": True}
    rstd = layernorm_gated._layer_norm_fwd(x, weight, None, 1e-5, z=z, **options)[2]

    def run(backward: Callable) -> list[torch.Tensor]:
        found = backward(dy, x, weight, None, 1e-5, None, rstd, z=z, dz=dz, **options)
        return [t.clone() for t in found if t is not None]

    def timed(backward: Callable) -> float:
        return milliseconds(lambda: backward(dy, x, weight, None, 1e-5, None, rstd, z=z, dz=dz, **options))

    expected = run(ours.__wrapped__)
    yield {"what": "gated norm backward", "by": "mamba-ssm", "ms": timed(ours.__wrapped__)}
    chosen = mamba_ssm_fixes.WARPS
    for warps in WARPS:
        mamba_ssm_fixes.WARPS = warps
        differences = [difference(a, b) for a, b in zip(run(ours), expected, strict=True)]
        yield {"what": "gated norm backward", "by": f"{warps} warps", "ms": timed(ours), "differences": differences}
    mamba_ssm_fixes.WARPS = chosen


def embedding_gradient(shape: Shape) -> Iterator[dict[str, Any]]:
    """Lookup, backward and sum into the float32 buffer: a gradient of the whole vocabulary, then of the rows alone."""
    from nemotron_h.ops.embedding import lookup

    device = "cuda" if ON_GPU else "cpu"
    rng, hidden = torch.Generator(device).manual_seed(0), shape.widths["hidden_size"]
    text = torch.rand(1, shape.seq_length, device=device, generator=rng) ** 3 * shape.vocab_size
    frequent = torch.rand(1, shape.seq_length, device=device, generator=rng) < FREQUENT
    ids = text.long().masked_fill(frequent, 7)
    upstream = torch.randn(1, shape.seq_length, hidden, device=device, generator=rng).bfloat16()
    table = torch.randn(shape.vocab_size, hidden, device=device, dtype=torch.bfloat16)
    dense, rows = table.clone().requires_grad_(), table.clone().requires_grad_()
    rows.main_grad = torch.zeros(table.shape, device=device)
    buffer = torch.zeros(table.shape, device=device)

    def whole() -> None:
        dense.grad = None
        F.embedding(ids, dense).backward(upstream)
        buffer.add_(dense.grad)

    def looked_up() -> None:
        rows.grad = None
        lookup(ids, rows).backward(upstream)

    whole()
    looked_up()
    apart, first = difference(rows.main_grad, buffer), rows.main_grad.clone()
    rows.main_grad.zero_()
    looked_up()
    again = torch.equal(rows.main_grad, first)
    yield {"what": "embedding gradient", "by": "the whole vocabulary", "ms": milliseconds(whole)}
    yield {
        "what": "embedding gradient",
        "by": "the batch's rows",
        "ms": milliseconds(looked_up),
        "differences": [apart],
        "twice the same": again,
    }
