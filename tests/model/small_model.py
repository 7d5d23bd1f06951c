"""A small model with weights and inputs at scale 1, so that an error in any part shows in the output."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nemotron_h.schema.multipliers import MultipliersSchema

VOCABULARY = 300  # padded to 384


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max |a - b| / max |b|."""
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def small_config(groups: int = 2, pattern: str = "M-M*-M-", dtype: torch.dtype = torch.float32, **changes):
    """A `NemotronHConfig` of small shapes; attention width is not the hidden size, and heads share keys."""
    from nemotron_h.model.module import NemotronHConfig

    return NemotronHConfig(
        **{
            "definition_name": "small",
            "hybrid_override_pattern": pattern,
            "hidden_size": 48,
            "ffn_hidden_size": 80,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "kv_channels": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,  # a norm over the 8 channels of a smaller group is ill-conditioned in any float32
            "mamba_num_groups": groups,
            "mamba_state_dim": 16,
            "vocab_size": VOCABULARY,
            "seq_length": 128,
            "params_dtype": dtype,
            "pipeline_dtype": dtype,
            "bf16": False,
            **changes,
        }
    )


#: none is 1, and no two products of a branch are equal
MULTIPLIERS = {
    "embedding": 1.3,
    "head": 0.9,
    "attention_in": 0.95,
    "key": 1.2,
    "attention_out": 0.6,
    "ssm_in": 1.25,
    "ssm_out": 0.5,
    "ssm_z": 0.7,
    "ssm_x": 1.1,
    "ssm_b": 0.85,
    "ssm_c": 1.4,
    "ssm_dt": 0.65,
    "ffn_gate": 1.15,
    "ffn_down": 1.35,
}


#: 6 experts, of which a token passes 2
EXPERTS = {
    "num_experts": 6,
    "experts_per_token": 2,
    "expert_hidden_size": 40,
    "shared_expert_hidden_size": 64,
    "expert_scaling": 1.5,
    "balance_loss": 0.0,
}


#: as Llama 3.1's, of lengths that 75 tokens tell apart: of a head's 8 pairs 3 stay, 3 are blended and 2 slowed
SCALED = {
    "rope_scaling_factor": 4.0,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "rope_original_length": 64,
}
#: what the attention of dense Transformers has beside two projections
DENSE = {"add_qkv_bias": True, "qk_layernorm": True, "share_embeddings_and_output_weights": True, **SCALED}


def pure_config(symbols: str, **changes):
    """A small Transformer with rotary positions (`*-`), Mamba-2 alone (`M`), Falcon-H1 (`PS`), Llama's layers with all
    of `DENSE` (`*S`), a hybrid with experts in place of FFNs (`E`), or one with linear layers (`L`); widths that it
    lacks are left out.
    """
    if symbols == "E":
        return small_config(pattern="MEM*EME", **{**EXPERTS, "ffn_hidden_size": 0, **changes})
    if symbols == "L":
        return small_config(pattern="M-ML*-L", family="pruned", **changes)
    if symbols == "PS":
        rotary = {"position_embedding_type": "rope", "rotary_base": 100, "rotary_percent": 1.0}
        return small_config(
            pattern="PSPS", family="falcon_h1", **{"multipliers": MultipliersSchema(**MULTIPLIERS), **rotary, **changes}
        )
    mamba = ("mamba_num_heads", "mamba_head_dim", "mamba_num_groups", "mamba_state_dim", "conv_kernel")
    if symbols == "M":
        absent = ("num_attention_heads", "num_query_groups", "kv_channels", "ffn_hidden_size")
        return small_config(pattern="MMM", family="mamba2", **dict.fromkeys(absent, 0), **changes)
    if symbols == "*S":
        rotary = {"position_embedding_type": "rope", "rotary_base": 100, "rotary_percent": 1.0}
        return small_config(pattern="*S*S", family="llama", **{**dict.fromkeys(mamba, 0), **rotary, **DENSE, **changes})
    rotary = {"position_embedding_type": "rope", "rotary_base": 100, "rotary_percent": 0.5, **changes}
    return small_config(pattern="*-*-", family="transformer", **{**dict.fromkeys(mamba, 0), **rotary})


def small_model(config, seed: int = 0):
    """The Megatron model of `config` on one rank, with weights from `scale_one`."""
    model = config.configure_model(None).to(config.params_dtype)
    biases = {name: buffer for name, buffer in model.named_buffers() if name.endswith("expert_bias")}
    scale_one({**dict(model.named_parameters()), **biases}, seed)
    if config.share_embeddings_and_output_weights:
        model.embedding.word_embeddings.weight.data /= math.sqrt(config.hidden_size)  # as an output matrix has it
    return model


@torch.no_grad()
def scale_one(parameters: dict[str, Tensor], seed: int) -> None:
    """Draw weights that keep activations at scale 1, with norms, decays and step sizes spread. The same values,
    rounded, in any dtype.
    """
    g = torch.Generator().manual_seed(seed)
    for name, parameter in parameters.items():
        shape = parameter.shape
        normal = torch.randn(shape, dtype=torch.float64, generator=g)
        uniform = torch.rand(shape, dtype=torch.float64, generator=g)
        if name.endswith("A_log"):
            value = torch.log(0.05 + 4 * uniform**2)  # decays per unit of time from exp(-0.05) to exp(-4)
        elif name.endswith("dt_bias"):
            value = -4 + 5 * uniform  # softplus: steps from 0.02 to 1.3
        elif name.endswith("expert_bias"):
            value = 0.2 * normal  # about the spread of scores
        elif name.endswith("norm.weight"):
            value = 0.5 + uniform
        elif name.endswith("conv1d.weight"):
            value = normal / math.sqrt(shape[-1])
        elif parameter.dim() == 1 or "embedding" in name:  # D, biases; rows of the embedding
            value = normal
        else:
            value = normal / math.sqrt(shape[-1])
        parameter.copy_(value)


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random ids, int64 [batch, length]."""
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
