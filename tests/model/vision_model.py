"""Small models that read images, and batches for them."""

from __future__ import annotations

import torch
from small_model import VOCABULARY, scale_one, small_config
from torch import Tensor

from nemotron_h.schema.vision import ProjectorSchema, VisionSchema

#: tiles of 16 pixels are 4 x 4 patches, and 4 image tokens
TILE = 16
ENCODERS = {
    "internvit_300m": {"norm": "layernorm", "qkv_bias": True, "qk_norm": False},
    "internvit_6b": {"norm": "rmsnorm", "qkv_bias": False, "qk_norm": True},
}


def vision_schema(like: str = "internvit_300m", **changes) -> VisionSchema:
    """An encoder with the switches of a shipped one."""
    widths = {"num_layers": 2, "hidden_size": 24, "ffn_hidden_size": 40, "num_attention_heads": 4}
    return VisionSchema("small", **{**widths, "image_size": TILE, "patch_size": 4, **ENCODERS[like], **changes})


def internvit(vision: VisionSchema, **options):
    """The encoder as transformers has it, its weights as they are drawn there."""
    from transformers import InternVLVisionConfig, InternVLVisionModel

    return InternVLVisionModel(
        InternVLVisionConfig(
            hidden_size=vision.hidden_size,
            num_hidden_layers=vision.num_layers,
            num_attention_heads=vision.num_attention_heads,
            intermediate_size=vision.ffn_hidden_size,
            attention_bias=vision.qkv_bias,
            use_qk_norm=vision.qk_norm,
            norm_type={"layernorm": "layer_norm", "rmsnorm": "rms_norm"}[vision.norm],
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            **options,
        )
    )


def vision_config(like: str = "internvit_300m", **changes):
    """`small_config` with an encoder."""
    return small_config(**{"vision": vision_schema(like), "projector": ProjectorSchema(), **changes})


def vision_model(config, seed: int = 0):
    """The Megatron model of `config` on one rank, its weights at scale 1."""
    model = config.configure_model(None).to(config.params_dtype)
    scale_one(dict(model.named_parameters()), seed)
    return model


def tiles(count: int, seed: int = 0, side: int = TILE) -> Tensor:
    """Random tiles, uint8 [count, 3, side, side]."""
    return torch.randint(256, (count, 3, side, side), generator=torch.Generator().manual_seed(seed)).byte()


def batch(rows: int, length: int, starts: list[tuple[int, int]], seed: int = 0, per_tile: int = 4) -> dict[str, Tensor]:
    """Random tokens with a tile at each of `starts`, (row, position), in the order of their places."""
    ids = torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(rows, length, dtype=torch.bool)
    for row, start in starts:
        mask[row, start : start + per_tile] = True
    return {"input_ids": ids.masked_fill(mask, 0), "image_mask": mask, "tiles": tiles(len(starts), seed)}
