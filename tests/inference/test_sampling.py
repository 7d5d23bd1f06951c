"""The choice of the next token."""

from __future__ import annotations

import pytest
import torch

from nemotron_h.core.errors import UserError
from nemotron_h.inference.sampling import Sampling, choose

ROWS = 4000
LOGITS = torch.tensor([1.0, 3.0, -2.0, 2.0, 0.0])


def shares(sampling: Sampling) -> torch.Tensor:
    """How often each token is drawn from `LOGITS`."""
    drawn = choose(LOGITS.expand(ROWS, -1), sampling, sampling.generators(ROWS))
    return torch.bincount(drawn, minlength=len(LOGITS)) / ROWS


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature(temperature: float) -> None:
    expected = (LOGITS / temperature).softmax(-1)
    # four standard deviations of a share
    assert (shares(Sampling(temperature)) - expected).abs().max() < 4 * 0.5 / ROWS**0.5


def test_top_k() -> None:
    expected = torch.tensor([0.0, 3.0, -9e9, 2.0, -9e9])
    expected[0] = -9e9
    assert (shares(Sampling(top_k=2)) - expected.softmax(-1)).abs().max() < 4 * 0.5 / ROWS**0.5
    assert torch.equal(shares(Sampling(top_k=99)), shares(Sampling(top_k=5)))


def test_top_p() -> None:
    # probabilities, largest first: 0.64 (token 1), 0.24 (3), 0.09 (0), ...
    for top_p, kept in ((0.5, [1]), (0.7, [1, 3]), (0.9, [0, 1, 3])):
        found = shares(Sampling(top_p=top_p))
        assert found.nonzero().flatten().tolist() == kept
        expected = LOGITS[kept].softmax(-1)
        assert (found[kept] - expected).abs().max() < 4 * 0.5 / ROWS**0.5


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(top_k=1), Sampling(top_p=1e-6)], ids=str)
def test_greedy(sampling: Sampling) -> None:
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    assert torch.equal(choose(logits, sampling, sampling.generators(50)), logits.argmax(-1))


@pytest.mark.parametrize("values", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}], ids=str)
def test_refused(values: dict) -> None:
    with pytest.raises(UserError, match="it has to be"):
        Sampling(**values)
