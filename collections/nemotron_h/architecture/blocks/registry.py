"""The kinds of blocks: a line for each."""

from __future__ import annotations

from nemotron_h.architecture.blocks.attention import Attention
from nemotron_h.architecture.blocks.block import Block
from nemotron_h.architecture.blocks.experts import Experts
from nemotron_h.architecture.blocks.ffn import FFN
from nemotron_h.architecture.blocks.linear import Linear
from nemotron_h.architecture.blocks.mamba import Mamba
from nemotron_h.architecture.blocks.parallel import Parallel
from nemotron_h.architecture.blocks.swiglu import SwiGLU
from nemotron_h.architecture.blocks.vision_attention import VisionAttention
from nemotron_h.architecture.blocks.vision_ffn import VisionFFN

#: letter in a pattern -> kind
KINDS: dict[str, type[Block]] = {
    kind.letter: kind for kind in (Mamba, Attention, FFN, Parallel, SwiGLU, Experts, Linear)
}
#: of an image encoder's layers, which have no letters in the model's pattern: one after the other, over and over
VISION_KINDS: tuple[type[Block], ...] = (VisionAttention, VisionFFN)


def kind_named(name: str) -> type[Block]:
    """Return the kind of a name."""
    return next(kind for kind in KINDS.values() if kind.name == name)
