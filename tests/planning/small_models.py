"""Small models of each family: keyword arguments of `NemotronHConfig`, and the definition they make."""

from __future__ import annotations

from typing import Any

from nemotron_h.architecture.definition import Expect, ModelDefinition

_ATTENTION = {"num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 64}
_MAMBA = {"mamba_num_heads": 16, "mamba_head_dim": 32, "mamba_num_groups": 2, "mamba_state_dim": 64, "conv_kernel": 4}
_FFN = {"ffn_hidden_size": 1344}

#: matrices of their layers
MATRICES = ["in_proj", "out_proj", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]

#: family -> the model; vocabularies are multiples of what Megatron pads to with two tensor-parallel ranks
MODELS: dict[str, dict[str, Any]] = {
    "hybrid": {
        "hybrid_override_pattern": "M-M-M*-M-M-M-",
        "hidden_size": 256,
        "vocab_size": 8192,
        **_ATTENTION,
        **_MAMBA,
        **_FFN,
    },
    "mamba": {
        "family": "mamba2",
        "hybrid_override_pattern": "MMMMMM",
        "hidden_size": 256,
        "vocab_size": 512,
        **_MAMBA,
    },
    "transformer": {
        "family": "transformer",
        "hybrid_override_pattern": "*-*-*-*-",
        "hidden_size": 256,
        "vocab_size": 512,
        **_ATTENTION,
        **_FFN,
    },
    "falcon_h1": {
        "family": "falcon_h1",
        "hybrid_override_pattern": "PSPSPS",
        "hidden_size": 256,
        "vocab_size": 512,
        "multipliers": {"rule": "falcon_h1"},
        "position_embedding_type": "rope",
        "rotary_base": 100_000,
        "rotary_percent": 1.0,
        **_ATTENTION,
        **_MAMBA,
        "ffn_hidden_size": 768,
    },
    "llama": {
        "family": "llama",
        "hybrid_override_pattern": "*S*S*S*S",
        "hidden_size": 256,
        "vocab_size": 512,
        "add_qkv_bias": True,
        "qk_layernorm": True,
        "share_embeddings_and_output_weights": True,
        "position_embedding_type": "rope",
        "rotary_base": 100_000,
        "rotary_percent": 1.0,
        **_ATTENTION,
        "ffn_hidden_size": 768,
    },
    "linear": {
        "family": "pruned",
        "hybrid_override_pattern": "M*-LLLL",
        "hidden_size": 256,
        "vocab_size": 512,
        **_ATTENTION,
        **_MAMBA,
        **_FFN,
    },
    "experts": {
        "hybrid_override_pattern": "MEM*EMEME",
        "hidden_size": 256,
        "vocab_size": 512,
        "num_experts": 8,
        "experts_per_token": 2,
        "expert_hidden_size": 192,
        "shared_expert_hidden_size": 384,
        "expert_scaling": 2.5,
        **_ATTENTION,
        **_MAMBA,
    },
}


def as_definition(model: dict[str, Any]) -> ModelDefinition:
    """The definition of these keyword arguments; `recompute_*` are no part of it."""
    own = {key: value for key, value in model.items() if not key.startswith("recompute_")}
    renamed = {
        "hybrid_override_pattern": "pattern",
        "kv_channels": "head_dim",
        "position_embedding_type": "position_embedding",
        "rotary_base": "rope_base",
        "rotary_percent": "rope_percent",
        "add_qkv_bias": "qkv_bias",
        "qk_layernorm": "qk_norm",
        "share_embeddings_and_output_weights": "tied_embeddings",
    }
    return ModelDefinition(
        name="small",
        expect=Expect(),
        **{renamed.get(key, key): value for key, value in own.items()},
    )
