"""Run our Triton kernels of a generation step under Triton's interpreter, and PyTorch's attention; print differences.

With TRITON_INTERPRET=1. float32 only: in the interpreter bfloat16 products are wrong. A process of its own: the
interpreter is chosen when a kernel is defined, and what the kernels ask of CUDA is put into torch here.
"""

from __future__ import annotations

import json
import sys
import types

import torch

PROCESSORS = 4
torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(multi_processor_count=PROCESSORS)

from nemotron_h.ops import attention, attention_kernel  # noqa: E402


def difference(lengths: list[int], groups: int, heads: int, dim: int, capacity: int, tokens: int = 1) -> float:
    """max |a - b| / max |b| of one step, or of a window of tokens, keys written by the kernel; beyond the lengths (of
    all tokens) lies rubbish.
    """
    rng = torch.Generator().manual_seed(0)
    batch = len(lengths)
    rows = torch.randn(batch, tokens, groups, heads + 2, dim, generator=rng)
    q, key, value = rows[..., :heads, :], rows[..., heads, :], rows[..., heads + 1, :]
    keys, values = (torch.randn(batch, groups, capacity, dim, generator=rng) for _ in range(2))
    expected_keys, expected_values = keys.clone(), values.clone()
    positions = torch.tensor(lengths) - tokens
    attention.cache_append(expected_keys, expected_values, key, value, positions)
    attention_kernel.cache_append(keys, values, key, value, positions)
    assert torch.equal(keys, expected_keys)
    assert torch.equal(values, expected_values)
    ragged = len(set(lengths)) > 1
    if tokens == 1:
        expected = attention.attention_step(q[:, 0], keys, values, positions + 1, max(lengths), ragged)
    else:
        expected = attention.attention_window(q, keys, values, positions + 1, max(lengths))
    for row, length in enumerate(lengths):
        keys[row, :, length:] = values[row, :, length:] = torch.nan
    assert attention_kernel.takes(q, keys)
    if tokens == 1:
        actual = attention_kernel.attention_step(q[:, 0], keys, values, positions + 1)
    else:
        actual = attention_kernel.attention_window(q, keys, values, positions + 1)
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def main() -> None:
    torch.set_num_threads(1)
    found = {
        "one sequence": difference([300], 2, 4, 16, 400),
        "ragged": difference([1, 64, 65, 200, 333], 2, 4, 32, 333),
        "one head a group": difference([70, 130], 3, 1, 16, 130),
        "many heads a group": difference([70, 130], 1, 20, 16, 130),
        "more stretches than blocks": difference([5, 700], 1, 2, 16, 1024),
        "a window": difference([5, 64, 66, 300], 2, 4, 16, 400, tokens=5),
        # of the second, a stretch begins behind the keys that the first tokens see
        "a window over many stretches": difference([9, 66, 130], 1, 3, 16, 1024, tokens=9),
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
