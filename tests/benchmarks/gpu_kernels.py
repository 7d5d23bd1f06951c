"""Where a GPU step's time goes: kernels by part of the model, each against the least time that the part can take."""

from __future__ import annotations

import re

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.planning.flops import flops_per_token

#: a part and the kernel names that belong to it; the first that matches counts
PARTS: dict[str, str] = {
    "attention": r"sdpa|flash|fmha|fused_attn|flash_fprop|flash_bprop",
    "SSD scan": r"_chunk_|_state_passing|_bmm_chunk|chunk_scan|chunk_state|chunk_cumsum",
    "convolution": r"causal_conv1d",
    "cross entropy": r"cross_entropy|online_softmax|element_mul_kernel|log_softmax|predicted_logits|nll_loss",
    "squared ReLU": r"srelu|_relu|relu_|threshold|pow_tensor",
    "FP8 casts": r"amax|cast_transpose|quantize|compute_scale|transpose_kernel|cast_kernel|block_scal",
    "optimizer": r"multi_tensor|[Aa]dam|l2norm|L2Norm",
    "norms": r"_layer_norm_(fwd|bwd)|rmsnorm|layernorm|ln_(fwd|bwd)|normalization",
    "GEMM": r"nvjet|gemm|cutlass|xmma|cublas|sm90_|gemv|splitK",
    "embedding": r"embedding|index_put|indexing_backward|indexSelect|sort|radix",
    "memset and copies": r"[Mm]emset|[Mm]emcpy|FillFunctor|copy|CatArray",
    "additions and other elementwise": r"elementwise|triton_|CUDAFunctor",
    "reductions": r"reduce",
    "communication": r"nccl",
}
_COMPILED = {part: re.compile(pattern) for part, pattern in PARTS.items()}
OTHER = "other"


def part_of(kernel: str) -> str:
    """The part that a kernel belongs to, by its name."""
    return next((part for part, pattern in _COMPILED.items() if pattern.search(kernel)), OTHER)


def floors(
    definition: ModelDefinition, seq_length: int, micro_batches: int, fp8: bool, peaks: dict[str, float]
) -> dict[str, float]:
    """Seconds that each part of a step must take at least: its operations at peak, or its bytes at full bandwidth.

    Bytes count every tensor once per pass that needs it (bfloat16; optimizer and gradient sums in float32).

    Args:
        peaks: `bf16` and `fp8` in operations per second, `bandwidth` in bytes per second.
    """
    d, tokens = definition, seq_length * micro_batches
    flops = flops_per_token(d, seq_length, training=True)
    mamba, ffn = d.count("M"), d.count("-")
    layers, states = d.num_layers, 2 * d.mamba_num_groups * d.mamba_state_dim
    linear = flops.linear
    edge = 0.0
    if fp8:  # two layers at each end stay in BF16 (paper 2.3)
        kept = [*d.pattern[:2], *d.pattern[-2:]]
        edge = flops.mamba_projections * kept.count("M") / max(mamba, 1) + flops.ffn * kept.count("-") / max(ffn, 1)
    fast = peaks["fp8"] if fp8 else peaks["bf16"]

    def bytes_at(values_per_token: float, size: int = 2) -> float:
        return values_per_token * size * tokens / peaks["bandwidth"]

    return {
        "GEMM": tokens * ((linear - edge) / fast + (edge + flops.head) / peaks["bf16"]),
        "SSD scan": max(tokens * flops.ssd / peaks["bf16"], bytes_at(mamba * (5 * d.block("M").d_inner + 3 * states))),
        "convolution": bytes_at(mamba * 5 * d.block("M").conv_channels),
        "attention": tokens * flops.attention_core / peaks["bf16"],
        "norms": bytes_at((layers + 1) * 5 * d.hidden_size + mamba * 8 * d.block("M").d_inner),
        "squared ReLU": bytes_at(ffn * 5 * d.ffn_hidden_size),
        "cross entropy": bytes_at(2 * d.vocab_size),
        "additions and other elementwise": bytes_at(layers * 4 * d.hidden_size),
        # Adam reads gradient, weight, two moments; writes the last three and the bfloat16 weight; the norm reads again
        "optimizer": d.parameters * (30 + 4) / peaks["bandwidth"],
        "memset and copies": d.parameters * 4 / peaks["bandwidth"],
    }
