"""A `GenerationModel` with weights at scale 1, made without Megatron."""

from __future__ import annotations

import torch
from small_model import scale_one

from nemotron_h.architecture.blocks.families import family_of
from nemotron_h.architecture.definition import Expect, ModelDefinition
from nemotron_h.inference.model import GenerationModel
from nemotron_h.model.blocks.attention import AttentionWeights
from nemotron_h.model.blocks.experts import ExpertsWeights
from nemotron_h.model.blocks.ffn import FFNWeights
from nemotron_h.model.blocks.mamba import MambaWeights

WIDTHS = {
    "M": {
        "mamba_num_heads": 16,
        "mamba_head_dim": 16,
        "mamba_num_groups": 2,
        "mamba_state_dim": 16,
        "conv_kernel": 4,
    },
    "*": {"num_attention_heads": 4, "num_query_groups": 2, "head_dim": 16},
    "-": {"ffn_hidden_size": 80},
    "E": {
        "num_experts": 6,
        "experts_per_token": 2,
        "expert_hidden_size": 40,
        "shared_expert_hidden_size": 64,
        "expert_scaling": 1.5,
    },
}


def definition(pattern: str = "M-M*-M-", **changes) -> ModelDefinition:
    """A small definition; attention is as wide as the hidden size is not."""
    widths = {key: value for symbol, values in WIDTHS.items() if symbol in pattern for key, value in values.items()}
    made = ModelDefinition(
        **{
            "name": "small",
            "pattern": pattern,
            "family": family_of(pattern),
            "hidden_size": 48,
            "vocab_size": 300,
            "expect": Expect(0, 0, 0, 0),
            **widths,
            **changes,
        }
    )
    made.validate_structure("small")
    return made


def model(d: ModelDefinition, dtype: torch.dtype = torch.float64, seed: int = 0) -> GenerationModel:
    """Weights from `scale_one`."""
    parameters: dict[str, torch.Tensor] = {}

    def take(name: str, *shape: int) -> torch.Tensor:
        parameters[name] = torch.empty(shape, dtype=dtype)
        return parameters[name]

    def layer(n: int, symbol: str):
        norm = take(f"{n}.norm.weight", d.hidden_size)
        b = d.blocks[n]
        if symbol == "M":
            return MambaWeights(
                norm,
                take(f"{n}.in_proj", b.in_proj_size, d.hidden_size),
                take(f"{n}.conv1d.weight", b.conv_channels, b.conv_kernel),
                take(f"{n}.conv1d.bias", b.conv_channels),
                take(f"{n}.A_log", b.mamba_num_heads),
                take(f"{n}.D", b.mamba_num_heads),
                take(f"{n}.dt_bias", b.mamba_num_heads),
                take(f"{n}.gated.norm.weight", b.d_inner),
                take(f"{n}.out_proj", d.hidden_size, b.d_inner),
            )
        if symbol == "*":
            queries = b.num_attention_heads * b.head_dim
            rows = queries + 2 * b.num_query_groups * b.head_dim
            return AttentionWeights(
                norm, take(f"{n}.qkv", rows, d.hidden_size), take(f"{n}.proj", d.hidden_size, queries)
            )
        if symbol == "E":
            up, down = (b.num_experts, b.expert_hidden_size, d.hidden_size), (d.hidden_size, b.expert_hidden_size)
            return ExpertsWeights(
                norm,
                take(f"{n}.gate", b.num_experts, d.hidden_size),
                take(f"{n}.expert_bias", b.num_experts),
                take(f"{n}.up", *up),
                take(f"{n}.down", b.num_experts, *down),
                take(f"{n}.shared_up", b.shared_expert_hidden_size, d.hidden_size),
                take(f"{n}.shared_down", d.hidden_size, b.shared_expert_hidden_size),
            )
        return FFNWeights(
            norm, take(f"{n}.up", b.ffn_hidden_size, d.hidden_size), take(f"{n}.down", d.hidden_size, b.ffn_hidden_size)
        )

    embedding = take("embedding", d.vocab_size, d.hidden_size)
    layers = [layer(n, symbol) for n, symbol in enumerate(d.pattern)]
    final = take("final.norm.weight", d.hidden_size)
    made = GenerationModel(d, embedding, layers, final, take("output", d.vocab_size, d.hidden_size))
    scale_one(parameters, seed)
    for weights in layers:
        if isinstance(weights, MambaWeights):
            weights.A = -weights.A.exp()
    return made
