"""On a GPU: documents of one row stay apart on the engine's stack. The last token of a document changes, and not a bit
of the others' logits, losses and gradients does; a packed document is what it is alone, within bfloat16.

`python tests/gpu/test_packed_documents.py` prints what it measures; pytest runs that as a process of its own, because
kernels are asked to add in a fixed order before they are imported: otherwise gradients differ between two runs of one
input. Without a GPU the script tries itself on the plain stack.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("MAMBA_DETERMINISTIC", "1")
    os.environ.setdefault("CAUSAL_CONV1D_DETERMINISTIC", "1")
    os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")

import torch

try:
    import pytest

    pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
except ImportError:
    pytest = None  # type: ignore[assignment]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTH, ROWS = 384, 2
ONE_OF_EACH, ATTENTION = "M-M*-", "*-"
RECOMPUTE = {"recompute_mamba": "layer", "recompute_attention": "layer", "recompute_ffn": "layer"}
#: of the layers
MATRICES = ["in_proj", "out_proj", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
#: name -> pattern, precision, whether adapters are trained, other settings
MODELS: dict[str, tuple[str, str, bool, dict[str, Any]]] = {
    "attention": (ATTENTION, "bf16", False, {}),
    "attention, heads of 128": (ATTENTION, "bf16", False, {"kv_channels": 128, "num_query_groups": 1}),
    "hybrid": (ONE_OF_EACH, "bf16", False, {}),
    "hybrid, recomputed": (ONE_OF_EACH, "bf16", False, RECOMPUTE),
    "hybrid, LoRA": (ONE_OF_EACH, "bf16", True, {}),
    "attention, rotary": (
        ATTENTION,
        "bf16",
        False,
        {"position_embedding_type": "rope", "rotary_base": 10_000, "rotary_percent": 0.5},
    ),
}
#: a tensor of FP8 has one scale, which every token's value enters: documents are as far apart as that allows
FP8 = {
    "hybrid, fp8_current_scaling": (ONE_OF_EACH, "fp8_current_scaling", False, {}),
    "hybrid, fp8_blockwise": (ONE_OF_EACH, "fp8_blockwise", False, {}),
}
EVERY = range(1, 257)  # every offset in two tiles of 128 tokens
EDGES = (1, 2, 17, 63, 64, 65, 127, 128, 129, 256)


def start(tensor: int = 1) -> None:
    """Join the tensor-parallel ranks; through gloo where they share a GPU, which NCCL refuses."""
    from nemotron_h.platform import cpu, quiet

    quiet.hush()
    cpu.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    if not torch.distributed.is_initialized():
        rank = int(os.environ.setdefault("RANK", "0"))
        os.environ.setdefault("WORLD_SIZE", "1")
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29567")
        gpus = torch.cuda.device_count() if DEVICE == "cuda" else 0
        if gpus:
            torch.cuda.set_device(rank % gpus)
        torch.distributed.init_process_group("nccl" if gpus >= tensor else "gloo")
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor)
        model_parallel_cuda_manual_seed(1)


def model(pattern: str, precision: str, adapted: bool, changes: dict[str, Any], **layout: Any) -> torch.nn.Module:
    """A small model of a pattern under a precision plugin, in training."""
    from megatron.core.transformer.module import Float16Module
    from nemo.lightning.pytorch.plugins.mixed_precision import update_config_with_dtype_overrides

    from nemotron_h.model import adapters, init
    from nemotron_h.model.module import NemotronHConfig
    from nemotron_h.precision.plugins import plugin
    from nemotron_h.schema.recipe import AdapterSchema

    values: dict[str, Any] = {
        "definition_name": "gpu",
        "family": "transformer" if pattern == ATTENTION else "nemotron_h",
        "hybrid_override_pattern": pattern,
        "hidden_size": 256,
        "ffn_hidden_size": 512,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 64,
        "mamba_num_heads": 16,
        "mamba_head_dim": 32,
        "mamba_num_groups": 2,
        "mamba_state_dim": 128,
        "vocab_size": 512,
        "seq_length": LENGTH,
        "init_method_std": 0.06,
        "fuse_weight_gradients": False,  # there is no gradient buffer without Megatron's DDP
        "gradient_accumulation_fusion": False,
        "adapter": AdapterSchema("lora", 8, 16.0, 0.0, MATRICES) if adapted else None,
    }
    config = NemotronHConfig(**{**values, **changes, **layout})
    backend = "te" if precision.startswith("fp8") else "auto"
    config = update_config_with_dtype_overrides(plugin(precision, 0, backend).dtype_config, config)
    built = config.configure_model(None).to(DEVICE)
    for name, layer in adapters.adapted(built):
        init.fill(layer.adapter.b, name, init.normal(0.06), 7)
    return (built if precision == "fp32" else Float16Module(config, built)).train()


def tokens(length: int = LENGTH) -> torch.Tensor:
    """Random ids, int64 [rows, length + 1]."""
    rng = torch.Generator(DEVICE).manual_seed(3)
    return torch.randint(512, (ROWS, length + 1), device=DEVICE, generator=rng)


def seq_idx(first: int) -> torch.Tensor:
    """int32 [rows, length]: the first row's first document has `first` tokens; the rest is of 100 and less."""
    positions = torch.arange(LENGTH, device=DEVICE)
    rows = [torch.where(positions < first, 0, 1 + (positions - first) // 100), positions // 100]
    return torch.stack(rows).int()


def results(built: torch.nn.Module, ids: torch.Tensor, documents: torch.Tensor | None, learnt: torch.Tensor) -> dict:
    """Losses and logits of the learnt positions, and the gradients of these losses' sum, in float32."""
    built.zero_grad(set_to_none=True)
    inputs = {"input_ids": ids[:, :-1], "position_ids": None, "attention_mask": None, "seq_idx": documents}
    losses = built(**inputs, labels=ids[:, 1:].contiguous())
    (losses * learnt).sum().backward()
    found = {f"gradient of {n}": p.grad.float() for n, p in built.named_parameters() if p.grad is not None}
    with torch.no_grad():
        logits = built(**inputs)
    return {"losses": losses.detach()[learnt], "logits": logits[learnt], **found}


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest difference over the largest value: of losses, of logits, and of the gradient that differs most."""
    worst: dict[str, float] = {}
    for name, value in a.items():
        relative = float((value - b[name]).abs().max() / b[name].abs().max().clamp(min=1e-30))
        kind = "gradients" if name.startswith("gradient") else name
        worst[kind] = max(worst.get(kind, 0.0), relative)
    return worst


def leaks(built: torch.nn.Module, offsets: Any, packed: bool = True) -> tuple[dict[str, float], dict[str, float]]:
    """Change the last token of the first document at every offset: the largest difference of all else, and that of
    the same input run twice. With `packed` false the model is not told of documents, so that the probe can fail.
    """
    leak: dict[str, float] = {}
    noise: dict[str, float] = {}
    ids = tokens()
    for first in offsets:
        documents = seq_idx(first)
        learnt = torch.ones_like(documents, dtype=torch.bool)
        learnt[0, :first] = False
        changed = ids.clone()
        changed[0, first - 1] = (changed[0, first - 1] + 256) % 512
        given = documents if packed else None
        before = results(built, ids, given, learnt)
        for worst, other in ((noise, ids), (leak, changed)):
            for name, value in difference(results(built, other, given, learnt), before).items():
                worst[name] = max(worst.get(name, 0.0), value)
    return leak, noise


def said(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1e}" for name, value in values.items())


def check_apart(names: dict[str, Any], offsets: Any, **layout: Any) -> None:
    """No bit of another document moves, and it would if the model were not told of documents."""
    wrong: list[str] = []
    for name, settings in names.items():
        begun = time.perf_counter()
        built = model(*settings, **layout)
        leak, noise = leaks(built, offsets(name) if callable(offsets) else offsets)
        untold, _ = leaks(built, (65,), packed=False)
        print(
            f"{name}: A changed: {said(leak)}; run twice: {said(noise)}; untold: {said(untold)}; "
            f"{time.perf_counter() - begun:.0f} s",
            flush=True,
        )
        wrong += [name] * (leak["losses"] > 0 or leak["logits"] > 0 or leak["gradients"] > 4 * noise["gradients"])
        assert untold["logits"] > 1e-2, (name, untold)
    assert not wrong, wrong


def another_document_changes_nothing() -> None:
    start()
    check_apart(MODELS, lambda name: EVERY if name == "attention" else EDGES)


def fp8_keeps_documents_apart() -> None:
    """Within what one scale for all tokens lets through: far below what a document moves in a plain row."""
    start()
    for name, settings in FP8.items():
        built = model(*settings)
        leak, noise = leaks(built, EDGES)
        untold, _ = leaks(built, (65,), packed=False)
        print(f"{name}: A changed: {said(leak)}; run twice: {said(noise)}; untold: {said(untold)}", flush=True)
        assert noise["logits"] == 0.0, noise
        assert leak["logits"] < 0.2 * untold["logits"], (leak, untold)


def a_packed_document_is_what_it_is_alone() -> None:
    """Logits; bfloat16 rounds both sides, in other tiles. FP8 takes multiples of 16 tokens, and scales others alone."""
    start()
    ids = tokens()
    documents = torch.stack([torch.arange(LENGTH, device=DEVICE) // size for size in (96, 160)]).int()
    for name, settings in {**MODELS, **FP8}.items():
        built, worst = model(*settings), 0.0
        with torch.no_grad():
            packed = built(input_ids=ids[:, :-1], position_ids=None, attention_mask=None, seq_idx=documents)
            for row in range(ROWS):
                for number in documents[row].unique().tolist():
                    place = documents[row] == number
                    alone = built(input_ids=ids[row : row + 1, :-1][:, place], position_ids=None, attention_mask=None)
                    worst = max(worst, float((packed[row, place] - alone[0]).abs().max() / alone.abs().max()))
        print(f"{name}: packed and alone differ by {worst:.1e} of the largest logit", flush=True)
        assert worst < (0.25 if settings[1].startswith("fp8") else 3e-2), (name, worst)


def other_kernels_keep_documents_apart_or_refuse() -> None:
    """Try what Transformer Engine falls back to where cuDNN's kernels are switched off, and in float32."""
    start()
    cases = {"unfused": ({"attention_backend": "unfused"}, "bf16"), "float32": ({}, "fp32")}
    for name, (changes, precision) in cases.items():
        for kernels in (
            "FLASH",
            "FUSED",
            "UNFUSED",
        ):  # megatron-core sets them by the backend, and refuses to change them
            os.environ.pop(f"NVTE_{kernels}_ATTN", None)
        built = model(ATTENTION, precision, False, changes)
        try:
            leak, _ = leaks(built, EDGES)
        except (ValueError, RuntimeError, AssertionError) as error:
            print(f"{name}: refused: {type(error).__name__}: {str(error).splitlines()[0][:120]}", flush=True)
            continue
        print(f"{name}: A changed: {said(leak)}", flush=True)
        assert not any(leak.values()), (name, leak)


def long_row(length: int = 524_288) -> None:
    """Forward and backward of the 8B's attention and FFN over one row of eight documents."""
    start()
    wide = {
        "hidden_size": 4096,
        "ffn_hidden_size": 21504,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "kv_channels": 128,
        "seq_length": length,
        "recompute_ffn": "layer",
        "recompute_attention": "layer",
    }
    built = model(ATTENTION, "bf16", False, wide)
    ids = torch.randint(512, (1, length + 1), device=DEVICE)
    documents = (torch.arange(length, device=DEVICE) // (length // 8)).int()[None]
    labels = ids[:, 1:].contiguous()
    begun = time.perf_counter()
    losses = built(input_ids=ids[:, :-1], position_ids=None, attention_mask=None, labels=labels, seq_idx=documents)
    losses.mean().backward()
    assert torch.isfinite(losses).all()
    seconds, peak = time.perf_counter() - begun, torch.cuda.max_memory_allocated() / 2**30
    print(f"{length:,} tokens in eight documents: {seconds:.1f} s, peak {peak:.1f} GiB", flush=True)


def run_again(*command: str, **environment: str) -> None:
    """Run this file with other arguments in a process of its own, and print what it prints."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    environment = {**inherited, "MASTER_PORT": "29568", **environment}  # this process has the other port
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=400, env=environment)
    print(done.stdout[-3000:], flush=True)
    assert done.returncode == 0, done.stderr[-3000:]


def long_rows_need_no_mask() -> None:
    """A mask alone would be 256 GiB. A fixed order of sums is not asked for: cuDNN's needs room for all scores."""
    run_again(__file__, "--long", NVTE_ALLOW_NONDETERMINISTIC_ALGO="1")


def two_tensor_parallel_ranks() -> None:
    """The same probe on two ranks."""
    run_again("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, "--rank")


def rank_of_two() -> None:
    """Check on each of two tensor-parallel ranks, with and without sequence parallelism."""
    start(2)
    shared = torch.distributed.get_backend() == "gloo"
    names = {name: MODELS[name] for name in ("attention", "hybrid")}
    for sequence in (False,) if shared else (False, True):
        layout = {"tensor_model_parallel_size": 2, "sequence_parallel": sequence}
        print(f"tensor 2, sequence parallelism {sequence}, {torch.distributed.get_backend()}", flush=True)
        check_apart(names, EDGES, **layout)


CHECKS = (
    another_document_changes_nothing,
    a_packed_document_is_what_it_is_alone,
    fp8_keeps_documents_apart,
    other_kernels_keep_documents_apart_or_refuse,
    long_rows_need_no_mask,
    two_tensor_parallel_ranks,
)


def test_documents_stay_apart() -> None:
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=800)
    print(done.stdout, flush=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def main() -> int:
    """Run every check, also after one has failed; 1 where one has."""
    failed = 0
    for check in CHECKS:
        begun = time.perf_counter()
        try:
            check()
        except Exception as error:
            failed += 1
            print(f"FAILED {check.__name__}: {type(error).__name__}: {str(error)[:1500]}", flush=True)
        print(f"{check.__name__}: {time.perf_counter() - begun:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    if "--rank" in sys.argv:
        rank_of_two()
    elif "--long" in sys.argv:
        long_row()
    else:
        sys.exit(main())
