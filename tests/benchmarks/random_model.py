"""A generation model of any definition with random weights at scale 1, drawn where it runs; no checkpoint is needed."""

from __future__ import annotations

import torch
from torch import Tensor

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.inference.model import GenerationModel, column_major, lay_out
from nemotron_h.model.blocks.attention import AttentionWeights
from nemotron_h.model.blocks.ffn import FFNWeights
from nemotron_h.model.blocks.mamba import MambaWeights


def random_model(definition: ModelDefinition, dtype: torch.dtype, device: str, seed: int = 0) -> GenerationModel:
    """Matrices with standard deviation 1 / sqrt(inputs), norms between 0.5 and 1.5, decays from short to long."""
    d = definition
    rng = torch.Generator(device=device).manual_seed(seed)
    exact = torch.float64 if dtype == torch.float64 else torch.float32

    def matrix(outputs: int, inputs: int) -> Tensor:
        return torch.empty(outputs, inputs, dtype=dtype, device=device).normal_(0, inputs**-0.5, generator=rng)

    def vector(size: int, low: float, high: float, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=device).uniform_(low, high, generator=rng).to(kind)

    def norm(size: int = d.hidden_size) -> Tensor:
        return vector(size, 0.5, 1.5)

    def layer(symbol: str) -> MambaWeights | AttentionWeights | FFNWeights:
        if symbol == "M":
            return MambaWeights(
                norm(),
                matrix(d.block("M").in_proj_size, d.hidden_size),
                matrix(d.block("M").conv_channels, d.conv_kernel),
                vector(d.block("M").conv_channels, -1, 1),
                -vector(d.mamba_num_heads, 0.05, 4, exact),
                vector(d.mamba_num_heads, -1, 1, exact),
                vector(d.mamba_num_heads, -4, 1, exact),
                norm(d.block("M").d_inner),
                matrix(d.hidden_size, d.block("M").d_inner),
            )
        if symbol == "*":
            queries = d.num_attention_heads * d.head_dim
            return AttentionWeights(
                norm(),
                matrix(queries + 2 * d.num_query_groups * d.head_dim, d.hidden_size),
                matrix(d.hidden_size, queries),
            )
        return FFNWeights(norm(), matrix(d.ffn_hidden_size, d.hidden_size), matrix(d.hidden_size, d.ffn_hidden_size))

    embedding = torch.empty(d.vocab_size, d.hidden_size, dtype=dtype, device=device).normal_(generator=rng)
    layers = [layer(symbol) for symbol in d.pattern]
    for weights in layers:
        lay_out(weights)
    return GenerationModel(d, embedding, layers, norm(), column_major(matrix(d.vocab_size, d.hidden_size)))
