"""The kinds of blocks at run time: a line for each."""

from __future__ import annotations

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.model.blocks.attention import RunningAttention
from nemotron_h.model.blocks.experts import RunningExperts
from nemotron_h.model.blocks.ffn import RunningFFN
from nemotron_h.model.blocks.linear import RunningLinear
from nemotron_h.model.blocks.mamba import RunningMamba
from nemotron_h.model.blocks.parallel import RunningParallel
from nemotron_h.model.blocks.running import Running
from nemotron_h.model.blocks.swiglu import RunningSwiGLU
from nemotron_h.model.blocks.vision_attention import RunningVisionAttention
from nemotron_h.model.blocks.vision_ffn import RunningVisionFFN

#: letter in a pattern -> how it runs
RUNNING: dict[str, type[Running]] = {
    running.kind.letter: running
    for running in (
        RunningMamba,
        RunningAttention,
        RunningFFN,
        RunningParallel,
        RunningSwiGLU,
        RunningExperts,
        RunningLinear,
    )
}
#: the same of an image encoder's layers
VISION_RUNNING: dict[str, type[Running]] = {
    running.kind.letter: running for running in (RunningVisionAttention, RunningVisionFFN)
}


def running_layers(definition: ModelDefinition) -> list[Running]:
    """Return the layers of a model as they run."""
    return [RUNNING[block.letter](block, definition.norm_epsilon) for block in definition.blocks]
