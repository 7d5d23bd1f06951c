"""Read checkpoints of machines whose layers are others.

Transformer Engine, on GPUs, holds the norm before a layer inside of the projection that follows; plain layers, on CPUs,
hold it beside the projection. A run's checkpoint has the names of the layers that wrote it. Reading it into the other
ones asks for its names; the optimizer's states, whose names are made of those of the weights, follow.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import nn

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.model.having import having


def other_names(definition: ModelDefinition) -> dict[str, str]:
    """Return the name of each norm before a layer -> its name in a checkpoint of the other layers, both ways."""
    rows = [row for n, block in enumerate(definition.blocks) for row in block.tensors(f"decoder.layers.{n}.", "")]
    pairs = [(name, row.fused) for row in rows if row.fused for name in row.ours]
    return dict([*pairs, *((fused, name) for name, fused in pairs)])


def reading(stored: Collection[str], models: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """Have the models' `sharded_state_dict` use a checkpoint's names inside the block.

    Args:
        stored: names of the checkpoint's tensors.
        models: modules that hold the Megatron models, at any depth.
    """
    return having("stored", stored, models)


def ask_for(state: Mapping[str, Any], stored: Collection[str], names: Mapping[str, str]) -> None:
    """Give tensors that a checkpoint lacks the other name of theirs that it has, IN PLACE.

    Args:
        state: megatron-core's sharded state of a model.
        stored: names in the checkpoint.
        names: of `other_names`.
    """
    for tensor in state.values():
        if isinstance(tensor, ShardedTensor) and tensor.key not in stored:
            at = max(tensor.key.find("decoder."), 0)
            other = tensor.key[:at] + names.get(tensor.key[at:], "")
            if other in stored:
                tensor.key = other
