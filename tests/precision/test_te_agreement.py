"""The emulation computes what Transformer Engine computes on an H100, recorded by `tests/gpu/fp8_reference.py`."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from te_cases import CASES, Case, digest, inputs, sample

from nemotron_h.ops.norm import rms_norm
from nemotron_h.precision.emulation import RECIPES, fp8_linear
from nemotron_h.precision.scaling import E4M3, E5M2, Quantized

REFERENCE = Path(__file__).with_name("te_reference.safetensors")
pytestmark = pytest.mark.skipif(
    not REFERENCE.is_file(), reason=f"{REFERENCE.name} is not recorded yet; tests/gpu/fp8_reference.py makes it"
)


def recorded(recipe: str, case: Case) -> dict[str, torch.Tensor]:
    """What Transformer Engine computed; fails when the inputs here are others."""
    prefix = f"{recipe}/{case.name}/"
    with safe_open(REFERENCE, "pt") as file:
        assert file.metadata()[f"{case.name}/inputs"] == digest(inputs(case)), "these are not the recorded inputs"
        found = {key.removeprefix(prefix): file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118
    assert found, f"{REFERENCE.name} lacks {prefix}"
    return found


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest value; 0 where both are 0."""
    difference, largest = (actual.float() - expected.float()).abs().max(), expected.float().abs().max()
    return float(difference / largest) if largest else float(difference)


def engine_layout(forward: Quantized, backward: Quantized, weight: bool) -> dict[str, torch.Tensor]:
    """Scales and float8 bytes in the layout of Transformer Engine's tensors, without the padding of scales."""
    if forward.block is None:
        return {"_scale_inv": forward.scale_inv.view(1), "_data": sample(forward.values.view(torch.uint8))}
    return {
        "_rowwise_scale_inv": forward.scale_inv if weight else forward.scale_inv.t(),
        "_columnwise_scale_inv": backward.scale_inv.t() if weight else backward.scale_inv,
        "_rowwise_data": sample(forward.values.view(torch.uint8)),
        "_columnwise_data": sample(backward.values.view(torch.uint8).t()),
    }


@pytest.mark.parametrize("case", [c for c in CASES if not c.norm], ids=lambda c: c.name)
@pytest.mark.parametrize("recipe", RECIPES)
def test_scales_and_casts_are_the_same(recipe: str, case: Case) -> None:
    tensors, expected, emulated = inputs(case), recorded(recipe, case), RECIPES[recipe]
    operands = {
        "x": emulated.activation(tensors["x"], E4M3),
        "weight": emulated.weight(tensors["weight"], E4M3),
        "dy": emulated.gradient(tensors["dy"], emulated.gradient_dtype),
    }
    assert emulated.gradient_dtype == (E5M2 if recipe == "fp8_current_scaling" else E4M3)
    for operand, (forward, backward) in operands.items():
        for attribute, actual in engine_layout(forward, backward, operand == "weight").items():
            theirs = expected[operand + attribute]
            if attribute.endswith("scale_inv") and actual.dim() == 2:
                assert all(padded - size < 4 for padded, size in zip(theirs.shape, actual.shape, strict=True))
                theirs = theirs[: actual.shape[0], : actual.shape[1]]
            assert torch.equal(actual, theirs), f"{operand}{attribute}"


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("recipe", RECIPES)
def test_products_agree(recipe: str, case: Case) -> None:
    tensors, expected = inputs(case), recorded(recipe, case)
    leaves = {name: t.requires_grad_() for name, t in tensors.items() if name != "dy"}
    x = rms_norm(leaves["x"], leaves["norm"]) if case.norm else leaves["x"]
    y = fp8_linear(x, leaves["weight"], recipe)
    y.backward(tensors["dy"])
    actual = {"y": y, "dx": leaves["x"].grad, "dw": leaves["weight"].grad}
    if case.norm:
        actual["dnorm"] = leaves["norm"].grad
    errors = {name: relative(sample(value), expected[name]) for name, value in actual.items()}
    assert all(math.isfinite(error) and error < 1e-2 for error in errors.values()), errors
