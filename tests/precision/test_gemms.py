"""The table of products: which are FP8, in which shapes, and what is refused before a run."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import pytest

from nemotron_h.architecture.definition import Expect, ModelDefinition
from nemotron_h.architecture.gemms import check_gemms, fold, gemm_table
from nemotron_h.core.errors import UserError

MODEL = ModelDefinition(
    name="eight",
    pattern="M-M-M*-M-",
    hidden_size=128,
    ffn_hidden_size=512,
    num_attention_heads=8,
    num_query_groups=2,
    head_dim=32,
    mamba_num_heads=32,
    mamba_head_dim=16,
    mamba_num_groups=2,
    mamba_state_dim=16,
    conv_kernel=4,
    vocab_size=1000,
    expect=Expect(4, 1, 4, 0),
)


def check(model: ModelDefinition = MODEL, precision: str = "fp8_current_scaling", **changes: object) -> None:
    check_gemms(model, precision, **{"seq_length": 256, "micro_batch_size": 2, "origin": "recipe eight", **changes})


def test_paper_reading_two_layers_are_four_products_at_each_end() -> None:
    table = gemm_table(MODEL, "fp8_current_scaling", tokens=512)
    assert len(table) == 2 * 9 + 1
    dtypes = [gemm.dtype for gemm in table]
    assert dtypes == ["BF16"] * 4 + ["FP8"] * 10 + ["BF16"] * 5
    assert table[0].why == "first 2 layers"
    assert table[4].why == "E4M3 weights and activations, E5M2 gradients"
    assert table[-2].why == "last 2 layers"
    assert (table[-1].name, table[-1].why) == ("output_layer", "output layer")


def test_the_papers_other_reading_and_other_precisions() -> None:
    four = gemm_table(MODEL, "fp8_blockwise", tokens=512, bf16_edge_layers=4)
    assert {gemm.layer for gemm in four if gemm.dtype == "FP8"} == {4}
    assert {gemm.why for gemm in four if gemm.dtype == "FP8"} == {"E4M3 weights and activations, E4M3 gradients"}
    for precision, dtype in (("bf16", "BF16"), ("fp32", "FP32")):
        assert {(gemm.dtype, gemm.why) for gemm in gemm_table(MODEL, precision, tokens=512)} == {(dtype, "")}


def test_shapes_of_one_rank() -> None:
    shapes = {g.name: (g.m, g.n, g.k) for g in gemm_table(MODEL, "bf16", 2, tokens=512)}
    assert shapes == {
        "in_proj": (512, (2 * 512 + 2 * 2 * 16 + 32) // 2, 128),
        "out_proj": (512, 128, 256),
        "linear_qkv": (512, (256 + 128) // 2, 128),
        "linear_proj": (512, 128, 128),
        "linear_fc1": (512, 256, 128),
        "linear_fc2": (512, 128, 256),
        "output_layer": (512, 500, 128),
    }


def test_a_linear_layer_is_whole_on_every_rank() -> None:
    """With sequence parallelism a rank has its share of the tokens, else all of them."""
    model = replace(MODEL, pattern="M-L*-L", family="pruned")
    for sequence, tokens in ((True, 256), (False, 512)):
        table = gemm_table(model, "fp8_blockwise", 2, tokens=512, sequence_parallel=sequence)
        rows = [(g.layer, g.m, g.n, g.k, g.dtype) for g in table if g.kind == "linear"]
        assert rows == [(2, tokens, 128, 128, "FP8"), (5, tokens, 128, 128, "BF16")]
    odd = replace(model, hidden_size=120)
    with pytest.raises(UserError, match=r"model.hidden_size = 120"):
        check(odd)


def test_equal_products_are_one_row() -> None:
    table = gemm_table(MODEL, "fp8_current_scaling", tokens=512)
    groups = fold(table)
    assert sum(len(group.layers) for group in groups) == len(table)
    spans = [(group.span, group.gemm.name, group.gemm.dtype) for group in groups]
    assert ("2 layers, 2 to 4", "in_proj", "FP8") in spans
    assert ("layer 0", "in_proj", "BF16") in spans


def test_what_fits_is_not_refused() -> None:
    for precision in ("fp32", "bf16", "fp8_current_scaling", "fp8_blockwise"):
        check(precision=precision)
        check(precision=precision, tensor_parallel=2, sequence_parallel=True)
    check(replace(MODEL, ffn_hidden_size=500), "bf16", seq_length=255)


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"seq_length": 252}, r"data.seq_length \* data.micro_batch_size = 252 \* 2 .* multiple of 16", "is 256$"),
        (
            {"seq_length": 192, "tensor_parallel": 2, "sequence_parallel": True, "precision": "fp8_blockwise"},
            "192 .* over 2 ranks: fp8_blockwise needs a multiple of 256",
            "is 256$",
        ),
        (
            {"model": replace(MODEL, ffn_hidden_size=500)},
            r"recipe eight: linear_fc1 of the ffn layers is 128 x 500 per rank \(model.ffn_hidden_size = 500",
            "set model.ffn_hidden_size to 496 or precision to bf16",
        ),
        (
            {"model": replace(MODEL, ffn_hidden_size=528), "tensor_parallel": 2},
            "linear_fc1 .* is 128 x 264 per rank",
            "set model.ffn_hidden_size to 544 or parallel.tensor to 1 or precision to bf16",
        ),
        (
            {"model": replace(MODEL, mamba_num_heads=8)},
            "in_proj of the mamba layers is 128 x 328",
            "set model.mamba_num_heads to 16 or precision to bf16",
        ),
        (
            {"bf16_edge_layers": 5},
            "bf16_edge_layers = 5 at each end leaves none of the 9 layers",
            "set it to 4 or less",
        ),
    ],
    ids=["tokens", "tokens of a share", "width", "width after the split", "heads", "no FP8 layer"],
)
def test_what_does_not_fit_is_an_error_that_names_the_key(changes: dict, message: str, hint: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        check(**changes)
    assert re.search(hint, error.value.hint), error.value.hint


def test_imports_no_torch() -> None:
    code = "import sys, nemotron_h.architecture.gemms; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
