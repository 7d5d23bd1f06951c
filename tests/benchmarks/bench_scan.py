"""Time Mamba-2's scan on a GPU, forward and backward: our Triton kernels beside mamba-ssm's own, in BF16.

    python tests/benchmarks/bench_scan.py --out scan.json

Prints errors of y and of the gradients of x, dt, A, B, C, D and the bias against float64, then per shape the
milliseconds and working memory of both, and at the 8B's widths those of each kernel. Both sides are warmed up and timed
in turn, three times, between events on the GPU; the shortest counts. `at the GPU` adds up the kernels alone: of short
sequences mamba-ssm's calls cost the CPU more than its kernels cost the GPU.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from nemotron_h.ops import scan_kernel
from nemotron_h.ops.ssd import ssd_chunk_scan

#: name -> batch, length, heads, head size, groups, state
SHAPES = {
    "8B, 512": (1, 512, 128, 64, 8, 128),
    "8B, 2048": (1, 2048, 128, 64, 8, 128),
    "8B, 8192": (1, 8192, 128, 64, 8, 128),
    "8B, 4 x 8192": (4, 8192, 128, 64, 8, 128),
    "8B, 32768": (1, 32768, 128, 64, 8, 128),
    "8B, 131072": (1, 131072, 128, 64, 8, 128),
    "8B, 8192, TP 8": (1, 8192, 16, 64, 1, 128),
    "Nano 9B, 8192": (1, 8192, 128, 80, 8, 128),
    "tiny, 32 x 512": (32, 512, 16, 32, 2, 64),
}
Calls = tuple[Callable[[], Any], Callable[[], Any]]


def inputs(batch: int, length: int, heads: int, dim: int, groups: int, state: int) -> list[Tensor]:
    """Return x, dt, A, B, C, D, the bias and a gradient of y, of the sizes of a trained model."""
    rng = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=rng)

    wide = normal(batch, length, heads * dim + 2 * groups * state).bfloat16()  # as the convolution leaves it
    x, B, C = wide.split([heads * dim, groups * state, groups * state], dim=-1)
    x, B, C = x.unflatten(-1, (heads, dim)), B.unflatten(-1, (groups, state)), C.unflatten(-1, (groups, state))
    dt = normal(batch, length, heads).bfloat16()
    A = -torch.exp(torch.empty(heads, device="cuda").uniform_(0, 2.7, generator=rng))
    D, bias = normal(heads), normal(heads) * 0.5 - 4
    return [x, dt, A, B, C, D, bias, normal(batch, length, heads, dim).bfloat16()]


def ours(t: list[Tensor], seq_idx: Tensor | None = None) -> Calls:
    """Return forward and backward of our kernels."""
    options = {"dt_softplus": True, "seq_idx": seq_idx}
    return (
        lambda: scan_kernel.ssd_scan(*t[:7], **options),
        lambda: scan_kernel.ssd_scan_gradients(t[7], *t[:7], **options),
    )


def theirs(t: list[Tensor], seq_idx: Tensor | None = None) -> Calls:
    """Return forward and backward of mamba-ssm."""
    from mamba_ssm.ops.triton import ssd_combined

    x, dt, A, B, C, D, bias, dy = t
    options = {"D": D, "dt_bias": bias, "seq_idx": seq_idx, "dt_softplus": True}
    forward = ssd_combined._mamba_chunk_scan_combined_fwd
    backward = ssd_combined._mamba_chunk_scan_combined_bwd
    y = forward(x, dt, A, B, C, 128, **options)[0]
    return lambda: forward(x, dt, A, B, C, 128, **options), lambda: backward(dy, x, dt, A, B, C, y, 128, **options)


SIDES = {"ours": ours, "mamba-ssm": theirs}


def milliseconds(call: Callable[[], Any], turns: int = 10) -> float:
    """Return the time of one call, between events on the GPU."""
    call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(turns):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / turns


def errors(heads: int, dim: int, groups: int, state: int, documents: bool) -> dict[str, list[float]]:
    """Return differences from float64 over its norm, per side, of y and the gradients; ours must repeat to the bit."""
    t = inputs(2, 1000, heads, dim, groups, state)
    seq_idx = (torch.arange(1000, device="cuda") // 333)[None].expand(2, -1).int().contiguous() if documents else None
    exact = [each.double().requires_grad_() for each in t[:7]]
    y = ssd_chunk_scan(*exact[:5], D=exact[5], dt_bias=exact[6], dt_softplus=True, seq_idx=seq_idx)
    y.backward(t[7].double())
    expected = [y.detach(), *(each.grad for each in exact)]
    differences = {}
    for name, side in SIDES.items():
        forward, backward = side(t, seq_idx)
        gradients = backward()
        values = [forward()[0], *gradients[:6], gradients[6] if name == "ours" else gradients[7]]
        if name == "ours" and not all(map(torch.equal, gradients, backward())):
            raise SystemExit("two runs of our backward differ")
        pairs = zip(values, expected, strict=True)
        differences[name] = [float((value.double() - exact).norm() / exact.norm()) for value, exact in pairs]
    return differences


def kernels(call: Callable[[], Any]) -> dict[str, float]:
    """Return the milliseconds of each kernel of a call, longest first."""
    call()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(5):
            call()
        torch.cuda.synchronize()
    times = {row.key.split("(")[0][:40]: row.self_device_time_total / 5e3 for row in profiled.key_averages()}
    return dict(sorted(((name, ms) for name, ms in times.items() if ms), key=lambda item: -item[1]))


def measure(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Return times and working memory of both sides on one shape."""
    t = inputs(*shape)
    sides = {side: calls(t) for side, calls in SIDES.items()}
    times = {side: [float("inf")] * 2 for side in sides}
    memory = {}
    for side, calls in [*sides.items()] * 3:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        times[side] = [min(ms, milliseconds(call)) for ms, call in zip(times[side], calls, strict=True)]
        memory[side] = (torch.cuda.max_memory_allocated() - before) / 2**20
    parts = {side: [kernels(call) for call in calls] for side, calls in sides.items()}
    at_gpu = {side: [sum(each.values()) for each in passes] for side, passes in parts.items()}
    total = {side: (sum(times[side]), sum(at_gpu[side])) for side in sides}
    ratios = [theirs / own for own, theirs in zip(total["ours"], total["mamba-ssm"], strict=True)]
    row = {"shape": name, "ms": times, "at the GPU, ms": at_gpu, "MiB": memory, "ratios": ratios, "kernels": parts}
    for side, (forward, backward) in times.items():
        print(
            f"{name:16} {side:9} {forward:7.3f} + {backward:7.3f} ms, at the GPU {at_gpu[side][0]:7.3f} + "
            f"{at_gpu[side][1]:7.3f} ms, {memory[side]:8,.0f} MiB", flush=True
        )  # fmt: skip
    print(f"{name:16} {ratios[0]:.2f}x, at the GPU {ratios[1]:.2f}x", flush=True)
    return row


def main() -> None:
    """Compare errors, then times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="shapes with this in their name, and no errors")
    parser.add_argument("--out", type=Path, help="write all that was measured as JSON here")
    args = parser.parse_args()
    for case in (
        ()
        if args.only
        else ((16, 64, 2, 128, False), (16, 64, 1, 128, True), (8, 80, 8, 128, False), (8, 32, 2, 64, True))
    ):
        for name, values in errors(*case).items():
            heads, dim, groups, state, documents = case
            shown = " ".join(f"{value:.1e}" for value in values)
            print(f"{heads} heads of {dim}, groups {groups}, state {state}, documents {documents}, {name}: {shown}")
    rows = []
    for name, shape in SHAPES.items():
        if args.only in name:
            rows.append(measure(name, shape))
            torch.cuda.empty_cache()
    for side, passes in next((row["kernels"] for row in rows if row["shape"] == "8B, 8192"), {}).items():
        for title, times in zip(("forward", "backward"), passes, strict=True):
            print(f"{side}, {title}:", "; ".join(f"{name} {ms:.3f}" for name, ms in [*times.items()][:9]))
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
