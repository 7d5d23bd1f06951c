"""Multipliers of activations, computed of a model's shape where its definition names a rule. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import check_number, check_one_of, ranges
from nemotron_h.schema.multipliers import MULTIPLIER_RULES, MultipliersSchema

if TYPE_CHECKING:
    from nemotron_h.architecture.definition import ModelDefinition

#: names of all multipliers
NAMES = tuple(each.name for each in fields(MultipliersSchema) if each.name != "rule")
#: of the embedding and the output layer, which every model has
OF_ENDS = ("embedding", "head")


@dataclass(frozen=True)
class Multipliers:
    """The factors, as `MultipliersSchema`; 1 changes nothing."""

    embedding: float = 1.0
    head: float = 1.0
    attention_in: float = 1.0
    key: float = 1.0
    attention_out: float = 1.0
    ssm_in: float = 1.0
    ssm_out: float = 1.0
    ssm_z: float = 1.0
    ssm_x: float = 1.0
    ssm_b: float = 1.0
    ssm_c: float = 1.0
    ssm_dt: float = 1.0
    ffn_gate: float = 1.0
    ffn_down: float = 1.0

    @property
    def in_proj(self) -> tuple[float, ...]:
        """Return the factors of the input projection's outputs z, x, B, C and dt; that of its input is in them."""
        return tuple(self.ssm_in * part for part in (self.ssm_z, self.ssm_x, self.ssm_b, self.ssm_c, self.ssm_dt))


ONES = Multipliers()


def resolve(written: MultipliersSchema, widths: Mapping[str, Any]) -> Multipliers:
    """Return what a definition states, and the rule's values for the rest.

    Args:
        widths: of the model, by key.
    Errors:
        UserError: the rule needs a width that the model does not have.
    """
    try:
        computed = RULES[written.rule](widths)
    except (KeyError, ZeroDivisionError):
        raise UserError(
            f"model.multipliers.rule = {written.rule} cannot be computed of this shape",
            hint="it needs the widths of attention, Mamba-2 and feed-forward layers, all positive",
        ) from None
    stated = {name: value for name in NAMES if (value := getattr(written, name)) is not None}
    return Multipliers(**{**vars(computed), **stated})


def falcon_h1(widths: Mapping[str, Any]) -> Multipliers:
    """Return Falcon-H1's multipliers of a shape.

    Falcon-H1 (arXiv 2507.22448) tuned them at 66 layers of width 1280 and releases those of other sizes without the
    rule. This one was derived from the released configurations, and gives each of their values to all printed digits.
    The learning rate is the same for all sizes.
    """
    base = 1280
    hidden, ffn = widths["hidden_size"], widths["ffn_hidden_size"]
    queries = widths["num_attention_heads"] * widths["head_dim"]
    inner = widths["mamba_num_heads"] * widths["mamba_head_dim"]
    width = base / hidden
    return Multipliers(
        embedding=4 * math.sqrt(2),
        head=40 / hidden,
        attention_out=491_520 / (hidden * queries),
        key=2**-2.5 * width**2 * math.sqrt(128 / widths["head_dim"]),
        ssm_in=width,
        ssm_out=256 * math.sqrt(2) / inner,
        ssm_z=2**-1.5,
        ssm_x=2**-2,
        ssm_b=2**-1.5 * 128 / widths["mamba_state_dim"],
        ssm_c=2**-1,
        ssm_dt=2**-1.5,
        ffn_gate=2**-0.5 * width,
        ffn_down=1_228_800 / (hidden * ffn),
    )


RULES: dict[str, Callable[[Mapping[str, Any]], Multipliers]] = {
    "none": lambda widths: ONES,
    "falcon_h1": falcon_h1,
}


def check_multipliers(model: ModelDefinition, origin: str) -> None:
    """Check the keys of `model.multipliers`, and that a layer applies each.

    Errors:
        UserError: names the key.
    """
    written = model.multipliers
    check_one_of("model.multipliers.rule", written.rule, MULTIPLIER_RULES, f"{origin}: ")
    applied = {name for kind in model.kinds for name in kind.multipliers}.union(OF_ENDS)
    if written.rule != "none" and (without := [name for name in NAMES if name not in applied]):
        raise UserError(
            f"{origin}: model.multipliers.rule = {written.rule} computes {', '.join(without)}, which no layer of "
            "the pattern applies",
            hint="leave model.multipliers out, or take the layers of family falcon_h1: PS, over and over",
        )
    limits = ranges(MultipliersSchema)
    for name in NAMES:
        value = getattr(written, name)
        if value is None:
            continue
        check_number(f"model.multipliers.{name}", value, limits[name], f"{origin}: ")
        if name not in applied:
            raise UserError(
                f"{origin}: model.multipliers.{name} = {value} has no use: no layer of the pattern applies it",
                hint=f"leave model.multipliers.{name} out",
            )
