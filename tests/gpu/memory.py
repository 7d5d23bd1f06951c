"""Peak memory of the 8B's layers on one GPU against `nemotron_h.planning.memory`, as JSON.

`python tests/gpu/memory.py` takes the 8B's definition with a pattern cut to fit one GPU of 80 GB (the 8B's ratio of
layers), trains each setting three steps in BF16 as a run does (Megatron's DDP and distributed optimizer, NeMo's
trainer left out) and prints, per setting, what torch's allocator held at most in the third step, what was planned, and
both by part, and the TFLOP/s of the shortest step. Settings that need more than 80 GB, and the model that reads images,
run where there is room (`LARGE`); `--only` takes those with a word in their names. `--small` runs the same on small
widths, on the CPU too, where only the plan and the program are of use. pytest runs it on a GPU and wants the peak
within 10 %.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

try:
    import pytest

    pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
except ImportError:
    pytest = None  # type: ignore[assignment]

PATTERN = "M-M-M-M*-M-M-"  # 6 : 6 : 1, the 8B's first layers
LAYERS = {"recompute_mamba": "layer", "recompute_ffn": "layer", "recompute_attention": "layer"}
#: name -> sequence length, micro-batch and recompute settings
SETTINGS: dict[str, dict[str, Any]] = {
    "8192": {"seq_length": 8192},
    "8192, FFN activations recomputed": {"seq_length": 8192, "recompute_ffn": "activation"},
    "8192, all layers recomputed": {"seq_length": 8192, **LAYERS},
    "4096": {"seq_length": 4096},
    "2 x 4096": {"seq_length": 4096, "micro_batch": 2},
    "8192, documents": {"seq_length": 8192, "documents": True},
    "2 x 4096, documents": {"seq_length": 4096, "micro_batch": 2, "documents": True},
}
#: on a GPU of 141 GB; more tokens a rank are refused (`architecture.context.ADDRESSED`)
LARGE: dict[str, dict[str, Any]] = {
    "32768, all layers recomputed, logits in chunks": {"seq_length": 32768, **LAYERS, "recompute_logits": "chunks"},
    "65536, FFNs recomputed, logits in chunks": {
        "seq_length": 65536,
        "recompute_ffn": "layer",
        "recompute_logits": "chunks",
    },
    "65536, all layers recomputed, logits in chunks": {"seq_length": 65536, **LAYERS, "recompute_logits": "chunks"},
    "65536, all layers recomputed, inputs offloaded, logits in chunks": {
        "seq_length": 65536,
        **LAYERS,
        "recompute_logits": "chunks",
        "recompute_offload": True,
    },
    "images, 4096": {"seq_length": 4096},
    "images, 2 x 4096": {"seq_length": 4096, "micro_batch": 2},
    "images, 2 x 4096, encoder recomputed": {"seq_length": 4096, "micro_batch": 2, "recompute_vision": "layer"},
}
WIDTHS = (
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "mamba_num_heads",
    "mamba_head_dim",
    "mamba_num_groups",
    "mamba_state_dim",
    "vocab_size",
    "conv_kernel",
)


def definition(small: bool, images: bool = False) -> Any:
    """The 8B with fewer layers, or small widths; with an image encoder in front."""
    from nemotron_h.architecture.definition import definition_from_dict
    from nemotron_h.recipe.compose import compose

    encoder = [f"vision=internvit_{'tiny' if small else '300m'}"] if images else []
    values = dataclasses.asdict(compose(f"nemotron_h_{'tiny' if small else '8b'}/sft", encoder).model)
    return definition_from_dict({**values, "pattern": PATTERN}, "memory", count=True)


def start() -> None:
    """One rank, on the GPU where there is one."""
    from nemotron_h.platform import cpu, quiet

    quiet.hush()
    cpu.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    if not torch.distributed.is_initialized():
        backend, store = "nccl" if torch.cuda.is_available() else "gloo", torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)


def training_step(model: Any, setting: dict[str, Any]) -> Callable[[], float]:
    """The model under a setting, with its optimizer; a step of it returns the loss."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.module import Float16Module

    from nemotron_h.model.module import NemotronHConfig
    from nemotron_h.platform import megatron_fixes

    megatron_fixes.install()
    length, batch = setting["seq_length"], setting.get("micro_batch", 1)
    config = NemotronHConfig(
        definition_name=model.name,
        hybrid_override_pattern=model.pattern,
        kv_channels=model.head_dim,
        **{name: getattr(model, name) for name in WIDTHS},
        vision=model.vision,
        projector=model.projector,
        **{key: value for key, value in setting.items() if key.startswith("recompute_")},
        seq_length=length,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        bf16=True,
    )
    built = config.configure_model(None)
    module = Float16Module(config, built.cuda() if torch.cuda.is_available() else built)
    ddp = DistributedDataParallelConfig(
        check_for_nan_in_grad=True, grad_reduce_in_fp32=True, use_distributed_optimizer=True
    )
    parallel = DistributedDataParallel(config, ddp, module)
    config.finalize_model_grads_func = finalize_model_grads
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-4,
            clip_grad=1.0,
            bf16=True,
            params_dtype=torch.bfloat16,
            use_distributed_optimizer=True,
        ),
        [parallel],
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def mean(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = losses.mean()
        return loss, {"loss": loss.detach().clone()}

    def forward(iterator: Iterator[torch.Tensor], net: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
        tokens = next(iterator)
        documents = None
        if setting.get("documents"):  # of 700 tokens and the rest
            documents = (torch.arange(length, device=device) // 700).int().repeat(batch, 1)
        images = {}
        if model.encoder:  # as many as there is place for
            side, count = model.vision.image_size, model.encoder.tiles(length)
            places = torch.arange(length, device=device) < count * model.encoder.tokens_per_tile
            images["image_mask"] = places.repeat(batch, 1)
            images["tiles"] = torch.randint(256, (count * batch, 3, side, side), device=device, dtype=torch.uint8)
        return net(input_ids=tokens[:, :-1], labels=tokens[:, 1:].contiguous(), seq_idx=documents, **images), mean

    def step() -> float:
        parallel.zero_grad_buffer()
        optimizer.zero_grad()
        out = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter([torch.randint(model.vocab_size, (batch, length + 1), device=device)]),
            model=[parallel],
            num_microbatches=1,
            seq_length=length,
            micro_batch_size=batch,
            forward_only=False,
        )
        optimizer.step()
        return float(out[0]["loss"])

    return step


def measure(model: Any, setting: dict[str, Any]) -> dict[str, Any]:
    """Bytes of a setting: planned by part, and on a GPU measured between steps and at the peak of the third."""
    from nemotron_h.architecture.rank import Layout
    from nemotron_h.planning.flops import flops_per_token
    from nemotron_h.planning.memory import largest_stage

    gpu = torch.cuda.is_available()
    layout = Layout(precision="bf16", backend="gpu" if gpu else "cpu", **setting)
    plan = largest_stage(model, layout)
    result: dict[str, Any] = {
        "planned": {"parts": plan.parts(), "states": plan.states, "peak": plan.peak, "at": plan.at},
    }
    base = torch.cuda.memory_allocated() if gpu else 0  # workspaces of the settings before stay
    step = training_step(model, setting)
    losses, seconds = [step()], []
    for _ in range(2):  # a loss is read: the step has ended
        if gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            between = torch.cuda.memory_allocated()
        began = time.perf_counter()
        losses.append(step())
        if gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    tokens, flops = layout.seq_length * layout.micro_batch, flops_per_token(model, layout.seq_length).total
    result["tokens/s"], result["TFLOP/s"] = tokens / min(seconds), tokens / min(seconds) * flops / 1e12
    if gpu:
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        result["measured"] = {
            "before": base,
            "states": between,
            "peak": peak,
            "reserved": torch.cuda.max_memory_reserved(),
            "device_total": torch.cuda.mem_get_info()[1],
            "device_used": torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0],
        }
        result["planned / measured"] = {
            "states": plan.states / between,
            "peak": plan.peak / peak,
            "above states": (plan.peak - plan.states) / (peak - between),
        }
    result["losses"] = losses
    del step
    gc.collect()
    if gpu:
        torch.cuda.empty_cache()
    return result


def run(small: bool, only: str = "") -> dict[str, Any]:
    """Settings with a word in their names; one that fails (out of memory, say) reports its error, the others go on."""
    start()
    from megatron.core.extensions.transformer_engine import HAVE_TE

    from nemotron_h.ops.select import select_ops

    model = definition(small)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "ops": select_ops().origin,
        "transformer_engine": HAVE_TE,
        "pattern": model.pattern,
        "parameters": model.parameters,
        "settings": {},
    }
    large = {} if torch.cuda.is_available() and torch.cuda.mem_get_info()[1] < 120e9 else LARGE
    for name, setting in (SETTINGS | large).items():
        if only not in name:
            continue
        model = definition(small, "images" in name)
        shrunk = {**setting, "seq_length": setting["seq_length"] // 16} if small else setting
        try:
            report["settings"][name] = measure(model, shrunk)
        except torch.cuda.OutOfMemoryError as error:
            report["settings"][name] = {"error": str(error)}
            gc.collect()
            torch.cuda.empty_cache()
    return report


def test_planned_peak_within_ten_percent() -> None:
    for name, setting in run(small=False)["settings"].items():
        assert "error" not in setting, (name, setting)
        assert abs(setting["planned / measured"]["peak"] - 1) < 0.1, (name, setting)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="small widths and sequences, to try the program")
    parser.add_argument("--only", default="", metavar="WORD", help="settings with this in their names")
    args = parser.parse_args()
    print(json.dumps(run(args.small, args.only), indent=1))
