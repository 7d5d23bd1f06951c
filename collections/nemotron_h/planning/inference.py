"""Memory of inference: weights at a stated number of bytes each, and the states of every sequence. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from nemotron_h.model.definition import ATTENTION, MAMBA, ModelDefinition

#: bytes per value: FP4 has one 8-bit scale per 16 values (4.5 bits), which makes the paper's 29.5 GiB of the 56B
BYTES = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0, "fp4": 0.5625}


@dataclass(frozen=True)
class InferenceMemory:
    """Bytes on one device that holds the whole model.

    Attributes:
        weights: of the model.
        kv_cache: keys and values of the attention layers, for every sequence.
        ssm_states: states of the Mamba-2 layers, whatever the context.
        conv_states: the last inputs of their convolutions.
    """

    weights: float
    kv_cache: float
    ssm_states: float
    conv_states: float

    @property
    def cache(self) -> float:
        """All but the weights."""
        return self.kv_cache + self.ssm_states + self.conv_states

    @property
    def total(self) -> float:
        """All parts."""
        return self.weights + self.cache


def kv_bytes_per_token(definition: ModelDefinition, kv_bytes: float = BYTES["bf16"]) -> float:
    """Keys and values that one token adds."""
    d = definition
    return d.count(ATTENTION) * 2 * d.num_query_groups * d.head_dim * kv_bytes


def inference_memory(
    definition: ModelDefinition,
    context: int,
    sequences: int = 1,
    weight_bytes: float = BYTES["bf16"],
    kv_bytes: float = BYTES["bf16"],
    ssm_bytes: float = BYTES["fp32"],
    conv_bytes: float = BYTES["bf16"],
) -> InferenceMemory:
    """Memory of a model and its sequences.

    Args:
        context: tokens of each sequence, prompt and answer.
        sequences: sequences that are held at once.
        weight_bytes, kv_bytes, ssm_bytes, conv_bytes: bytes per value; see `BYTES`.
    """
    d = definition
    mamba = d.count(MAMBA)
    return InferenceMemory(
        weights=d.parameters * weight_bytes,
        kv_cache=sequences * context * kv_bytes_per_token(d, kv_bytes),
        ssm_states=sequences * mamba * d.d_inner * d.mamba_state_dim * ssm_bytes if mamba else 0,
        conv_states=sequences * mamba * (d.conv_kernel - 1) * d.conv_channels * conv_bytes if mamba else 0,
    )
