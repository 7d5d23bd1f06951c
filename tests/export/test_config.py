"""config.json: what is written, and what is refused when it is read."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.core.errors import UserError
from nemotron_h.export.config import definition_name
from nemotron_h.export.hf_types import from_config, to_config
from nemotron_h.recipe.checks import definition_of
from nemotron_h.recipe.compose import compose

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
EXPORTED = ("nemotron_h_tiny", "nemotron_h_8b", "nemotron_h_47b", "nano_4b", "nano_9b_v2", "mamba2_8b")


def shipped(name: str) -> ModelDefinition:
    """The definition of a shipped recipe."""
    return definition_of(compose(f"{name}/pretrain"), name)


def config_of(definition: ModelDefinition) -> dict:
    return to_config(definition, dtype="bfloat16", max_positions=8192, token_ids=IDS)


@pytest.mark.parametrize("name", EXPORTED)
def test_shipped_sizes_come_back(name: str) -> None:
    definition = shipped(name)
    assert from_config(config_of(definition), name, "config.json") == replace(definition, sources={})


def test_lean_and_without_a_clamp() -> None:
    config = config_of(shipped("nemotron_h_tiny"))
    assert config["model_type"] == "nemotron_h"
    assert config["time_step_min"] == 0.0
    assert config["use_cache"] is True
    assert config_of(shipped("mamba2_8b"))["use_cache"] is False
    unwanted = ("expert", "moe", "router", "time_step_limit", "layer_types", "layers_block_type")
    assert not [key for key in config if any(word in key for word in unwanted)]


def test_rotary_positions_cannot_be_expressed() -> None:
    with pytest.raises(UserError, match="nemotron_t_8b has rope positions"):
        config_of(shipped("nemotron_t_8b"))


def test_other_writers() -> None:
    """transformers 5 lists the layers' types, and its infinity; the hub's first release had another key."""
    definition = shipped("nemotron_h_tiny")
    config = config_of(definition)
    names = {"M": "linear_attention", "*": "full_attention", "-": "mlp"}
    config["layers_block_type"] = [names[symbol] for symbol in config.pop("hybrid_override_pattern")]
    config["time_step_limit"] = [0.0, {"__float__": "Infinity"}]
    config["attention_head_dim"] = config.pop("head_dim")
    assert from_config(config, definition.name, "config.json") == replace(definition, sources={})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type is mistral; only nemotron_h, falcon_h1, llama, qwen2 and qwen3 can"),
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act = silu, which this family does not have"),
        ({"use_bias": True}, "use_bias = True"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings = True"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config = set"),
        ({"time_step_limit": [0.001, 0.1]}, r"time_step_limit = \[0.001, 0.1\]"),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers = 1"),
        ({"hybrid_override_pattern": "MEM*E", "num_hidden_layers": 5}, "n_routed_experts is missing; a positive"),
        ({"hybrid_override_pattern": "MEM*E"}, r"num_hidden_layers is 13, the pattern MEM\*E has 5 layers"),
        ({"hybrid_override_pattern": ""}, "neither hybrid_override_pattern nor a list layers_block_type"),
        ({"hybrid_override_pattern": "", "layers_block_type": ["mlp", "moa"]}, "layers of type moa"),
        ({"hidden_size": None}, "hidden_size is missing; a positive whole number is needed"),
        ({"n_groups": 3}, "mamba_num_heads = 16 is not a multiple of model.mamba_num_groups = 3"),
    ],
)
def test_refused(change: dict, message: str) -> None:
    config = config_of(shipped("nemotron_h_tiny")) | change
    with pytest.raises(UserError, match=message):
        from_config(config, "x", "DIR/config.json")


def with_experts() -> ModelDefinition:
    definition = replace(
        shipped("nemotron_h_tiny"),
        pattern="MEM*EME",
        ffn_hidden_size=0,
        num_experts=8,
        experts_per_token=2,
        expert_hidden_size=96,
        shared_expert_hidden_size=192,
        expert_scaling=2.5,
        sources={},
    ).counted()
    definition.validate("the test")
    return definition


def test_experts_come_back() -> None:
    definition = with_experts()
    config = config_of(definition)
    keys = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "moe_shared_expert_intermediate_size")
    assert [config[key] for key in keys] == [8, 2, 96, 192]
    assert (config["routed_scaling_factor"], config["n_group"], config["norm_topk_prob"]) == (2.5, 1, True)
    assert from_config(config, definition.name, "config.json") == definition
    names = {"M": "mamba", "*": "attention", "E": "moe"}
    config["layers_block_type"] = [names[symbol] for symbol in config.pop("hybrid_override_pattern")]
    assert from_config(config, definition.name, "config.json") == definition


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_group": 4, "topk_group": 2}, "n_group = 4, topk_group = 2, which is not imported"),
        ({"norm_topk_prob": False}, "norm_topk_prob = False, which is not imported"),
        ({"n_shared_experts": 2}, "n_shared_experts = 2"),
        ({"moe_latent_size": 64}, "moe_latent_size = 64: experts between two linear layers"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers = 2: a block that predicts further tokens"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok is missing"),
        ({"num_experts_per_tok": 9}, "experts_per_token = 9 is above model.num_experts = 8"),
        ({"routed_scaling_factor": "2.5"}, "routed_scaling_factor is '2.5'; a positive number"),
    ],
)
def test_experts_refused(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_config(config_of(with_experts()) | change, "x", "DIR/config.json")


def test_names() -> None:
    with pytest.raises(UserError, match=r"the model's name = '\.\./x' is not a name"):
        from_config(config_of(shipped("nemotron_h_tiny")), "../x", "config.json")
    assert definition_name("Ünï Modell 8B") == "n_modell_8b"
    assert definition_name("Nemotron-H-8B Base") == "nemotron_h_8b_base"
    assert definition_name("...") == "imported"
