"""Every weight under both of its names: Megatron's checkpoint (`ours`) and Hugging Face's (`theirs`), whose type is
`falcon_h1` for a model of that family, one of the dense Transformers' for family `llama`, and `nemotron_h` for all
others.

One table serves both directions. The tensors of a row, concatenated along their first axis, are the same numbers on
both sides; only attention's queries, keys and values are in another order of rows, and Megatron's experts are one
tensor, stacked along an axis of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nemotron_h.architecture.blocks.block import Shape, Tensors
from nemotron_h.architecture.definition import ModelDefinition

#: Hugging Face's name of the output matrix, of all types
HF_HEAD = "lm_head.weight"


class Weight(Tensors):
    """A row of the table, with what PyTorch makes of it."""

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of this weight in a model of `dtype`."""
        return torch.float32 if self.exact else dtype

    def to_theirs(self, whole: Tensor) -> dict[str, Tensor]:
        """Reorder ours, concatenated along the first axis, and split them into theirs."""
        if self.stacked:
            whole = whole.flatten(0, 1)
        return _split(whole if self.order is None else whole[torch.from_numpy(self.order)], self.theirs)

    def to_ours(self, whole: Tensor) -> dict[str, Tensor]:
        """Reorder theirs, concatenated along the first axis, and split them into ours."""
        if self.stacked:
            whole = whole.unflatten(0, (len(self.theirs), -1))
        return _split(whole if self.order is None else whole[torch.from_numpy(self.order.argsort())], self.ours)


def _split(whole: Tensor, shapes: dict[str, Shape]) -> dict[str, Tensor]:
    return dict(zip(shapes, whole.split([shape[0] for shape in shapes.values()]), strict=True))


@dataclass(frozen=True)
class HfNames:
    """Names of a type of models beside those inside of its layers.

    Attributes:
        root: stands before all but the output layer's.
        embedding, final_norm: modules.
        blocks: layers of a pattern that are one layer there.
        modules: module of a layer by the blocks' name -> by the type's, where they differ.
    """

    root: str
    embedding: str
    final_norm: str
    blocks: int = 1
    modules: Mapping[str, str] = field(default_factory=dict)

    def weight(self, index: int, inside: str) -> str:
        """Return the name of a weight of a layer of the pattern; `inside` is the block's name of it."""
        module, _, rest = inside.partition(".")
        return f"{self.root}layers.{index // self.blocks}.{self.modules.get(module, module)}.{rest}"

    def inside(self, name: str) -> tuple[int, str]:
        """Return the number of the type's layer and the block's name of a weight inside of it."""
        number, _, inside = name.removeprefix(f"{self.root}layers.").partition(".")
        module, _, rest = inside.partition(".")
        own = {theirs: ours for ours, theirs in self.modules.items()}
        return int(number), f"{own.get(module, module)}.{rest}"


#: family -> names, where it has a type of its own
_OF_FAMILIES = {
    "falcon_h1": HfNames("model.", "embed_tokens", "final_layernorm", blocks=2),
    "llama": HfNames(
        "model.",
        "embed_tokens",
        "norm",
        blocks=2,
        modules={
            "norm": "input_layernorm",
            "mixer": "self_attn",
            "pre_ff_layernorm": "post_attention_layernorm",
            "feed_forward": "mlp",
        },
    ),
}
_OTHERS = HfNames("backbone.", "embeddings", "norm_f")


def hf_names(definition: ModelDefinition) -> HfNames:
    """Return the names of a model's type."""
    return _OF_FAMILIES.get(definition.family, _OTHERS)


def weights(definition: ModelDefinition) -> Iterator[Weight]:
    """Yield all weights of a model, in the order in which it applies them; those of encoder and projector are last."""
    names = hf_names(definition)
    vocabulary = (definition.vocab_size, definition.hidden_size)
    embedding = f"{names.root}{names.embedding}.weight"
    yield Weight({"embedding.word_embeddings.weight": vocabulary}, {embedding: vocabulary}, padded=True)
    for index, block in enumerate(definition.blocks):
        for row in block.tensors(f"decoder.layers.{index}.", ""):
            theirs = {names.weight(index, inside): shape for inside, shape in row.theirs.items()}
            yield Weight(**{**vars(row), "theirs": theirs})
    hidden = (definition.hidden_size,)
    yield Weight({"decoder.final_norm.weight": hidden}, {f"{names.root}{names.final_norm}.weight": hidden})
    if not definition.tied_embeddings:
        yield Weight({"output_layer.weight": vocabulary}, {HF_HEAD: vocabulary}, padded=True)
    if definition.encoder:
        yield from (Weight(**vars(row)) for row in definition.encoder.tensors())
