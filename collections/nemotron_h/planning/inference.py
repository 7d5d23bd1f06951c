"""Memory of inference: weights at a stated number of bytes each, and the states of every sequence. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from nemotron_h.architecture.blocks.block import Block
from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.core.units import BYTES


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
    parts = [layer_memory(block, serving) for block in definition.blocks]
    return InferenceMemory(
        weights=(definition.parameters + definition.vision_parameters) * serving.weight_bytes,
        **{key: sum(getattr(part, key) for part in parts) for key in ("kv_cache", "ssm_states", "conv_states")},
    )


def layer_memory(block: Block, serving: Serving) -> InferenceMemory:
    """Return the memory of one layer; the model's is the sum over its layers."""
    bytes_of = {"kv_cache": serving.kv_bytes, "ssm_states": serving.ssm_bytes, "conv_states": serving.conv_bytes}
    states = block.states(serving.context)
    sizes = {part: serving.sequences * states.get(part, 0) * size for part, size in bytes_of.items()}
    return InferenceMemory(block.parameters * serving.weight_bytes, **sizes)
