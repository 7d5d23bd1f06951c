"""How fast this machine multiplies matrices of a model's own shapes: the limit that a training step is held against.

Prints one JSON object: seconds and floating-point operations of all products of the model's linear layers in one step
(forward, and the two of the backward), per precision. The caller sets the threads (`OMP_NUM_THREADS`).
"""

from __future__ import annotations

import argparse
import json
import os
import time

import torch

from nemotron_h.ops import linear

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def linear_layers(definition: dict) -> dict[tuple[int, int], int]:
    """(inputs, outputs) of the linear layers and how many the model has of each."""
    hidden, pattern = definition["hidden_size"], definition["pattern"]
    inner = definition["mamba_num_heads"] * definition["mamba_head_dim"]
    projected = 2 * inner + 2 * definition["mamba_num_groups"] * definition["mamba_state_dim"]
    projected += definition["mamba_num_heads"]
    query = definition["num_attention_heads"] * definition["head_dim"]
    key_value = 2 * definition["num_query_groups"] * definition["head_dim"]
    counts: dict[tuple[int, int], int] = {}
    for shape, symbol in (
        ((hidden, projected), "M"),
        ((inner, hidden), "M"),
        ((hidden, query + key_value), "*"),
        ((query, hidden), "*"),
        ((hidden, definition["ffn_hidden_size"]), "-"),
        ((definition["ffn_hidden_size"], hidden), "-"),
    ):
        counts[shape] = counts.get(shape, 0) + pattern.count(symbol)
    counts[hidden, definition["vocab_size"]] = counts.get((hidden, definition["vocab_size"]), 0) + 1
    return counts


def seconds_of(tokens: int, inputs: int, outputs: int, dtype: torch.dtype, repeats: int) -> float:
    """Fewest seconds of y = x W^T, dx = dy W and dW = dy^T x together, by the fastest library that torch has."""
    x, w = torch.randn(tokens, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    dy = torch.randn(tokens, outputs).to(dtype)
    ways = {"torch.mm": torch.mm}
    if linear.takes(x, w):
        ways["oneDNN"] = lambda a, b: linear.matmul(a, b.t())
    best = float("inf")
    for multiply in ways.values():
        times = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            multiply(x, w.t())
            multiply(dy, w)
            if outputs <= inputs:
                multiply(dy.t(), x)
            else:
                multiply(x.t(), dy)
            times.append(time.perf_counter() - start)
        best = min(best, min(times[1:]))
    return best


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--definition", required=True, help="the model definition as JSON")
    parser.add_argument("--tokens", type=int, required=True, help="tokens of a step")
    parser.add_argument("--repeats", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    layers = linear_layers(json.loads(args.definition))
    flops = sum(6 * args.tokens * i * o * count for (i, o), count in layers.items())
    result: dict[str, dict[str, float]] = {}
    for name, dtype in DTYPES.items():
        seconds = sum(seconds_of(args.tokens, i, o, dtype, args.repeats) * count for (i, o), count in layers.items())
        result[name] = {"seconds": seconds, "flops": flops}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
