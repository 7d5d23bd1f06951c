"""On a GPU with FP8: the model's layers run in Transformer Engine's FP8 but those at the ends, and keep no state.

Also runs as a script where pytest is not installed: `python tests/gpu/test_fp8.py`.
"""

from __future__ import annotations

import torch

try:
    import pytest

    pytestmark = [
        pytest.mark.gpu,
        pytest.mark.skipif(
            not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
            reason="needs an NVIDIA GPU of compute capability 9.0 or higher",
        ),
    ]
except ImportError:
    pytest = None  # type: ignore[assignment]

PATTERN, EDGES = "M-M*-M-", 2
NAMES = ("in_proj", "out_proj", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


def model(precision: str, backend: str = "te", **changes: object) -> torch.nn.Module:
    """A small model under a precision plugin, with the weights of its seed."""
    from megatron.core.transformer.module import Float16Module
    from nemo.lightning.pytorch.plugins.mixed_precision import update_config_with_dtype_overrides

    from nemotron_h.model.module import NemotronHConfig
    from nemotron_h.precision.plugins import plugin

    config = NemotronHConfig(
        definition_name="gpu",
        hybrid_override_pattern=PATTERN,
        hidden_size=256,
        ffn_hidden_size=512,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=64,
        mamba_num_heads=16,
        mamba_head_dim=32,
        mamba_num_groups=2,
        mamba_state_dim=128,
        vocab_size=512,
        seq_length=256,
        init_method_std=0.06,
        fuse_weight_gradients=False,  # there is no gradient buffer here
        gradient_accumulation_fusion=False,
        **changes,
    )
    made = plugin(precision, EDGES, backend if precision.startswith("fp8") else "auto")
    config = update_config_with_dtype_overrides(made.dtype_config, config)
    return Float16Module(config, config.configure_model(None).cuda())


def step(built: torch.nn.Module) -> tuple[float, float]:
    """Loss and gradient norm of one batch."""
    tokens = torch.randint(512, (2, 257), device="cuda", generator=torch.Generator("cuda").manual_seed(3))
    built.train()
    loss = built(
        input_ids=tokens[:, :-1], position_ids=None, attention_mask=None, labels=tokens[:, 1:].contiguous()
    ).mean()
    loss.backward()
    square = sum(float(p.grad.float().square().sum()) for p in built.parameters() if p.grad is not None)
    return loss.item(), square**0.5


def start() -> None:
    """One rank on one GPU."""
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parent))
    from test_gpu import start as begin

    begin()


def watch(built: torch.nn.Module) -> list[tuple[int, bool, str]]:
    """(layer, whether FP8 is on, recipe), noted at each call of a linear layer from now on."""
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager as Manager

    seen: list[tuple[int, bool, str]] = []

    def note(number: int) -> None:
        seen.append((number, Manager.is_fp8_enabled(), type(Manager.get_fp8_recipe()).__name__))

    for number, layer in enumerate(built.module.decoder.layers):
        for name, module in layer.named_modules():
            if name.rsplit(".", 1)[-1] in NAMES:
                module.register_forward_pre_hook(lambda *_, n=number: note(n))
    return seen


def test_layers_run_in_fp8_but_those_at_the_ends() -> None:
    start()
    results = {"bf16": step(model("bf16"))}
    for precision in ("fp8_current_scaling", "fp8_blockwise"):
        for again in ({}, {"recompute_mamba": "layer", "recompute_attention": "layer", "recompute_ffn": "layer"}):
            built = model(precision, **again)
            seen = watch(built)
            name = f"{precision}{', recomputed' if again else ''}"
            results[name] = step(built)
            assert len(seen) == 2 * len(PATTERN) * (2 if again else 1), seen
            expected = "Float8CurrentScaling" if precision == "fp8_current_scaling" else "Float8BlockScaling"
            for number, enabled, recipe in seen:
                assert enabled is (EDGES <= number < len(PATTERN) - EDGES), (name, seen)
                assert not enabled or recipe == expected, (name, recipe)
            state = built.module.sharded_state_dict()
            assert not [key for key in state if "extra_state" in key]
            weights = {k: v for k, v in built.module.state_dict().items() if "extra_state" not in k}
            assert {v.dtype for v in weights.values()} <= {torch.bfloat16, torch.float32}
            built.module.load_state_dict(weights, strict=True)
            model("bf16").module.load_state_dict(weights, strict=True)
        results[f"{precision}, emulated"] = step(model(precision, "emulate"))
    for name, (loss, norm) in results.items():
        print(f"{name}: loss {loss:.5f}, gradient norm {norm:.5f}", flush=True)
    loss, norm = results["bf16"]
    for name, values in results.items():
        assert abs(values[0] - loss) < 1e-2 * loss, (name, results)
        assert abs(values[1] - norm) < 5e-2 * norm, (name, results)
    for precision in ("fp8_current_scaling", "fp8_blockwise"):
        assert results[precision] != results["bf16"], "FP8 is not on"


if __name__ == "__main__":
    test_layers_run_in_fp8_but_those_at_the_ends()
    print("FP8 GPU tests passed")
