"""Packed documents are separate documents: logits and every gradient, wherever the boundaries fall."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_model import pure_config, relative_error, small_config, small_model, tokens

pytestmark = pytest.mark.usefixtures("megatron")

#: lengths of the documents of each row; the scan's chunk is 32
ROWS = ([1, 31, 32, 16], [32, 1, 1, 46])


def seq_idx() -> torch.Tensor:
    """Ids that only grow, as the data module's; int32 [batch, length]."""
    rows = [[number for number, length in enumerate(lengths) for _ in range(length)] for lengths in ROWS]
    return torch.tensor(rows, dtype=torch.int32)


def spans() -> list[tuple[int, slice]]:
    """(row, positions) of every document."""
    found = []
    for row, lengths in enumerate(ROWS):
        start = 0
        for length in lengths:
            found.append((row, slice(start, start + length)))
            start += length
    return found


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    ("make", "tolerance"),
    [
        (lambda: small_config(1, dtype=torch.float64), 1e-9),
        (lambda: small_config(8, dtype=torch.float64), 1e-9),
        (lambda: pure_config("M", dtype=torch.float64), 1e-9),
        # positions count from the row's start, which scores do not see beyond the rounding of float32 angles
        (lambda: pure_config("*-", dtype=torch.float64), 1e-4),
    ],
    ids=["hybrid, 1 group", "hybrid, 8 groups", "mamba2", "transformer, rotary"],
)
def test_packed_is_separate(make, tolerance: float) -> None:
    model = small_model(make())
    ids = tokens(len(ROWS), sum(ROWS[0]) + 1)
    inputs, labels = ids[:, :-1], ids[:, 1:]

    packed = model(input_ids=inputs, seq_idx=seq_idx())
    F.cross_entropy(packed.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    packed_gradients = gradients(model)

    for row, span in spans():
        alone = model(input_ids=inputs[row : row + 1, span])
        assert relative_error(packed[row : row + 1, span], alone) < tolerance, (row, span)
        F.cross_entropy(alone.flatten(0, 1), labels[row, span], reduction="sum").backward()
    errors = {name: relative_error(packed_gradients[name], g) for name, g in gradients(model).items()}
    assert max(errors.values()) < tolerance, sorted(errors.items(), key=lambda e: -e[1])[:5]


def test_boundaries_matter() -> None:
    """Without `seq_idx` the same tokens give something else, so the test above can fail."""
    model = small_model(small_config())
    ids = tokens(len(ROWS), sum(ROWS[0]))
    assert relative_error(model(input_ids=ids), model(input_ids=ids, seq_idx=seq_idx())) > 0.1
