"""Read the weights of a checkpoint for a comparison."""

from __future__ import annotations

from pathlib import Path

import torch

from nemotron_h.checkpoint.definition import read_definition
from nemotron_h.checkpoint.reader import WeightFile, read_record

PADDED = ("embedding.word_embeddings.weight", "output_layer.weight")


def weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return every tensor in its stored dtype, without the vocabulary's padding.

    Args:
        checkpoint: a folder as `find_checkpoint` returns it.
    Errors:
        UserError: it is damaged.
    """
    file = WeightFile(checkpoint)
    tensors = {name: torch.empty(shape, dtype=file.dtypes[name]) for name, shape in file.shapes.items()}
    file.read(tensors)
    rows = read_definition(read_record(checkpoint), str(checkpoint)).vocab_size
    return {name: tensor[:rows] if name in PADDED else tensor for name, tensor in tensors.items()}


def differing(one: Path, other: Path) -> list[str]:
    """Return the names of the first checkpoint's tensors that the second lacks or does not have bit for bit.

    An imported one also has the norms by the names that Transformer Engine's layers give them. Arguments as of
    `weights_of`.
    """
    first, second = weights_of(one), weights_of(other)
    return [name for name in first if name not in second or not torch.equal(first[name], second[name])]
