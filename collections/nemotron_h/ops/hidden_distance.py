"""Distance of a student's states from its teacher's: the intermediate-state loss of a distillation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def hidden_distance(own: Tensor, theirs: Tensor, projection: Tensor | None = None) -> Tensor:
    """Return 1 - cosine of each token's states, [tokens], in float32 (float64 for float64 states).

    Args:
        own: [tokens, width], the student's.
        theirs: [tokens, teacher's width].
        projection: [teacher's width, width], applied to `own`; None where the widths are equal.
    """
    if projection is not None:
        own = F.linear(own, projection)  # [tokens, teacher's width]
    wide = torch.promote_types(own.dtype, torch.float32)
    return 1 - F.cosine_similarity(own.to(wide), theirs.to(wide), dim=-1)
