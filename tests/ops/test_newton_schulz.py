"""Newton-Schulz against a float64 iteration, the singular value decomposition, and torch's Muon."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nemotron_h.ops.newton_schulz import COEFFICIENTS, orthogonalize, scale

SHAPES = {"square": (96, 96), "wide": (64, 256), "tall": (256, 64)}


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def oracle(matrix: Tensor, coefficients: str) -> Tensor:
    """The same polynomial of the singular values, in float64: no matrix is multiplied by itself."""
    u, s, v = torch.linalg.svd(matrix / matrix.norm(), full_matrices=False)
    for a, b, c in COEFFICIENTS[coefficients]:
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ v


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm())


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_agrees_with_float64_and_has_the_stated_rms(shape: str, coefficients: str) -> None:
    rows, columns = SHAPES[shape]
    matrix = gaussian(rows, columns)
    out = orthogonalize(matrix, coefficients)
    assert out.dtype == torch.bfloat16
    assert out.shape == matrix.shape
    # bfloat16 has 8 bits; five steps amplify what the small singular values lose
    assert relative(out, oracle(matrix, coefficients)) < 0.08
    rms = float(out.double().square().mean().sqrt()) * scale(rows, columns)
    assert 0.85 * 0.2 < rms < 1.15 * 0.2
    assert torch.equal(
        orthogonalize(-3 * matrix.float(), coefficients), -orthogonalize(3 * matrix.float(), coefficients)
    )


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
def test_the_longer_side_does_not_matter(coefficients: str) -> None:
    matrix = gaussian(64, 256)
    assert torch.equal(orthogonalize(matrix, coefficients), orthogonalize(matrix.T, coefficients).T)


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
def test_of_a_low_rank_the_rank_alone_is_orthogonal(coefficients: str) -> None:
    """Rank 16 of 256 with no noise: singular values beyond stay rounding errors, so the RMS is near sqrt(16 / 256)."""
    matrix = gaussian(1024, 16) @ gaussian(16, 256, seed=1)
    out = orthogonalize(matrix, coefficients).double()
    values = torch.linalg.svdvals(out)
    assert values[:16].min() > 0.6
    assert values[:16].max() < 1.3
    assert relative(out, oracle(matrix, coefficients)) < 0.5
    assert 0.2 < float(out.square().mean().sqrt()) * 1024**0.5 < 0.5


def test_an_input_projection_as_one_matrix_starves_its_small_parts() -> None:
    """z, x, B, C and dt of a mixer, with gradients of other sizes: the table of docs/muon.md."""
    rows, sizes = (512, 512, 64, 64, 8), (1.0, 1.0, 0.2, 0.2, 5.0)
    parts = [size * gaussian(n, 256, seed=n + i) for i, (n, size) in enumerate(zip(rows, sizes, strict=True))]
    whole = scale(sum(rows), 256) * orthogonalize(torch.cat(parts)).double()
    rms = [float(part.square().mean().sqrt()) / 0.2 for part in whole.split(rows)]
    assert rms == pytest.approx([1.02, 1.02, 0.23, 0.23, 1.9], abs=0.15)
    apart = [scale(*part.shape) * orthogonalize(part).double() for part in parts]
    assert all(0.8 < float(part.square().mean().sqrt()) / 0.2 < 1.15 for part in apart)


def test_zero_stays_zero() -> None:
    assert not orthogonalize(torch.zeros(8, 4)).any()


def test_one_matrix_of_torch() -> None:
    """Torch keeps a mean of the gradients (`lerp`) where we keep a sum: the same but for a factor, which is lost."""
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        pytest.skip("torch.optim.Muon is in torch 2.9 and later")
    ours = gaussian(48, 160).float()
    theirs = torch.nn.Parameter(ours.clone())
    optimizer = muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.1, nesterov=True, adjust_lr_fn="match_rms_adamw")
    sums = torch.zeros_like(ours)
    for step in range(4):
        gradient = gaussian(48, 160, seed=step + 1).float()
        theirs.grad = gradient.clone()
        optimizer.step()
        sums = 0.95 * sums + gradient
        update = scale(48, 160) * orthogonalize(gradient + 0.95 * sums).float()
        before, current = ours, theirs.detach()
        ours = ours - 0.02 * (update + 0.1 * ours)
        assert float((ours - current).norm() / (ours - before).norm()) < 0.02 * (step + 1)
