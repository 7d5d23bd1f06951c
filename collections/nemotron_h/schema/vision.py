"""The vision side of a model: the keys of `model.vision` and `model.projector`.

Imports no torch, NeMo or Megatron.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from nemotron_h.core.strict import number, within
from nemotron_h.schema.ranges import COUNT, WIDTH

#: how the grid of an image's tiles is chosen, and most tiles of one (paper 4)
CLOSEST, AREA = TILINGS = ("closest", "area")
MOST_TILES = 12
#: norms of an encoder's layers
VISION_NORMS = ("layernorm", "rmsnorm")


@dataclass
class VisionSchema:
    """An encoder of image tiles in InternViT's shape (arXiv 2312.14238; 2404.16821 3.1): attention and feed-forward
    layers in turn, each a norm, what it computes, and a factor of each channel (LayerScale) before the residual
    stream.

    Attributes:
        name: of the file in `configs/vision`.
        num_layers: pairs of an attention and a feed-forward layer.
        hidden_size, ffn_hidden_size: widths of the residual stream, and inside of each feed-forward layer.
        num_attention_heads: heads, which share `hidden_size` and have a key and a value each.
        image_size, patch_size: sides of a tile and of a patch, in pixels.
        norm: `layernorm` or `rmsnorm`, before every layer.
        qkv_bias: the projections of queries, keys and values have biases.
        qk_norm: an RMSNorm over all heads of the queries, and one of the keys.
        norm_epsilon: of every norm.
        init_std: standard deviation of the initial weights.
        layer_scale: initial factor of each layer's output.

    Encoders that differ in `name`, `init_std` and `layer_scale` are equal: no weight tells them.
    """

    name: str = field(default=MISSING, compare=False)
    num_layers: int = number(least=1, most=COUNT)
    hidden_size: int = number(least=1, most=WIDTH)
    ffn_hidden_size: int = number(least=1, most=WIDTH)
    num_attention_heads: int = number(least=1, most=WIDTH)
    image_size: int = number(least=2, most=WIDTH)
    patch_size: int = number(least=1, most=WIDTH)
    norm: str = "layernorm"
    qkv_bias: bool = False
    qk_norm: bool = False
    norm_epsilon: float = number(1e-6, above=0, most=1)
    init_std: float = field(default=0.02, compare=False, metadata=within(above=0, most=10))
    layer_scale: float = field(default=0.1, compare=False, metadata=within(above=0, most=1e3))


@dataclass
class ProjectorSchema:
    """Two matrices from an encoder's channels to the language model's, with a squared ReLU between (paper 4).

    Attributes:
        ffn_hidden_size: inner width; 0 is the language model's.
        norm_epsilon: of the RMSNorm before.
    """

    ffn_hidden_size: int = number(0, least=0, most=WIDTH)
    norm_epsilon: float = number(1e-5, above=0, most=1)
