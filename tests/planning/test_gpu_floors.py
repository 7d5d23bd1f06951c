"""The least times that the GPU benchmark holds kernels against are those of the model's own operations."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from gpu_kernels import PARTS, floors, part_of

from nemotron_h.architecture.definition import definition_from_dict
from nemotron_h.planning.flops import flops_per_token
from nemotron_h.recipe.compose import compose

PEAKS = {"bf16": 1e15, "fp8": 2e15, "bandwidth": 4e12}


def test_floors_of_products_and_how_they_grow() -> None:
    definition = definition_from_dict(asdict(compose("nemotron_h_8b").model), "nemotron_h_8b")
    one, four = (floors(definition, 8192, n, False, PEAKS) for n in (1, 4))
    flops = flops_per_token(definition, 8192, training=True)
    assert one["GEMM"] == pytest.approx(8192 * (flops.linear + flops.head) / PEAKS["bf16"])
    assert set(one) <= set(PARTS)
    for part, seconds in one.items():
        once_a_step = part in ("optimizer", "memset and copies")
        assert four[part] == pytest.approx(seconds * (1 if once_a_step else 4)), part
    fp8 = floors(definition, 8192, 1, True, PEAKS)
    kept = 2 * (flops.mamba_projections / 24 + flops.ffn / 24)  # M- at either end of 24 and 24
    expected = 8192 * ((flops.linear - kept) / PEAKS["fp8"] + (kept + flops.head) / PEAKS["bf16"])
    assert fp8["GEMM"] == pytest.approx(expected)


def test_kernels_belong_to_parts() -> None:
    assert part_of("_layer_norm_bwd_kernel") == "norms"
    assert part_of("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT") == "GEMM"
    assert part_of("something_else") == "other"
