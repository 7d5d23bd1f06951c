"""The rule of Falcon-H1's multipliers against the released configurations, and what definitions refuse."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from nemotron_h.architecture.definition import ModelDefinition, definition_from_dict
from nemotron_h.architecture.gemms import check_gemms
from nemotron_h.core.errors import UserError
from nemotron_h.recipe.checks import definition_of
from nemotron_h.recipe.compose import compose

#: of config.json of the releases, as printed: lm_head, ssm_in, ssm_out, attention_out, key, the two of the FFN, and B's
RELEASED = {
    "0.5b": "0.0390625 1.25 0.2357023 0.9375 0.390625 0.8838835 0.5859375 0.3535534",
    "3b": "0.015625 0.5 0.0883883 0.15 0.0441942 0.3535534 0.078125 0.1767767",
    "7b": "0.0130208 0.4166667 0.1178511 0.1041667 0.0306904 0.2946278 0.0325521 0.1767767",
    "34b": "0.0078125 0.25 0.0883883 0.0375 0.0110485 0.1767767 0.0111607 0.1767767",
}
ORDER = ("head", "ssm_in", "ssm_out", "attention_out", "key", "ffn_gate", "ffn_down", "ssm_b")
#: the same in all sizes: embedding, attention's input, and of the input projection z, x, C and dt
SHARED = {
    "embedding": "5.656854249",
    "attention_in": "1.0",
    "ssm_z": "0.3535534",
    "ssm_x": "0.25",
    "ssm_c": "0.5",
    "ssm_dt": "0.3535534",
}


def shipped(size: str) -> ModelDefinition:
    name = f"falcon_h1_{size}"
    return definition_of(compose(f"{name}/pretrain"), name)


@pytest.mark.parametrize("size", RELEASED)
def test_rule_gives_what_is_released(size: str) -> None:
    """To all printed digits."""
    scales = shipped(size).scales
    for name, printed in {**SHARED, **dict(zip(ORDER, RELEASED[size].split(), strict=True))}.items():
        digits = len(printed.partition(".")[2])
        assert round(getattr(scales, name), digits) == float(printed), name


def test_what_is_stated_wins_over_the_rule() -> None:
    values = asdict(shipped("tiny"))
    ruled = shipped("tiny").scales
    values["multipliers"] |= {"key": 0.5}
    stated = definition_from_dict(values, "x.yaml").scales
    assert (stated.key, stated.head) == (0.5, ruled.head)


@pytest.mark.parametrize(
    ("model", "changes", "words"),
    [
        ("falcon_h1_tiny", {"rule": "falcon"}, "model.multipliers.rule = 'falcon'.*Did you mean falcon_h1"),
        ("falcon_h1_tiny", {"key": 0.0}, r"model.multipliers.key = 0.0 is not above 0"),
        ("falcon_h1_tiny", {"key": float("nan")}, "model.multipliers.key = nan is not a finite number"),
        ("nemotron_h_tiny", {"rule": "falcon_h1"}, "computes .*ssm_in.*which no layer of the pattern applies"),
        ("nemotron_h_tiny", {"ssm_in": 2.0}, "model.multipliers.ssm_in = 2.0 has no use"),
    ],
)
def test_refused(model: str, changes: dict, words: str) -> None:
    values = asdict(definition_of(compose(f"{model}/pretrain"), model))
    values["multipliers"] |= changes
    with pytest.raises(UserError) as error:
        definition_from_dict(values, "x.yaml")
    assert "x.yaml" in error.value.message
    with pytest.raises(UserError, match=words.replace(".*Did", r"[\s\S]*Did")):
        raise UserError(f"{error.value.message}\n{error.value.hint}")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pattern": "PSP"}, "is not PS over and over, as family falcon_h1"),
        ({"family": "nemotron_h"}, "model.pattern starts with P|has P S; family nemotron_h has M, \\* and -"),
        ({"mamba_num_groups": 3}, "mamba_num_heads = 8 is not a multiple of model.mamba_num_groups = 3"),
    ],
)
def test_patterns_refused(changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        definition_from_dict({**asdict(shipped("tiny")), **changes}, "x.yaml")


@pytest.mark.parametrize(
    ("size", "width"), [("0.5b", 3352), ("1.5b", 0), ("1.5b_deep", 3608), ("3b", 0), ("7b", 6680), ("34b", 0)]
)
def test_fp8_names_the_widths_that_it_cannot_take(size: str, width: int) -> None:
    """No multiple of 16, from the plan on."""
    shape = {"seq_length": 8192, "micro_batch_size": 1}
    if not width:
        check_gemms(shipped(size), "fp8_current_scaling", **shape)
        return
    with pytest.raises(UserError, match=f"in_proj of the parallel layers is .* x {width} .*needs multiples of 16"):
        check_gemms(shipped(size), "fp8_current_scaling", **shape)


@pytest.mark.parametrize(
    ("size", "sizes"), [("0.5b", "1"), ("1.5b", "1"), ("1.5b_deep", "1"), ("3b", "1"), ("7b", "1"), ("34b", "1, 2")]
)
def test_groups_limit_tensor_parallelism(size: str, sizes: str) -> None:
    """One group of B and C is not copied to several ranks."""
    definition = shipped(size)
    definition.validate_tensor_parallel(1, "x.yaml")
    with pytest.raises(UserError, match=f"mamba_num_groups = {definition.mamba_num_groups}") as error:
        definition.validate_tensor_parallel(4, "x.yaml")
    assert error.value.hint.endswith(f"sizes that fit: {sizes}")
