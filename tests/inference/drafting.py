"""Small models of every kind of layer, with weights at scale 1, for tests of drafts."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "planning"))

from small_models import MODELS, as_definition

from nemotron_h.inference.layer_costs import random_model
from nemotron_h.inference.model import GenerationModel

#: little widths for what the model has of these
_WIDTHS = {
    "hidden_size": 32,
    "kv_channels": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_state_dim": 16,
    "ffn_hidden_size": 48,
    "num_experts": 4,
    "expert_hidden_size": 16,
    "shared_expert_hidden_size": 32,
}
KINDS = tuple(MODELS)


def tiny(kind: str, seed: int = 0, vocabulary: int = 64, dtype: torch.dtype = torch.float32) -> GenerationModel:
    """A random model of one of `MODELS`; the recurrence has decays from short to long."""
    changes = {key: width for key, width in _WIDTHS.items() if key in MODELS[kind]}
    definition = as_definition({**MODELS[kind], **changes, "vocab_size": vocabulary})
    model = random_model(definition, dtype, "cpu", seed)
    rng = torch.Generator().manual_seed(seed)
    for weights in model.layers:
        if hasattr(weights, "dt_bias"):
            uniform = torch.rand(2, len(weights.A), generator=rng)
            weights.A.copy_(-(0.05 + 4 * uniform[0] ** 2))
            weights.dt_bias.copy_(-4 + 5 * uniform[1])
    return model


def prompts(*lengths: int, vocabulary: int = 64, seed: int = 0) -> list[list[int]]:
    """Random tokens."""
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(vocabulary, (length,), generator=rng).tolist() for length in lengths]
