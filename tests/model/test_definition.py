"""The model definition: counts against the real module, and what it refuses. Shipped files: `test_family.py`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from nemotron_h.architecture.blocks.registry import KINDS
from nemotron_h.architecture.definition import Expect, ModelDefinition
from nemotron_h.core.errors import UserError

#: changes that make the small definition a pure one, its unneeded widths left out
TRANSFORMER = {"family": "transformer", "pattern": "*-*-", **dict.fromkeys(KINDS["M"].widths, 0)}
MAMBA2 = {"family": "mamba2", "pattern": "MM", **dict.fromkeys(KINDS["*"].widths + KINDS["-"].widths, 0)}
SCALED = {"rope_scaling_factor": 8.0, "rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0}
SCALED |= {"rope_original_length": 64}
ROPE = {"position_embedding": "rope", "rope_base": 10000, "rope_percent": 1.0}


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
    return made if set(made.pattern) - set(KINDS) else made.counted()


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize(("groups", "pattern"), [(1, "M-M*-M-"), (8, "M-ML*-L")])
def test_counts_are_the_modules(groups: int, pattern: str) -> None:
    from small_model import small_config

    config = small_config(groups, pattern, vocab_size=384)  # a multiple of 128, so without padding
    module = config.configure_model(None)
    counted = config.definition()
    assert counted.parameters == sum(p.numel() for p in module.parameters())
    by_layer = [sum(p.numel() for p in layer.parameters()) for layer in module.decoder.layers]
    assert by_layer == [counted.block(symbol).parameters for symbol in counted.pattern]


@pytest.mark.usefixtures("megatron")
def test_a_vocabulary_may_have_rows_of_padding() -> None:
    from small_model import small_config

    for rows in (300, 384, 1324):
        small_config(vocab_size=rows).check_tokenizer(SimpleNamespace(vocab_size=300))
    for rows in (299, 1325):
        with pytest.raises(UserError, match=f"300 tokens, .* has a vocabulary of {rows:,}"):
            small_config(vocab_size=rows).check_tokenizer(SimpleNamespace(vocab_size=300))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pattern": "M-X*-"}, ["model.pattern", "X"]),
        ({"pattern": ""}, ["model.pattern", "no layers"]),
        ({"pattern": "-M*-"}, ["model.pattern", "first layer is M"]),
        ({"pattern": "M-*-M"}, ["model.pattern", "last layer is -"]),
        ({"pattern": "M-L*-"}, ["model.pattern has L; family nemotron_h", "set model.family to pruned"]),
        ({"pattern": "M-L*-", "family": "pruned", "overrides": {2: {"head_dim": 8}}}, ["a linear layer has no such"]),
        ({"pattern": "M*M-"}, ["model.pattern", "layer 1", "*-"]),
        ({"num_query_groups": 3}, ["num_attention_heads = 4", "num_query_groups = 3", "nearest"]),
        ({"mamba_num_groups": 3}, ["mamba_num_heads = 8", "mamba_num_groups = 3", "nearest"]),
        ({"hidden_size": 0}, ["model.hidden_size = 0 is below 1"]),
        ({"init_std": float("nan")}, ["model.init_std = nan is not a finite number"]),
        ({"norm_epsilon": "x"}, ["model.norm_epsilon: 'x' is not a number"]),
        ({"vocab_size": 100.5}, ["model.vocab_size = 100.5 is not a whole number"]),
        ({"family": "nemotronh"}, ["model.family = 'nemotronh'", "Did you mean nemotron_h?"]),
        ({**TRANSFORMER, "pattern": "*-M-"}, ["model.pattern = *-M-", "family transformer", "nearest: *-*-"]),
        ({**TRANSFORMER, "pattern": "*-*"}, ["nearest: *-;"]),
        ({**TRANSFORMER, "mamba_num_heads": 8}, ["mamba_num_heads = 8 has no use", "no M (mamba) layer"]),
        ({**TRANSFORMER, "conv_kernel": 4}, ["conv_kernel = 4 has no use", "leave model.conv_kernel out"]),
        ({**TRANSFORMER, "head_dim": 0}, ["model.head_dim is 0", "give model.head_dim"]),
        ({**MAMBA2, "pattern": "MM-"}, ["model.pattern has - at layer 2", "nearest: MMM"]),
        ({**MAMBA2, "pattern": "-MM"}, ["model.pattern has - at layer 0"]),
        ({**MAMBA2, "ffn_hidden_size": 80}, ["ffn_hidden_size = 80 has no use", "no - (ffn) layer"]),
        ({"conv_kernel": 0}, ["model.conv_kernel is 0"]),
        ({"position_embedding": "ropes"}, ["model.position_embedding = 'ropes'", "Did you mean rope?"]),
        (ROPE, ["model.position_embedding = rope", "paper 2.1", "nearest: none"]),
        ({**MAMBA2, **ROPE}, ["model.position_embedding = rope", "no attention layer"]),
        ({**TRANSFORMER, **ROPE, "position_embedding": "none"}, ["rope_base = 10000 has no use"]),
        ({**TRANSFORMER, **ROPE, "rope_base": 0}, ["model.rope_base is 0"]),
        ({**TRANSFORMER, **ROPE, "rope_percent": 50.0}, ["model.rope_percent = 50.0", "at most 1"]),
        ({**TRANSFORMER, **ROPE, "overrides": {0: {"head_dim": 8}}}, ["model.overrides.0.head_dim", "once for all"]),
        ({**TRANSFORMER, **ROPE, "rope_percent": 0.2}, ["rotates 3 of 16 channels", "nearest: 0.25"]),
        (
            {**TRANSFORMER, **ROPE, "rope_scaling_factor": 8.0},
            ["rope_low_freq_factor and", "state rope_scaling_factor"],
        ),
        ({**TRANSFORMER, **ROPE, **SCALED, "rope_low_freq_factor": 4.0}, ["the second below the third", "8, 1 and 4"]),
        ({**TRANSFORMER, **SCALED}, ["model.rope_scaling_factor = 8.0 has no use"]),
        ({**MAMBA2, "qk_norm": True}, ["model.qk_norm = true has no use", "no attention layer"]),
        ({"pattern": "P*S", "family": "pruned", "qkv_bias": True}, ["model.qkv_bias = true", "P (attention beside"]),
        ({"pattern": "*S*-", "family": "llama"}, ["model.pattern = *S*- is not *S over and over", "nearest: *S*S"]),
        (
            {**TRANSFORMER, "mamba_norm": False},
            ["model.mamba_norm = false has no use", "no Mamba-2 or attention beside"],
        ),
        ({"sources": {"hidden": "paper 2.1"}}, ["model.sources names hidden", "Did you mean hidden_size?"]),
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


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [(TRANSFORMER, "1, 2"), ({**TRANSFORMER, **ROPE}, "1, 2"), (MAMBA2, "1, 2")],
    ids=["transformer", "transformer with rope", "mamba2"],
)
def test_pure_patterns(changes: dict, sizes: str) -> None:
    made = definition(**changes)
    made.validate("a.yaml")
    with pytest.raises(UserError) as error:
        made.validate_tensor_parallel(3, "a.yaml")
    assert error.value.hint.endswith(f"sizes that fit: {sizes}")


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
