"""The distance between states against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nemotron_h.ops.hidden_distance import hidden_distance


def states(width: int, teacher: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(width)
    return (
        torch.randn(9, width, generator=rng, dtype=torch.float64),
        torch.randn(9, teacher, generator=rng, dtype=torch.float64),
        torch.randn(teacher, width, generator=rng, dtype=torch.float64),
    )


def oracle(own: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    return 1 - (own * theirs).sum(1) / np.sqrt((own**2).sum(1) * (theirs**2).sum(1))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("width", [6, 10])
def test_one_less_the_cosine(width: int, dtype: torch.dtype, bound: float) -> None:
    own, theirs, projection = (t.to(dtype) for t in states(width, 10))
    exact = [t.double().numpy() for t in (own, theirs, projection)]
    found = hidden_distance(own, theirs, projection)
    assert np.abs(found.double().numpy() - oracle(exact[0] @ exact[2].T, exact[1])).max() < bound
    if width == 10:
        assert np.abs(hidden_distance(own, theirs).double().numpy() - oracle(exact[0], exact[1])).max() < bound


def test_gradients() -> None:
    own, theirs, projection = states(6, 10)
    inputs = (own.requires_grad_(), theirs, projection.requires_grad_())
    assert torch.autograd.gradcheck(hidden_distance, inputs)


def test_equal_states_are_not_apart() -> None:
    own, _, _ = states(6, 10)
    assert float(hidden_distance(own, 3 * own).abs().max()) < 1e-14
