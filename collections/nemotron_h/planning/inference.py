"""Memory of inference: weights at a stated number of bytes each, and the states of every sequence. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from nemotron_h.architecture.definition import ATTENTION, FFN, MAMBA, ModelDefinition
from nemotron_h.core.sizes import BYTES


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
        """Return all but the weights."""
        return self.kv_cache + self.ssm_states + self.conv_states

    @property
    def total(self) -> float:
        """Return the sum of all parts."""
        return self.weights + self.cache


@dataclass(frozen=True)
class Serving:
    """State of generation besides the model, and its bytes per value; see `BYTES`.

    Attributes:
        context: tokens of each sequence, prompt and answer.
        sequences: sequences that are held at once.
        weight_bytes, kv_bytes, ssm_bytes, conv_bytes: bytes per value.
    """

    context: int
    sequences: int = 1
    weight_bytes: float = BYTES["bf16"]
    kv_bytes: float = BYTES["bf16"]
    ssm_bytes: float = BYTES["fp32"]
    conv_bytes: float = BYTES["bf16"]


def inference_memory(definition: ModelDefinition, serving: Serving) -> InferenceMemory:
    """Return the memory of a model and its sequences."""
    parts = memory_by_layer(definition, serving)
    of_layers = [parts[symbol] for symbol in definition.pattern]
    return InferenceMemory(
        weights=definition.parameters * serving.weight_bytes,
        **{key: sum(getattr(part, key) for part in of_layers) for key in ("kv_cache", "ssm_states", "conv_states")},
    )


def memory_by_layer(definition: ModelDefinition, serving: Serving) -> dict[str, InferenceMemory]:
    """Return the memory of one layer of each type, by its letter, and under "" of what is outside of the layers.

    The model's memory is the sum over its layers, so that of another number of layers is a matter of arithmetic.
    """
    d, s = definition, serving
    keys = s.sequences * s.context * 2 * d.num_query_groups * d.head_dim * s.kv_bytes
    ssm = s.sequences * d.d_inner * d.mamba_state_dim * s.ssm_bytes
    conv = s.sequences * max(d.conv_kernel - 1, 0) * d.conv_channels * s.conv_bytes
    return {
        "": InferenceMemory(d.other_parameters * s.weight_bytes, 0, 0, 0),
        ATTENTION: InferenceMemory(d.layer_parameters(ATTENTION) * s.weight_bytes, keys, 0, 0),
        MAMBA: InferenceMemory(d.layer_parameters(MAMBA) * s.weight_bytes, 0, ssm, conv),
        FFN: InferenceMemory(d.layer_parameters(FFN) * s.weight_bytes, 0, 0, 0),
    }
