"""On a GPU: mamba-ssm's kernels and Transformer Engine's layers compute what the plain PyTorch path does.

Also runs as a script where pytest is not installed: `python tests/gpu/test_gpu.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

try:
    import pytest

    pytestmark = [
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    ]
except ImportError:
    pytest = None  # type: ignore[assignment]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-30))


def start() -> None:
    """One rank on one GPU."""
    from nemotron_h.platform import quiet

    quiet.hush()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()  # in this process: no port that another one could have
        torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
    torch.backends.cuda.matmul.allow_tf32 = False


def op_cases() -> Iterator[tuple[str, Any, Any, list[torch.Tensor], dict[str, Any]]]:
    """Name, kernel, reference, differentiable inputs, options."""
    from nemotron_h.ops.select import Ops, select_ops

    kernels, plain = select_ops(), Ops()
    assert kernels.origin != plain.origin, f"no kernels were selected: {kernels.origin}"
    rng = torch.Generator(device="cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=rng)

    batch, length, heads, groups, state = 2, 300, 8, 2, 128
    documents = (torch.arange(length, device="cuda")[None] // 77).int().expand(batch, -1).contiguous()
    # heads of 80 are those of Nano 4B, 9B and 12B
    scans = (("scan", 64, None), ("scan with documents", 64, documents), ("scan of 80", 80, documents))
    for name, width, seq_idx in scans:
        inputs = [
            normal(batch, length, heads, width),
            normal(batch, length, heads),
            -torch.rand(heads, device="cuda", generator=rng) - 0.1,
            normal(batch, length, groups, state),
            normal(batch, length, groups, state),
            normal(heads),
            normal(heads),
        ]

        def scan(op: Any, x: Any, dt: Any, a: Any, b: Any, c: Any, d: Any, bias: Any, **options: Any) -> torch.Tensor:
            return op.ssd(x, dt, a, b, c, D=d, dt_bias=bias, **options)

        yield name, (scan, kernels), (scan, plain), inputs, {"seq_idx": seq_idx}
    channels = 512
    for name, seq_idx in (("convolution", None), ("convolution with documents", documents)):

        def conv(op: Any, x: Any, w: Any, b: Any, **options: Any) -> torch.Tensor:
            return op.conv1d(x, w, b, **options)

        yield (
            name,
            (conv, kernels),
            (conv, plain),
            [normal(batch, length, channels), normal(channels, 4), normal(channels)],
            {"seq_idx": seq_idx},
        )

    def norm(op: Any, y: Any, z: Any, w: Any, **options: Any) -> torch.Tensor:
        return op.gated_rms_norm(y, z, w, **options)

    yield (
        "gated norm",
        (norm, kernels),
        (norm, plain),
        [normal(batch, length, channels), normal(batch, length, channels), normal(channels)],
        {"group_size": channels // groups, "eps": 1e-5},
    )


def test_kernels_equal_plain_operations() -> None:
    start()
    for name, (kernel, k_ops), (plain, p_ops), inputs, options in op_cases():
        results = []
        for call, ops in ((kernel, k_ops), (plain, p_ops)):
            leaves = [t.detach().clone().requires_grad_() for t in inputs]
            out = call(ops, *leaves, **options)
            out.backward(torch.sin(torch.arange(out.numel(), device="cuda").view_as(out)))
            results.append([out.detach(), *(leaf.grad for leaf in leaves)])
        # the kernels multiply float32 in TF32
        errors = [relative(a, b) for a, b in zip(*results, strict=True)]
        print(f"{name}: output {errors[0]:.1e}, gradients {max(errors[1:]):.1e}", flush=True)
        assert max(errors) < 2e-2, (name, errors)


#: of the hybrid's layers
MATRICES = ["in_proj", "out_proj", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
#: Falcon-H1's layers in place of the hybrid's
FALCON = {
    "hybrid_override_pattern": "PSPS",
    "family": "falcon_h1",
    "position_embedding_type": "rope",
    "rotary_base": 10_000,
    "rotary_percent": 1.0,
    "multipliers": {"embedding": 1.3, "key": 1.2, "ssm_in": 1.25, "ssm_out": 0.5, "ssm_b": 0.85, "ffn_gate": 1.15},
}

#: experts, one after the other and in groups, in place of FFNs
EXPERTS = {
    "hybrid_override_pattern": "MEM*E",
    "num_experts": 8,
    "experts_per_token": 2,
    "expert_hidden_size": 128,
    "shared_expert_hidden_size": 256,
    "expert_scaling": 2.5,
}

#: a Transformer with what Llama, Qwen2 and Qwen3 have, in place of the hybrid
LLAMA = {
    "hybrid_override_pattern": "*S*S",
    "family": "pruned",
    "position_embedding_type": "rope",
    "rotary_base": 10_000,
    "rotary_percent": 1.0,
    "add_qkv_bias": True,
    "qk_layernorm": True,
    "share_embeddings_and_output_weights": True,
}


#: an image encoder and a projector in front of the hybrid; tiles of 64 pixels are 4 image tokens
VISION = {
    "vision": {
        "name": "gpu",
        "num_layers": 2,
        "hidden_size": 128,
        "ffn_hidden_size": 256,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 16,
        "qkv_bias": True,
        "qk_norm": True,
        "init_std": 0.06,
    },
}


def model(spec: Any, dtype: torch.dtype, **changes: Any) -> torch.nn.Module:
    """A small model; equal seeds give equal weights whatever the layers' classes."""
    from megatron.core.transformer.module import Float16Module

    from nemotron_h.model.module import NemotronHConfig

    widths = {
        "hybrid_override_pattern": "M-M*-",
        "hidden_size": 256,
        "ffn_hidden_size": 512,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 64,
        "mamba_num_heads": 8,
        "mamba_head_dim": 64,
        "mamba_num_groups": 2,
        "mamba_state_dim": 128,
    }
    config = NemotronHConfig(
        definition_name="gpu",
        **{**widths, **changes},
        vocab_size=512,
        seq_length=256,
        init_method_std=0.06,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        mamba_stack_spec=spec,
        fuse_weight_gradients=False,  # there is no gradient buffer without Megatron's DDP
        gradient_accumulation_fusion=False,
    )
    built = config.configure_model(None).cuda()
    return Float16Module(config, built) if dtype == torch.bfloat16 else built


def test_transformer_engine_layers_equal_plain_layers() -> None:
    start()
    from megatron.core.extensions import transformer_engine as te
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    from nemotron_h.model import layers
    from nemotron_h.model.core_attention import ScaledDotProductAttention

    assert te.HAVE_TE, "Transformer Engine does not import"

    def plain() -> Any:
        parts = layers.Parts(ColumnParallelLinear, RowParallelLinear, ScaledDotProductAttention, norm=layers.RMSNorm)
        return layers.ModuleSpec(module=layers.NemotronHStack, submodules=parts)

    tokens = torch.randint(512, (2, 257), device="cuda", generator=torch.Generator("cuda").manual_seed(3))
    places = torch.zeros(2, 256, dtype=torch.bool, device="cuda")
    places[0, 3:7] = places[1, 100:104] = True
    tiles = torch.randint(256, (2, 3, 64, 64), device="cuda", generator=torch.Generator("cuda").manual_seed(4)).byte()
    for changes in ({}, FALCON, EXPERTS, LLAMA, VISION):
        losses = {}
        images = {"tiles": tiles, "image_mask": places} if "vision" in changes else {}
        for dtype in (torch.float32, torch.bfloat16):
            for name, spec in (("engine", layers.stack_spec), ("plain", plain)):
                if name == "engine" and dtype == torch.float32:
                    continue  # its attention has no float32 kernel
                built = model(spec, dtype, **changes)
                loss = built(
                    input_ids=tokens[:, :-1],
                    position_ids=None,
                    attention_mask=None,
                    labels=tokens[:, 1:].contiguous(),
                    **images,
                ).mean()
                loss.backward()
                square = sum(float(p.grad.float().square().sum()) for p in built.parameters())
                losses[name, dtype] = (float(loss), square**0.5)
                print(f"{name} {dtype}: loss {float(loss):.5f}, gradient norm {square**0.5:.5f}", flush=True)
        for key in (("engine", torch.bfloat16), ("plain", torch.bfloat16)):
            for value, expected in zip(losses[key], losses["plain", torch.float32], strict=True):
                assert abs(value - expected) < 2e-2 * abs(expected), losses


#: a Transformer of narrow heads in place of the hybrid
TRANSFORMER = {
    "hybrid_override_pattern": "*-*-",
    "family": "transformer",
    "position_embedding_type": "rope",
    "rotary_base": 10_000,
    "rotary_percent": 1.0,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "kv_channels": 32,
}


def test_no_value_is_read_before_it_is_written() -> None:
    """All memory that the allocator has is NaN before each pass, so a kernel that reads what nothing wrote shows."""
    start()
    from nemotron_h.model import layers

    rng = torch.Generator("cuda").manual_seed(3)
    for name, changes in (
        ("hybrid", {}),
        ("transformer", TRANSFORMER),
        ("parallel", FALCON),
        ("experts", EXPERTS),
        ("llama", LLAMA),
    ):
        built = model(layers.stack_spec, torch.bfloat16, **changes).train()
        for rows, length in ((16, 512), (2, 256), (3, 300)):
            tokens = torch.randint(512, (rows, length + 1), device="cuda", generator=rng)
            for turn in range(3):
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
                blocks = [torch.full((size,), torch.nan, device="cuda") for size in (1 << 28, *[1 << 16] * 200)]
                del blocks
                loss = built(
                    input_ids=tokens[:, :-1], position_ids=None, attention_mask=None, labels=tokens[:, 1:].contiguous()
                ).mean()
                loss.backward()
                wrong = [key for key, p in built.named_parameters() if not p.grad.isfinite().all()]
                if not loss.isfinite() or wrong:
                    raise AssertionError((name, rows, length, turn, float(loss), wrong))
                built.zero_grad()
        print(f"{name}: nothing is read before it is written", flush=True)


def test_adapters_on_transformer_engine_equal_plain_layers() -> None:
    """Its layers with a norm hand the normalised input to the adapter, its layers of all experts give each its rows,
    and frozen weights get no gradient.
    """
    start()
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    from nemotron_h.model import adapters, init, layers
    from nemotron_h.model.core_attention import ScaledDotProductAttention
    from nemotron_h.schema.recipe import AdapterSchema

    def plain() -> Any:
        parts = layers.Parts(ColumnParallelLinear, RowParallelLinear, ScaledDotProductAttention, norm=layers.RMSNorm)
        return layers.ModuleSpec(module=layers.NemotronHStack, submodules=parts)

    tokens = torch.randint(512, (2, 257), device="cuda", generator=torch.Generator("cuda").manual_seed(3))
    routed = ["in_proj", "experts.linear_fc1", "experts.linear_fc2", "shared_experts.linear_fc1"]
    cases = [(kind, *of) for kind in ("lora", "dora") for of in (({}, MATRICES), (EXPERTS, routed))]
    for kind, changes, targets in cases:
        found = {}
        for name, spec, dtype in (
            ("engine", layers.stack_spec, torch.bfloat16),
            ("plain", plain, torch.bfloat16),
            ("exact", plain, torch.float32),
        ):
            built = model(spec, dtype, adapter=AdapterSchema(kind, 8, 16.0, 0.0, targets), **changes).train()
            every = [(f"{at}.{key}", each) for at, own in adapters.adapted(built) for _, key, each in own.pairs()]
            for place, adapter in every:
                # the same numbers under both wrappers, in both dtypes, of experts in a group and one by one
                alike = re.sub(r"local_experts\.(\d+)\.(\w+)\.adapter", r"\2.adapter.\1", place)
                init.fill(adapter.b, alike.removeprefix("module."), init.normal(0.06), 7)
            losses = built(
                input_ids=tokens[:, :-1], position_ids=None, attention_mask=None, labels=tokens[:, 1:].contiguous()
            )
            losses.mean().backward()
            trained = [p for p in built.parameters() if p.requires_grad]
            assert all(p.grad is None for p in built.parameters() if not p.requires_grad)
            assert len(trained) == (2 if kind == "lora" else 3) * len(every)
            norm = sum(float(p.grad.float().square().sum()) for p in trained) ** 0.5
            found[name] = (float(losses.mean()), norm)
            print(f"{kind} {name}: loss {found[name][0]:.5f}, gradient norm {norm:.5f}", flush=True)
        for name in ("engine", "plain"):
            for value, expected in zip(found[name], found["exact"], strict=True):
                assert abs(value - expected) < 2e-2 * abs(expected), found


def loss_and_gradients(built: torch.nn.Module, fused: bool, documents: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Of one batch of two rows, with the fused mixer or the separate kernels."""
    from nemotron_h.model.mixer import NemotronHMixer

    mixers = [module for module in built.modules() if isinstance(module, NemotronHMixer)]
    assert all(mixer.fused for mixer in mixers), "the fused kernel was not chosen"
    for mixer in mixers:
        mixer.fused = fused
    tokens = torch.randint(512, (2, 257), device="cuda", generator=torch.Generator("cuda").manual_seed(3))
    seq_idx = (torch.arange(256, device="cuda")[None] // 77).int().expand(2, -1).contiguous() if documents else None
    losses = built(
        input_ids=tokens[:, :-1],
        position_ids=None,
        attention_mask=None,
        labels=tokens[:, 1:].contiguous(),
        seq_idx=seq_idx,
    )
    losses.mean().backward()
    return float(losses.mean()), {name: p.grad.float() for name, p in built.named_parameters()}


def test_fused_mixer_equals_separate_kernels() -> None:
    """Float32 through plain layers, so that what differs is the mixer; two rows, whose strides the kernel must take."""
    start()
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    from nemotron_h.model import layers
    from nemotron_h.model.core_attention import ScaledDotProductAttention

    def plain() -> Any:
        parts = layers.Parts(ColumnParallelLinear, RowParallelLinear, ScaledDotProductAttention, norm=layers.RMSNorm)
        return layers.ModuleSpec(module=layers.NemotronHStack, submodules=parts)

    falcon = {**FALCON, "mamba_norm": False}
    for documents, changes in ((False, {}), (True, {}), (False, FALCON), (True, falcon)):
        (loss, gradients), (loss_apart, apart) = (
            loss_and_gradients(model(plain, torch.float32, **changes).train(), fused, documents)
            for fused in (True, False)
        )
        # the kernels multiply float32 in TF32
        errors = {name: relative(gradients[name], apart[name]) for name in apart}
        worst = max(errors, key=lambda name: errors[name])
        print(f"fused mixer, documents {documents}: loss {loss:.6f} and {loss_apart:.6f}, {worst} {errors[worst]:.1e}")
        assert abs(loss - loss_apart) < 1e-3
        assert errors[worst] < 2e-2, errors


def test_weight_gradient_is_added_to_the_float32_buffer() -> None:
    start()
    from megatron.core.tensor_parallel import layers

    from nemotron_h.platform import megatron_fixes

    megatron_fixes.install()
    rng = torch.Generator("cuda").manual_seed(5)
    inputs, gradient = (torch.randn(4096, n, device="cuda", generator=rng).bfloat16() for n in (256, 512))
    buffer = torch.randn(512, 256, device="cuda", generator=rng)
    expected = buffer.double() + gradient.double().t() @ inputs.double()
    layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(inputs, gradient, buffer)
    error = relative(buffer, expected)
    print(f"weight gradient added in float32: {error:.1e}", flush=True)
    assert error < 1e-4  # a sum that was rounded to bfloat16 would differ by 1e-3 and more


def test_squared_relu_equals_torch() -> None:
    from nemotron_h.ops.activation import _SquaredReLU, squared_relu

    x = torch.randn(64, 512, device="cuda")
    results = []
    for function in (squared_relu, _SquaredReLU.apply):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        y.backward(torch.sin(torch.arange(y.numel(), device="cuda").view_as(y)))
        results.append((y.detach(), leaf.grad))
    assert relative(results[0][0], results[1][0]) < 1e-6
    assert relative(results[0][1], results[1][1]) < 1e-6


if __name__ == "__main__":
    import sys
    import traceback

    failed = []
    for check in (
        test_no_value_is_read_before_it_is_written,
        test_kernels_equal_plain_operations,
        test_transformer_engine_layers_equal_plain_layers,
        test_adapters_on_transformer_engine_equal_plain_layers,
        test_fused_mixer_equals_separate_kernels,
        test_weight_gradient_is_added_to_the_float32_buffer,
        test_squared_relu_equals_torch,
    ):
        try:
            check()
        except Exception:
            traceback.print_exc()
            failed.append(check.__name__)
    print("failed:", ", ".join(failed)) if failed else print("GPU tests passed")
    sys.exit(bool(failed))
