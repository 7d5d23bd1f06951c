"""Run our Triton scan under Triton's interpreter, forward and backward, and PyTorch's in float64; print differences.

With TRITON_INTERPRET=1, in a process of its own and in float32: see `run_generation_kernels.py`.
"""

from __future__ import annotations

import json

import torch

from nemotron_h.ops import scan_kernel
from nemotron_h.ops.ssd import ssd_chunk_scan

NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias")


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """max |a - b| / max |b|; of b = 0 (one token's gradient of A) max |a|."""
    return ((actual.double() - expected).abs().max() / (expected.abs().max() or 1)).item()


def differences(
    length: int, heads: int, groups: int, dim: int, state: int, documents: list[int] | None = None,
    *, plain: bool = False, initial: bool = False, programs: int = 1,
) -> dict[str, float]:  # fmt: skip
    """Of y, the last state and all gradients; x, B and C are parts of one tensor, as the convolution leaves them."""
    rng = torch.Generator().manual_seed(length)
    batch, inner = 2, heads * dim
    scan_kernel.PROGRAMS = programs
    wide = torch.randn(batch, length, inner + 2 * groups * state + 3, generator=rng)
    x = wide[..., :inner].unflatten(-1, (heads, dim))
    B, C = wide[..., inner : inner + 2 * groups * state].unflatten(-1, (2, groups, state)).unbind(2)
    dt = torch.randn(batch, length, heads, generator=rng) * 2 - 2
    A = -torch.rand(heads, generator=rng) * 2 - 0.05
    D, bias = (None if plain else torch.randn(heads, generator=rng) for _ in range(2))
    dt = dt.sigmoid() if plain else dt
    seq_idx = None if documents is None else torch.tensor(documents)[None].expand(batch, -1).int().contiguous()
    start = torch.randn(batch, heads, dim, state, generator=rng) if initial else None
    exact = [t if t is None else t.double().requires_grad_() for t in (x, dt, A, B, C, D, bias)]
    y, last = ssd_chunk_scan(
        *exact[:5], D=exact[5], dt_bias=exact[6], dt_softplus=not plain, seq_idx=seq_idx,
        initial_state=None if start is None else start.double(), return_final_state=True,
    )  # fmt: skip
    ours, final = scan_kernel.ssd_scan(
        x, dt, A, B, C, D, bias, dt_softplus=not plain, seq_idx=seq_idx, initial_state=start, chunk=16
    )
    errors = {"y": relative(ours, y.detach()), "last state": relative(final, last.detach())}
    if initial:
        return errors
    dy = torch.randn(y.shape, generator=rng)
    y.backward(dy.double())
    gradients = scan_kernel.ssd_scan_gradients(
        dy, x, dt, A, B, C, D, bias, dt_softplus=not plain, seq_idx=seq_idx, chunk=16
    )
    for name, gradient, tensor in zip(NAMES, gradients, exact, strict=True):
        if tensor is not None:
            errors[f"gradient of {name}"] = relative(gradient, tensor.grad)
    return errors


def main() -> None:
    """Print the largest difference of each case."""
    cases = {
        "whole chunks": differences(48, 4, 2, 16, 32),
        "a short last chunk": differences(41, 2, 1, 16, 16),
        "one token": differences(1, 2, 2, 16, 16),
        "heads of 24, eight groups": differences(33, 8, 8, 24, 16),
        "heads of a group over programs": differences(32, 4, 1, 16, 64, programs=64),
        "without bias, skip and softplus": differences(32, 2, 1, 16, 16, plain=True),
        "an initial state": differences(40, 2, 1, 16, 16, initial=True),
        "documents": differences(48, 2, 1, 16, 16, [0] * 7 + [1] * 9 + [2] * 2 + [3] * 30),
        "documents, a short last chunk": differences(45, 2, 2, 16, 16, [3] * 16 + [4] * 20 + [5] * 9, programs=64),
    }
    print(json.dumps({case: max(errors.values()) for case, errors in cases.items()}))


if __name__ == "__main__":
    main()
