"""Image tiles as an encoder takes them, and the patches that become one image token.

Axes: n tiles, p pixels of a patch's side, g patches of a tile's side, l class token and patches, c channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: mean and standard deviation of ImageNet's red, green and blue, of values in [0, 1], which InternViT was trained with
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def patches(tiles: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Return the normalised pixels of every patch, [n, g * g, 3 * p * p]; row by row of the tile, channels first.

    Args:
        tiles: uint8 [n, 3, g * p, g * p], red, green and blue.
        size: p.
        dtype: of the result; it is computed in float32 at least.
    """
    wide = torch.promote_types(dtype, torch.float32)
    mean, std = (torch.tensor(each, dtype=wide, device=tiles.device)[:, None, None] for each in (MEAN, STD))
    pixels = ((tiles.to(wide) / 255 - mean) / std).to(dtype)
    grid = pixels.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # [n, 3, g, p, g, p]
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def embedded_patches(
    tiles: Tensor, weight: Tensor, bias: Tensor, class_token: Tensor, position_embedding: Tensor
) -> Tensor:
    """Return class token and patches with their positions, [n, l, c], of tiles, uint8 [n, 3, pixels, pixels].

    Args:
        weight, bias: of the patch embedding, [c, 3, p, p] and [c].
        class_token, position_embedding: [1, 1, c] and [1, l, c].
    """
    pixels = patches(tiles, weight.shape[-1], weight.dtype)  # [n, l - 1, 3 p p]
    embedded = F.linear(pixels, weight.flatten(1), bias)
    return torch.cat([class_token.expand(len(tiles), -1, -1), embedded], dim=1) + position_embedding


def pixel_shuffle(x: Tensor) -> Tensor:
    """Return [n, g * g / 4, 4 c] of patches [n, g * g, c], both row by row: each token has the channels of its patches
    top left, top right, bottom left and bottom right, one behind the other (InternVL's `ps_version` v2).
    """
    side = int(x.shape[1] ** 0.5)
    cells = x.unflatten(1, (side // 2, 2, side // 2, 2))  # [n, g / 2, 2, g / 2, 2, c]
    return cells.transpose(2, 3).flatten(3).flatten(1, 2)
