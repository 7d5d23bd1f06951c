"""A model of another hidden size and pattern, with heads, groups and states as a given model has them."""

from __future__ import annotations

import math
from dataclasses import replace

from nemotron_h.architecture.blocks.registry import KINDS
from nemotron_h.architecture.definition import ModelDefinition

#: number of heads -> of groups that share keys and values, or B and C
_HEADS = {"num_attention_heads": "num_query_groups", "mamba_num_heads": "mamba_num_groups"}


def alike(like: ModelDefinition, hidden: int, pattern: str, ffn: int | None = None) -> ModelDefinition:
    """Return a model with numbers of heads in proportion to the hidden size, and groups that divide them.

    Widths that the pattern has no use for are 0; `expect` is that of `like` (see `ModelDefinition.counted`).

    Args:
        ffn: `ffn_hidden_size`; None is in proportion too.
    """
    ratio = hidden / like.hidden_size
    widths = {"ffn_hidden_size": round(like.ffn_hidden_size * ratio) if ffn is None else ffn}
    for heads, groups in _HEADS.items():
        widths[heads] = max(round(getattr(like, heads) * ratio), 1)
        widths[groups] = math.gcd(widths[heads], getattr(like, groups))
    used = {key for letter in set(pattern) for key in KINDS[letter].widths}
    every = {key for kind in KINDS.values() for key in kind.widths}
    sizes = {key: widths.get(key, getattr(like, key)) * (key in used) for key in every}
    return replace(like, pattern=pattern, hidden_size=hidden, overrides={}, sources={}, **sizes)
