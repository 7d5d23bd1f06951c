"""Multipliers of activations, as Falcon-H1 has them (arXiv 2507.22448): the keys of `model.multipliers`.

Imports no torch, NeMo or Megatron.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemotron_h.core.strict import number

#: rules that compute all multipliers of a shape; `none` is 1 everywhere
MULTIPLIER_RULES = ("none", "falcon_h1")
#: ours: a multiplier beyond it is a typing error
_MOST = 1e6


def _multiplier() -> float | None:
    return number(None, above=0, most=_MOST)


@dataclass
class MultipliersSchema:
    """Factors of activations; null takes what `rule` computes of the model's shape.

    Attributes:
        rule: `none` (1 everywhere), or `falcon_h1`.
        embedding, head: of the embedding's rows, and of the logits.
        attention_in, key, attention_out: of attention's input, its keys (before the rotation), and its output.
        ssm_in, ssm_out: of the mixer's input and output.
        ssm_z, ssm_x, ssm_b, ssm_c, ssm_dt: of the parts of its input projection, before convolution and step sizes.
        ffn_gate, ffn_down: of a SwiGLU's gate before its SiLU, and of its output.
    """

    rule: str = "none"
    embedding: float | None = _multiplier()
    head: float | None = _multiplier()
    attention_in: float | None = _multiplier()
    key: float | None = _multiplier()
    attention_out: float | None = _multiplier()
    ssm_in: float | None = _multiplier()
    ssm_out: float | None = _multiplier()
    ssm_z: float | None = _multiplier()
    ssm_x: float | None = _multiplier()
    ssm_b: float | None = _multiplier()
    ssm_c: float | None = _multiplier()
    ssm_dt: float | None = _multiplier()
    ffn_gate: float | None = _multiplier()
    ffn_down: float | None = _multiplier()
