"""A model definition as Hugging Face's `config.json` of type `nemotron_h`, and back. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from typing import Any

from nemotron_h.architecture.blocks.families import family_of
from nemotron_h.architecture.blocks.registry import KINDS, kind_named
from nemotron_h.architecture.definition import Expect, ModelDefinition
from nemotron_h.architecture.multipliers import ONES
from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import check_name

MODEL_TYPE = "nemotron_h"
#: the released models' value, for a checkpoint whose record tells no sequence length; nothing computes with it
MAX_POSITIONS = 8192

#: hint of an error: what takes a model that a format cannot hold
OURS = "keep it as a checkpoint of ours: plan, training, generation and compression take it"

#: definition -> config.json, where both hold one value
KEYS = {
    "pattern": "hybrid_override_pattern",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "head_dim": "head_dim",
    "mamba_num_heads": "mamba_num_heads",
    "mamba_head_dim": "mamba_head_dim",
    "mamba_num_groups": "n_groups",
    "mamba_state_dim": "ssm_state_size",
    "conv_kernel": "conv_kernel",
    "vocab_size": "vocab_size",
    "norm_epsilon": "layer_norm_epsilon",
    "init_std": "initializer_range",
}

#: definition -> config.json, of experts: stated of a model that has some, for transformers writes all keys of any
EXPERT_KEYS = {
    "num_experts": "n_routed_experts",
    "experts_per_token": "num_experts_per_tok",
    "expert_hidden_size": "moe_intermediate_size",
    "shared_expert_hidden_size": "moe_shared_expert_intermediate_size",
    "expert_scaling": "routed_scaling_factor",
}
#: what every model with experts has, as `FIXED`
EXPERTS_FIXED = {"n_shared_experts": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True}

#: what every model of the family has (paper 2.1). A config.json that says otherwise is of another model; one that says
#: nothing means these, which are also the defaults of transformers.
FIXED = {
    "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu",
    "use_bias": False,
    "mlp_bias": False,
    "attention_bias": False,
    "mamba_proj_bias": False,
    "use_conv_bias": True,
    "tie_word_embeddings": False,
}

#: keys of a definition that are no whole numbers
_REAL = ("norm_epsilon", "init_std", "expert_scaling")
_LARGEST = 2**31  # ours: beyond any width

#: sizes that transformers requires to be positive, for layer types that a pattern lacks
_UNUSED_WIDTH = 1
_LAYER_TYPES = {
    "mamba": "mamba",
    "linear_attention": "mamba",
    "attention": "attention",
    "full_attention": "attention",
    "mlp": "ffn",
    "moe": "experts",
}
#: kinds of layers that an import reads
_READ = set(_LAYER_TYPES.values())


def check_expressible(definition: ModelDefinition) -> None:
    """Refuse a model that the type `nemotron_h` cannot express.

    Errors:
        UserError: the model has rotary positions, other widths in some layers, or other kinds of layers.
    """
    check_uniform(definition, f"Hugging Face's {MODEL_TYPE}", set(_LAYER_TYPES.values()))
    if definition.position_embedding != "none":
        raise UserError(
            f"model {definition.name} has {definition.position_embedding} positions; "
            f"Hugging Face's {MODEL_TYPE} has none, so it would compute something else",
            hint="only models with position_embedding: none can be exported",
        )
    check_plain(definition, f"Hugging Face's {MODEL_TYPE}")


def check_plain(definition: ModelDefinition, reader: str) -> None:
    """Refuse multipliers, a mixer without a norm, biases, norms of heads and a tied output matrix, for a format that
    knows none of these.

    Args:
        reader: the format, in words.
    Errors:
        UserError: names what it lacks.
    """
    wrong = {"multipliers": definition.scales != ONES, "mamba_norm": not definition.mamba_norm}
    wrong |= {key: getattr(definition, key) for key in ("qkv_bias", "qk_norm", "tied_embeddings")}
    lacks = [key for key, lacking in wrong.items() if lacking]
    if lacks:
        raise UserError(
            f"model {definition.name} has model.{' and model.'.join(lacks)}, which {reader} does not know, so it would "
            "compute something else",
            hint="keep it as a checkpoint of ours: training and generation take it",
        )


def check_uniform(definition: ModelDefinition, reader: str, kinds: Set[str]) -> None:
    """Refuse a model of layers that a format has no place for.

    Args:
        reader: the format, in words.
        kinds: names of the kinds of layers that it can hold, all of one width.
    Errors:
        UserError: names the layers.
    """
    other = sorted({kind.name for kind in definition.kinds} - kinds)
    if other:
        layers = ", ".join(str(number) for number, block in enumerate(definition.blocks) if block.name in other)
        raise UserError(
            f"model {definition.name} has {', '.join(other)} layers, which {reader} does not know: {layers}",
            hint=OURS,
        )
    if definition.overrides:
        layers = ", ".join(map(str, sorted(definition.overrides)))
        raise UserError(
            f"model {definition.name} has widths of their own in layers {layers} (model.overrides); {reader} states "
            "one width for all layers of a kind",
            hint=OURS,
        )


def to_config(
    definition: ModelDefinition, *, dtype: str, max_positions: int, token_ids: Mapping[str, int | None]
) -> dict[str, Any]:
    """Return the content of `config.json`: what readers need and no more, because several take an unknown key for a
    hint of another model (mixture-of-experts keys above all).

    Args:
        definition: the model.
        dtype: `float32` or `bfloat16`, of the weights in the folder.
        max_positions: tokens that the model was trained on at once; it has no positions that would limit it.
        token_ids: `bos_token_id`, `eos_token_id`, `pad_token_id`.
    Errors:
        UserError: the model has rotary positions, which the type cannot express.
    """
    check_expressible(definition)
    widths = {theirs: getattr(definition, ours) or _UNUSED_WIDTH for ours, theirs in KEYS.items()}
    if definition.num_experts:
        widths |= {theirs: getattr(definition, ours) for ours, theirs in EXPERT_KEYS.items()} | EXPERTS_FIXED
    return {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": MODEL_TYPE,
        **widths,
        "num_hidden_layers": definition.num_layers,
        "max_position_embeddings": max_positions,
        **FIXED,
        # transformers clamps steps at this value while it reads a prompt and not while it generates; nothing else
        # reads it from a trained model. The architecture has no clamp.
        "time_step_min": 0.0,
        # transformers' cache asks an attention layer for the length so far
        "use_cache": any(kind.attends for kind in definition.kinds),
        **token_ids,
        "torch_dtype": dtype,
    }


def from_config(config: Mapping[str, Any], name: str, origin: str) -> ModelDefinition:
    """Return the definition, with its counts in `expect`, that a `config.json` describes.

    Args:
        config: the file's content, as transformers, the hub or `to_config` wrote it.
        name: of the definition.
        origin: the file, to name in an error.
    Errors:
        UserError: another architecture; a variant of this one that the family does not have; a value is missing.
    """
    check_name("the model's name", name, f"{origin}: ")
    _check_architecture(config, origin)
    pattern = _pattern(config, origin)
    values: dict[str, Any] = {"pattern": pattern}
    needed = {key for letter in pattern for key in KINDS[letter].widths}
    unused = {key for kind in KINDS.values() for key in kind.widths} - needed
    if not needed.isdisjoint(EXPERT_KEYS):
        _check_experts(config, origin)
    for ours, theirs in {**KEYS, **EXPERT_KEYS}.items():
        if ours == "pattern" or ours in unused:
            continue
        key = "attention_head_dim" if theirs == "head_dim" and theirs not in config else theirs
        if key not in config and ours in ("norm_epsilon", "init_std"):
            continue  # the definition's defaults are transformers'
        values[ours] = positive(config.get(key), theirs, origin, whole=ours not in _REAL)
    definition = ModelDefinition(name=name, family=family_of(pattern), expect=Expect(), **values)
    definition.validate_structure(origin)
    return definition.counted()


def max_positions_of(config: Mapping[str, Any], origin: str) -> int | None:
    """Return the tokens that a `config.json` says its model was trained on at once; None where it says nothing.

    Errors:
        UserError: the value is no such number.
    """
    value = config.get("max_position_embeddings")
    return None if value is None else int(positive(value, "max_position_embeddings", origin, whole=True))


def positive(value: Any, key: str, origin: str, *, whole: bool) -> int | float:
    """Return a width or another positive number as it is.

    Errors:
        UserError: it is none, or beyond what a size can be.
    """
    kinds = int if whole else int | float
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < _LARGEST:
        shown, kind = "missing" if value is None else repr(value), "whole number" if whole else "number"
        raise UserError(f"{origin}: {key} is {shown}; a positive {kind} is needed")
    return value


def rope_base(base: Any, origin: str) -> int:
    """Return the base of rotary positions as a definition has it.

    Errors:
        UserError: it is no positive whole number, or beyond what a base can be.
    """
    if isinstance(base, bool) or not isinstance(base, int | float) or not 0 < base < 10**18 or base != int(base):
        raise UserError(f"{origin}: rope_theta is {base!r}; a positive whole number is needed")
    return int(base)


def definition_name(folder_name: str) -> str:
    """Return a folder's name as a definition's: lower case, words joined by `_`."""
    return re.sub(r"\W+", "_", folder_name.lower(), flags=re.ASCII).strip("_")[:100] or "imported"


def _check_architecture(config: Mapping[str, Any], origin: str) -> None:
    found = config.get("model_type")
    if found != MODEL_TYPE:
        raise UserError(
            f"{origin}: model_type is {found}; only {MODEL_TYPE} can be imported",
            hint="give the folder of a Nemotron-H model, as `nemotron-h export hf` or transformers writes it",
        )
    other = {key: config[key] for key, value in FIXED.items() if config.get(key, value) != value}
    if config.get("quantization_config"):
        other["quantization_config"] = "set"
    try:
        lowest, highest = (_number(value) for value in config.get("time_step_limit") or (0.0, float("inf")))
    except (ValueError, TypeError, KeyError):
        said = repr(config["time_step_limit"])
        raise UserError(f"{origin}: time_step_limit is {said}; the lowest and the highest step are needed") from None
    if lowest > 0 or highest != float("inf"):
        other["time_step_limit"] = [lowest, highest]
    if other:
        said = ", ".join(f"{key} = {value}" for key, value in other.items())
        raise UserError(f"{origin}: {said}, which this family does not have (paper 2.1)")
    if steps := config.get("num_nextn_predict_layers"):
        raise UserError(
            f"{origin}: num_nextn_predict_layers = {steps}: a block that predicts further tokens is not imported",
            hint="import the model without it: set num_nextn_predict_layers to 0, and leave out its tensors (mtp.)",
        )


def _check_experts(config: Mapping[str, Any], origin: str) -> None:
    """Refuse variants of experts that the family does not have, or that are not trained here."""
    if latent := config.get("moe_latent_size"):
        raise UserError(
            f"{origin}: moe_latent_size = {latent}: experts between two linear layers are planned, and not imported",
            hint="nemotron-h plan takes such a model (model.expert_latent_size)",
        )
    if other := {key: config[key] for key, value in EXPERTS_FIXED.items() if config.get(key, value) != value}:
        said, known = (", ".join(f"{key} = {value}" for key, value in each.items()) for each in (other, EXPERTS_FIXED))
        raise UserError(f"{origin}: {said}, which is not imported", hint=f"the released models have {known}")


def _number(value: Any) -> float:
    """Return a number, infinity too, which transformers 5 writes as `{"__float__": "Infinity"}`."""
    return float(value["__float__"] if isinstance(value, Mapping) else value)


def _pattern(config: Mapping[str, Any], origin: str) -> str:
    pattern = config.get("hybrid_override_pattern")
    if not pattern:
        types = config.get("layers_block_type") or config.get("layer_types")
        if not types or not isinstance(types, list):
            raise UserError(f"{origin}: neither hybrid_override_pattern nor a list layers_block_type is there")
        unknown = sorted({str(kind) for kind in types} - set(_LAYER_TYPES))
        if unknown:
            raise UserError(f"{origin}: layers of type {', '.join(unknown)}, which this family does not have")
        pattern = "".join(kind_named(_LAYER_TYPES[kind]).letter for kind in types)
    if not isinstance(pattern, str):
        raise UserError(f"{origin}: hybrid_override_pattern is {pattern!r}; a letter for each layer is needed")
    layers = config.get("num_hidden_layers", len(pattern))
    if layers != len(pattern):
        raise UserError(f"{origin}: num_hidden_layers is {layers!r}, the pattern {pattern} has {len(pattern)} layers")
    others = [
        f"{kind.title} ({letter})" for letter, kind in KINDS.items() if letter in pattern and kind.name not in _READ
    ]
    if others:
        raise UserError(f"{origin}: the pattern {pattern} has {', '.join(others)}, which is not imported")
    return pattern
