"""Initial weights of an image encoder and a projector, of their names alone: Megatron's modules and files agree."""

from __future__ import annotations

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.architecture.vision import PROJECTOR
from nemotron_h.model import init

#: matrix -> the axis that tensor-parallel ranks split
AXES = {"linear_qkv.weight": 0, "linear_fc1.weight": 0, "linear_proj.weight": 1, "linear_fc2.weight": 1}
#: of a layer, that write to the residual stream
_RESIDUAL = ("linear_proj.weight", "linear_fc2.weight")


def constant(value: float) -> init.Distribution:
    """Return a function that fills a tensor with a number."""
    return lambda tensor, generator: tensor.fill_(value)


def distribution(name: str, definition: ModelDefinition) -> init.Distribution:
    """Return what a weight is drawn from: norms are 1, biases 0, LayerScale and deviations those of the definition.

    Args:
        name: of the weight, as `Encoder.tensors` has it.
    """
    widths, encoder = definition.vision, definition.encoder
    if name.endswith("layer_scale"):
        return constant(widths.layer_scale)
    if name.endswith("norm.weight"):
        return constant(1.0)
    if name.endswith(".bias"):
        return constant(0.0)
    if name.startswith(PROJECTOR):
        return init.normal(definition.init_std)
    return init.normal(widths.init_std / (len(encoder.blocks) ** 0.5 if name.endswith(_RESIDUAL) else 1))
