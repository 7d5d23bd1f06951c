"""Where the time of a training step goes, by part of the model: `python tests/benchmarks/profile_step.py`."""

from __future__ import annotations

import argparse
import os
from collections import defaultdict

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from train_step import DTYPES, configuration, single_rank, training_step

#: a part and what the profiler calls it; an event belongs to the innermost that it lies in
PARTS = {
    "_ChunkScan": "SSD scan",
    "_CausalConv1d": "causal convolution",
    "_GroupRMSNorm": "norms",
    "_Linear": "linear layers, other than products",
    "CrossEntropy": "cross entropy",
    "SquaredReLU": "squared ReLU",
    "LinearWithGradAccumulation": "linear layers, other than products",
    "scaled_dot_product": "attention",
    "Embedding": "embedding",
    "aten::embedding": "embedding",
    "optimizer": "optimizer, clipping and gradient buffers",
    "Optimizer.step": "optimizer, clipping and gradient buffers",
}
PRODUCTS = ("aten::mm", "mkldnn::_linear_pointwise")


def part_of(event: torch.autograd.profiler_util.FunctionEvent) -> str:
    """The part of the model that an event's own time belongs to."""
    node, chain = event, []
    while node is not None:
        chain.append(node.name)
        node = node.cpu_parent
    for name in chain:
        for key, part in PARTS.items():
            if key in name:
                return "linear layers, products" if part.startswith("linear") and event.name in PRODUCTS else part
    return "linear layers, products" if event.name in PRODUCTS else "residuals, copies and the rest"


def main() -> None:
    """Profile one step after two and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="nemotron_h_tiny/pretrain")
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    parser.add_argument("--batch", type=int, default=4, help="sequences per step")
    parser.add_argument("--length", type=int, default=2048, help="tokens per sequence")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--operations", action="store_true", help="also list the operations of each part")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    single_rank()
    step, _ = training_step(configuration(args.recipe, args.length, args.precision), args.batch, args.length)
    for _ in range(2):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    parts: dict[str, float] = defaultdict(float)
    operations: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in profiled.events():
        part = part_of(event)
        parts[part] += event.self_cpu_time_total
        operations[part, event.name].append(event.self_cpu_time_total)
    total = sum(parts.values())
    table = Table(title=f"One step, {args.batch} x {args.length} tokens, {args.precision}, {args.threads} threads")
    for column in ("part", "ms", "share"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part, microseconds in sorted(parts.items(), key=lambda item: -item[1]):
        table.add_row(part, f"{microseconds / 1e3:,.0f}", f"{microseconds / total:.1%}", style="bold")
        if args.operations:
            own = [(name, times) for (owner, name), times in operations.items() if owner == part]
            for name, times in sorted(own, key=lambda item: -sum(item[1]))[:8]:
                table.add_row(f"    {name} x {len(times)}", f"{sum(times) / 1e3:,.0f}", f"{sum(times) / total:.1%}")
    table.add_row("all", f"{total / 1e3:,.0f}", "100%")
    width = None if os.isatty(1) else 110
    Console(width=width).print(table)


if __name__ == "__main__":
    main()
