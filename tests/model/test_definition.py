"""The model definition: counts against the paper and against the real module, and what it refuses."""

from __future__ import annotations

import dataclasses

import pytest
from omegaconf import OmegaConf

from nemotron_h.compose import configs_dir
from nemotron_h.errors import UserError
from nemotron_h.model.definition import Expect, ModelDefinition, definition_from_dict

UNIT = "M-M-M-M*-"
PATTERN_8B = UNIT + "M-" + "M-M-M-M*-M-" * 3 + "M-M-M-M-"
PATTERN_56B = UNIT + "M-" + "M-M-M-M*-M-" * 9 + "M-M-M-M-"
PATTERN_47B_RELEASED = (
    "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-"
)
PATTERN_47B_PAPER = "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-----MM---M-M*-M-M-M-M-M-"


def definition(**changes) -> ModelDefinition:
    """A small valid definition, with changes; `expect` is counted unless given."""
    values = {
        "name": "test",
        "pattern": "M-M*-",
        "hidden_size": 48,
        "ffn_hidden_size": 80,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "head_dim": 16,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "mamba_num_groups": 2,
        "mamba_state_dim": 16,
        "conv_kernel": 4,
        "vocab_size": 384,
        "expect": Expect(0, 0, 0, 0),
        **changes,
    }
    made = ModelDefinition(**values)
    if "expect" in changes:
        return made
    counts = Expect(*(made.count(s) for s in "M*-"), made.parameters)
    return dataclasses.replace(made, expect=counts)


def family(pattern: str, hidden: int, ffn: int, heads: int, mamba_heads: int, state: int) -> ModelDefinition:
    """A size of the family: what all share is paper 2.1, the widths are paper table 1 (47B: released configuration)."""
    return definition(
        pattern=pattern,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=8,
        head_dim=128,
        mamba_num_heads=mamba_heads,
        mamba_head_dim=64,
        mamba_num_groups=8,
        mamba_state_dim=state,
        vocab_size=131072,
    )


@pytest.mark.parametrize(
    ("pattern", "widths", "layers", "billions"),
    [
        (PATTERN_8B, (4096, 21504, 32, 128, 128), (52, 24, 4, 24), 8.101),
        (PATTERN_56B, (8192, 32768, 64, 256, 256), (118, 54, 10, 54), 56.32),
        (PATTERN_47B_RELEASED, (8192, 30720, 64, 256, 256), (98, 45, 5, 48), 46.79),
        (PATTERN_47B_PAPER, (8192, 30720, 64, 256, 256), (98, 44, 5, 49), 46.86),
    ],
    ids=["8B", "56B", "47B released", "47B paper 3.5"],
)
def test_family_sizes(pattern, widths, layers, billions) -> None:
    made = family(pattern, *widths)
    made.validate("test")
    assert (made.num_layers, made.count("M"), made.count("*"), made.count("-")) == layers
    digits = 3 if billions < 10 else 2
    assert round(made.parameters / 1e9, digits) == billions


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("groups", [1, 8])
def test_counts_are_the_modules(groups: int) -> None:
    from small_model import small_config

    config = small_config(groups, vocab_size=384)  # a multiple of 128, so without padding
    module = config.configure_model(None)
    counted = config.definition()
    assert counted.parameters == sum(p.numel() for p in module.parameters())
    by_layer = [sum(p.numel() for p in layer.parameters()) for layer in module.decoder.layers]
    assert by_layer == [counted.layer_parameters(symbol) for symbol in counted.pattern]


@pytest.mark.parametrize("path", sorted((configs_dir() / "model").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_definitions(path) -> None:
    made = definition_from_dict(OmegaConf.to_container(OmegaConf.load(path)), str(path))
    assert made.name == path.stem


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pattern": "M-X*-"}, ["model.pattern", "X"]),
        ({"pattern": ""}, ["model.pattern", "no layers"]),
        ({"pattern": "-M*-"}, ["model.pattern", "first layer is M"]),
        ({"pattern": "M-*-M"}, ["model.pattern", "last layer is -"]),
        ({"pattern": "M*M-"}, ["model.pattern", "layer 1", "*-"]),
        ({"num_query_groups": 3}, ["num_attention_heads = 4", "num_query_groups = 3", "nearest"]),
        ({"mamba_num_groups": 3}, ["mamba_num_heads = 8", "mamba_num_groups = 3", "nearest"]),
        ({"hidden_size": 0}, ["hidden_size", "positive"]),
        ({"expect": Expect(2, 1, 2, 1)}, ["model.expect", "parameters"]),
        ({"expect": Expect(3, 1, 2, 0)}, ["model.expect", "mamba: 2 counted, 3 expected"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_refused(changes, words) -> None:
    with pytest.raises(UserError) as error:
        definition(**changes).validate("small.yaml")
    text = str(error.value)
    for word in ["small.yaml", *words]:
        assert word in text


def test_tensor_parallel_must_divide() -> None:
    made = definition()
    made.validate_tensor_parallel(2, "a.yaml")
    with pytest.raises(
        UserError, match=r"a.yaml: parallel.tensor = 4 .*mamba_num_groups = 2.*num_query_groups = 2"
    ) as error:
        made.validate_tensor_parallel(4, "a.yaml")
    assert error.value.hint == "nearest: 2; sizes that fit: 1, 2"


def test_pipeline_stages_need_layers() -> None:
    made = definition()
    made.validate_pipeline_parallel(5, "a.yaml")
    with pytest.raises(UserError, match=r"a.yaml: parallel.pipeline = 6 .*5 layers") as error:
        made.validate_pipeline_parallel(6, "a.yaml")
    assert error.value.hint == "nearest: 5"
