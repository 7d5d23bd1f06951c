"""What each precision's plugin tells Megatron, and what the start of a run refuses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from nemotron_h.architecture.gemms import FP8_FORMATS
from nemotron_h.core.errors import UserError
from nemotron_h.precision.plugins import FP8, plugin
from nemotron_h.schema.recipe import PRECISIONS


def test_every_precision_has_a_plugin_and_its_formats_are_stated_once() -> None:
    assert {name: plugin(name).recipe for name in PRECISIONS} == {name: name for name in PRECISIONS}
    assert FP8.keys() == FP8_FORMATS.keys()
    for name, options in FP8.items():
        assert FP8_FORMATS[name] == ("E4M3", "E5M2" if options["fp8"] == "hybrid" else "E4M3")


@pytest.mark.parametrize(
    ("name", "fp8", "scaling"),
    [("fp8_current_scaling", "hybrid", "tensorwise"), ("fp8_blockwise", "e4m3", "blockwise")],
)
def test_transformer_engine(name: str, fp8: str, scaling: str) -> None:
    made = plugin(name, 4, "te")
    config = made.dtype_config
    assert (config.fp8, config.fp8_recipe) == (fp8, scaling)
    assert config.first_last_layers_bf16
    assert (config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16) == (4, 4)
    assert not config.fp8_param
    assert not config.fp8_param_gather
    assert not config.fp8_dot_product_attention
    assert (config.bf16, config.params_dtype, made.emulated) == (True, torch.bfloat16, False)


def test_emulation_is_a_bf16_model_to_megatron() -> None:
    from nemo.lightning.pytorch.plugins.mixed_precision import update_config_with_dtype_overrides

    made = plugin("fp8_blockwise", 3, "emulate")
    assert made.emulated
    model = SimpleNamespace(fp8=None, fp8_emulation=None, first_last_layers_bf16=False, num_layers_at_start_in_bf16=0)
    update_config_with_dtype_overrides(made.dtype_config, model)
    assert vars(model) == {
        "fp8": None,
        "fp8_emulation": "fp8_blockwise",
        "first_last_layers_bf16": True,
        "num_layers_at_start_in_bf16": 3,
    }


def test_gradient_sums() -> None:
    from megatron.core.distributed import DistributedDataParallelConfig
    from nemo.lightning.pytorch.plugins.mixed_precision import update_config_with_dtype_overrides

    for name in PRECISIONS:
        for gradients in ("fp32", "bf16"):
            made = plugin(name, gradients=gradients)
            ddp = update_config_with_dtype_overrides(made.dtype_config, DistributedDataParallelConfig())
            assert ddp.grad_reduce_in_fp32 is (gradients == "fp32" or name == "fp32"), (name, gradients)
    with pytest.raises(UserError, match="gradients = 'bf61'\nDid you mean bf16"):
        plugin("bf16", gradients="bf61")


def test_auto_emulates_without_a_gpu_and_never_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert plugin("fp8_current_scaling").emulated is not gpu


def test_unknown_names_are_errors() -> None:
    with pytest.raises(UserError, match="fp8_block'\nDid you mean fp8_blockwise"):
        plugin("fp8_block")
    with pytest.raises(UserError, match="fp8_backend = 'emulated'\nDid you mean emulate"):
        plugin("fp8_blockwise", fp8_backend="emulated")


def start(precision: str, backend: str = "auto", seq_length: int = 64, rank: int = 0) -> None:
    """What a run does before it builds the model."""
    from nemotron_h.architecture.definition import Expect, ModelDefinition
    from nemotron_h.training.callbacks.gemm_table import GemmTable

    definition = ModelDefinition(
        name="small",
        pattern="M-M-M-",
        hidden_size=64,
        ffn_hidden_size=96,
        mamba_num_heads=16,
        mamba_head_dim=16,
        mamba_num_groups=2,
        mamba_state_dim=16,
        conv_kernel=4,
        vocab_size=512,
        expect=Expect(3, 0, 3, 0),
    )
    trainer = SimpleNamespace(
        precision_plugin=plugin(precision, fp8_backend=backend),
        strategy=SimpleNamespace(tensor_model_parallel_size=1, context_parallel_size=1, sequence_parallel=False),
        datamodule=SimpleNamespace(seq_length=seq_length, micro_batch_size=1),
        world_size=1,
        is_global_zero=rank == 0,
    )
    GemmTable().setup(
        trainer, SimpleNamespace(config=SimpleNamespace(definitions=lambda: {"model": definition})), "fit"
    )


def test_the_table_is_printed_once_and_for_fp8_only(capsys: pytest.CaptureFixture) -> None:
    start("fp8_current_scaling")
    lines = capsys.readouterr().out.splitlines()
    assert sum(" FP8 " in line and "E4M3 weights and activations, E5M2 gradients" in line for line in lines) == 4
    assert sum(" BF16 " in line and ("first 2 layers" in line or "last 2 layers" in line) for line in lines) == 8
    assert any("output_layer" in line and "64 x 64 x 512" in line for line in lines)
    start("bf16")
    start("fp8_current_scaling", rank=1)
    assert not capsys.readouterr().out


def test_what_cannot_run_is_refused_before_the_model_is_built() -> None:
    with pytest.raises(UserError, match=r"60 .* multiple of 16"):
        start("fp8_current_scaling", seq_length=60)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="fp8_backend=te needs a GPU"):
            start("fp8_current_scaling", "te")
