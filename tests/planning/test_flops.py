"""FLOPs against known totals of the released sizes, and against torch's counter on small models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_models import MATRICES, MODELS, as_definition
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nemotron_h.architecture.definition import ModelDefinition, definition_from_dict
from nemotron_h.planning.flops import flops_per_token, recomputed_per_token
from nemotron_h.recipe.compose import compose
from nemotron_h.schema.recipe import AdapterSchema

GIGA = 1e9


def definition(name: str) -> ModelDefinition:
    from dataclasses import asdict

    return definition_from_dict(asdict(compose(name).model), name)


@pytest.mark.parametrize(
    ("name", "gflops", "ffn", "mamba", "ssd", "attention"),
    [
        # GFLOP per token, forward and backward, at 8192 tokens, and shares in percent
        ("nemotron_h_4b", 25.7, 42, 41, 1.6, 6),
        ("nemotron_h_8b", 46.7, 54, 34, 1.0, 4),
        ("nemotron_h_47b", 279, 52, 42, 1.0, 2),
        ("nemotron_h_56b", 339, 51, 42, 1.0, 4),
        ("nano_9b_v2", 51.5, 41, 46, 1.3, 5),
        ("nano_12b_v2", 72.0, 49, 39, 0.9, 5),
    ],
)
def test_known_totals(name: str, gflops: float, ffn: float, mamba: float, ssd: float, attention: float) -> None:
    flops = flops_per_token(definition(name), 8192)
    assert flops.total / GIGA == pytest.approx(gflops, rel=0.002)
    share = flops.shares()
    assert share["ffn"] * 100 == pytest.approx(ffn, abs=0.5)
    assert share["mamba_projections"] * 100 == pytest.approx(mamba, abs=0.5)
    assert share["ssd"] * 100 == pytest.approx(ssd, abs=0.051)
    assert (share["attention_projections"] + share["attention_core"]) * 100 == pytest.approx(attention, abs=0.7)
    assert flops.linear + flops.rest == pytest.approx(flops.total)


def test_published_run() -> None:
    """56B in FP8 on 128 H100: 11.874 s per step of 384 sequences, 702 TFLOP/s per GPU."""
    flops = flops_per_token(definition("nemotron_h_56b"), 8192).total
    per_gpu = 384 * 8192 / 11.874 / 128
    assert per_gpu == pytest.approx(2070, rel=1e-3)
    assert per_gpu * flops / 1e12 == pytest.approx(702, rel=2e-3)


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("name", MODELS)
def test_against_torch_s_counter(name: str) -> None:
    """Within 1 % of what torch counts in a forward and in a backward of the Megatron model, in float64.

    Two known differences are put in: the counter sees the attention core's whole square (its plain kernel computes it),
    the plan the causal triangle; and our scan's backward multiplies C B^T, the states and C times the states again,
    which is recomputation and no work of the model. Float64 goes through operations that the counter knows.
    """
    from nemotron_h.model.module import NemotronHConfig

    length, batch, chunk = 96, 2, 32
    config = NemotronHConfig(
        definition_name=name, **MODELS[name], seq_length=length, params_dtype=torch.float64, bf16=False
    )
    model = config.configure_model(None).double()
    tokens = torch.randint(config.vocab_size, (batch, length))
    d = as_definition(MODELS[name])
    with FlopCounterMode(display=False) as forward, sdpa_kernel(SDPBackend.MATH):
        loss = model(input_ids=tokens, labels=tokens).mean()
    with FlopCounterMode(display=False) as backward, sdpa_kernel(SDPBackend.MATH):
        loss.backward()

    planned = flops_per_token(d, length, training=False, chunk=chunk)
    square = planned.attention_core * (2 * length / (length + 1) - 1)
    # the convolution is elementwise in float64
    expected = planned.total - planned.convolution + square
    assert forward.get_total_flops() / (batch * length) == pytest.approx(expected, rel=0.01)
    again = 0.0
    if d.mamba_num_heads:
        gram = 2 * chunk * d.mamba_num_groups * d.mamba_state_dim
        again = (d.count("M") + d.count("P")) * (gram + 4 * d.mamba_state_dim * d.block("M").d_inner)
    assert backward.get_total_flops() / (batch * length) == pytest.approx(2 * expected + again, rel=0.01)


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize(
    ("pattern", "targets"),
    [
        ("hybrid", MATRICES),
        ("hybrid", ["in_proj", "linear_fc2"]),
        ("experts", ["linear_proj", "experts.linear_fc1", "experts.linear_fc2"]),
        ("linear", ["in_proj", "linear"]),
    ],
    ids=["all", "two", "experts", "linear"],
)
def test_adapters_against_torch_s_counter(kind: str, pattern: str, targets: list[str]) -> None:
    """The same with frozen weights, by parts that the counter names alike: exactly, with our scan's recomputation."""
    from nemotron_h.model.module import NemotronHConfig

    length, batch, chunk = 96, 2, 32
    adapter = AdapterSchema(kind=kind, rank=8, alpha=8.0, targets=targets)
    model = {**MODELS[pattern], "vocab_size": 512}
    config = NemotronHConfig(
        definition_name="adapted",
        **model,
        adapter=adapter,
        seq_length=length,
        params_dtype=torch.float64,
        bf16=False,
    )
    built, d = config.configure_model(None).double(), as_definition(model)
    tokens = torch.randint(config.vocab_size, (batch, length))
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        built(input_ids=tokens, labels=tokens).mean().backward()
    planned = flops_per_token(d, length, chunk=chunk, adapter=adapter, micro_batch=batch)
    core = planned.attention_core * (2 * length / (length + 1) - 1)
    again = d.count("M") * (
        2 * chunk * d.mamba_num_groups * d.mamba_state_dim + 4 * d.mamba_state_dim * d.block("M").d_inner
    )
    expected = planned.total - planned.convolution + core + again
    assert counted.get_total_flops() / (batch * length) == pytest.approx(expected, rel=1e-3)
    whole = flops_per_token(d, length, chunk=chunk)
    assert planned.adapters > 0.01 * planned.total
    assert planned.total < 0.8 * whole.total
    assert (planned.ssd, planned.attention_core) == (whole.ssd, whole.attention_core)


@pytest.mark.parametrize("chunk", [16, 64, 128])
def test_scan_against_torch_s_counter(chunk: int) -> None:
    """The scan alone, exactly: where it is a small share of a model, 1 % of the model would hide it."""
    from nemotron_h.ops.ssd import ssd_chunk_scan

    d = as_definition(MODELS["mamba"])
    batch, length = 1, 256
    heads, width, groups, state = d.mamba_num_heads, d.mamba_head_dim, d.mamba_num_groups, d.mamba_state_dim
    x = torch.randn(batch, length, heads, width)
    b, c = torch.randn(batch, length, groups, state), torch.randn(batch, length, groups, state)
    with FlopCounterMode(display=False) as counted:
        ssd_chunk_scan(x, torch.rand(batch, length, heads), -torch.rand(heads), b, c, chunk_size=chunk)
    assert counted.get_total_flops() == length * d.block("M").scan_flops(chunk)


def test_recomputed_layers_are_their_forward() -> None:
    d = as_definition(MODELS["hybrid"])
    forward = flops_per_token(d, 512, training=False)
    everything = recomputed_per_token(d, 512, {"mamba": True, "attention": True, "ffn": True})
    assert everything == pytest.approx(forward.total - forward.head)
    assert recomputed_per_token(d, 512, {"mamba": False, "attention": False, "ffn": True}) == forward.ffn
    adapter = AdapterSchema(kind="lora", rank=8, alpha=8.0, targets=["linear_fc1"])
    adapted = flops_per_token(d, 512, training=False, adapter=adapter)
    assert recomputed_per_token(d, 512, {"mamba": False, "attention": False, "ffn": True}, adapter) == pytest.approx(
        adapted.ffn + adapted.adapters
    )


def test_only_the_core_grows_with_the_sequence() -> None:
    d = as_definition(MODELS["hybrid"])
    short, long = flops_per_token(d, 1023), flops_per_token(d, 4095)
    assert long.attention_core == 4 * short.attention_core
    assert replace(long, attention_core=0.0) == replace(short, attention_core=0.0)
