"""A model definition as Hugging Face's `config.json` of type `falcon_h1`, and back. Imports no torch.

Each layer there is two of the pattern: attention beside Mamba-2, and SwiGLU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemotron_h.architecture.definition import Expect, ModelDefinition
from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import check_name, nearest
from nemotron_h.export.config import OURS, check_uniform, positive, rope_base
from nemotron_h.schema.multipliers import MultipliersSchema

MODEL_TYPE = FAMILY = "falcon_h1"
PAIR = "PS"

#: definition -> config.json, where both hold one value
KEYS = {
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "head_dim": "head_dim",
    "mamba_num_heads": "mamba_n_heads",
    "mamba_head_dim": "mamba_d_head",
    "mamba_num_groups": "mamba_n_groups",
    "mamba_state_dim": "mamba_d_state",
    "conv_kernel": "mamba_d_conv",
    "vocab_size": "vocab_size",
    "norm_epsilon": "rms_norm_eps",
    "init_std": "initializer_range",
}
_FLOATS = ("norm_epsilon", "init_std")

#: what every released model has -> transformers' default, which a file that says nothing means
FIXED = {
    "hidden_act": ("silu", "silu"),
    "attention_bias": (False, False),
    "attention_dropout": (0.0, 0.0),
    "mlp_bias": (False, False),
    "mamba_conv_bias": (True, True),
    "mamba_proj_bias": (False, False),
    "projectors_bias": (False, False),
    "mamba_norm_before_gate": (False, True),
    "rope_scaling": (None, None),
    "tie_word_embeddings": (False, False),
}
#: key -> the multipliers that it holds, one or a list
MULTIPLIERS = {
    "embedding_multiplier": "embedding",
    "lm_head_multiplier": "head",
    "attention_in_multiplier": "attention_in",
    "attention_out_multiplier": "attention_out",
    "key_multiplier": "key",
    "ssm_in_multiplier": "ssm_in",
    "ssm_out_multiplier": "ssm_out",
    "ssm_multipliers": ("ssm_z", "ssm_x", "ssm_b", "ssm_c", "ssm_dt"),
    "mlp_multipliers": ("ffn_gate", "ffn_down"),
}
#: what else transformers or the releases write, and no number of the model depends on
_WITHOUT_EFFECT = {
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "mamba_chunk_size",
    "mamba_expand",
    "mamba_use_mlp",
    "max_position_embeddings",
    "mlp_expansion_factor",
    "num_logits_to_keep",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "_name_or_path",
}
_READ = {"model_type", "num_hidden_layers", "mamba_d_ssm", "mamba_rms_norm", "rope_theta", "rope_parameters"}
#: ours: tokens of a chunk of transformers' scan, as the releases have it; results do not depend on it
CHUNK = 128


def check_expressible(definition: ModelDefinition, reader: str = f"Hugging Face's {MODEL_TYPE}") -> None:
    """Refuse a model that the type cannot express.

    Args:
        definition: the model.
        reader: the format, in words.
    Errors:
        UserError: other kinds or orders of layers, widths of their own in some, positions that are not rotary.
    """
    check_uniform(definition, reader, {"parallel", "swiglu"})
    if definition.position_embedding != "rope" or definition.rope_percent != 1:
        raise UserError(
            f"model {definition.name} does not rotate whole heads (model.position_embedding, model.rope_percent); "
            f"{reader} does, so it would compute something else",
            hint="keep it as a checkpoint of ours: training and generation take it",
        )
    wrong = {"tied_embeddings": definition.tied_embeddings, "rope_scaling_factor": definition.rope_scaling is not None}
    if lacks := [key for key, lacking in wrong.items() if lacking]:
        raise UserError(
            f"model {definition.name} has model.{' and model.'.join(lacks)}, which {reader} does not know", hint=OURS
        )


def to_config(
    definition: ModelDefinition, *, dtype: str, max_positions: int, token_ids: Mapping[str, int | None]
) -> dict[str, Any]:
    """Return the content of `config.json`; arguments as of `config.to_config`.

    Errors:
        UserError: as of `check_expressible`.
    """
    check_expressible(definition)
    scales = definition.scales
    return {
        "architectures": ["FalconH1ForCausalLM"],
        "model_type": MODEL_TYPE,
        **{theirs: getattr(definition, ours) for ours, theirs in KEYS.items()},
        "num_hidden_layers": definition.num_layers // len(PAIR),
        "mamba_d_ssm": definition.mamba_num_heads * definition.mamba_head_dim,
        "mamba_rms_norm": definition.mamba_norm,
        "mamba_chunk_size": CHUNK,
        "rope_theta": definition.rope_base,
        "max_position_embeddings": max_positions,
        **{key: value for key, (value, _) in FIXED.items()},
        **{
            key: getattr(scales, names) if isinstance(names, str) else [getattr(scales, name) for name in names]
            for key, names in MULTIPLIERS.items()
        },
        "use_cache": True,
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
        UserError: a key that is not known; a variant that this family does not have; a value is missing.
    """
    check_name("the model's name", name, f"{origin}: ")
    known = {*KEYS.values(), *FIXED, *MULTIPLIERS, *_WITHOUT_EFFECT, *_READ}
    if unknown := sorted(set(config) - known):
        raise UserError(
            f"{origin}: {MODEL_TYPE} has no key {', '.join(unknown)}: what it would change is not known",
            hint=f"{nearest(unknown[0], known)}Save the model anew by transformers, or remove what has no effect",
        )
    wrong = [key for key, (value, default) in FIXED.items() if config.get(key, default) != value]
    if wrong:
        said = (
            f"{key} = {config[key]}" if key in config else f"{key} is not stated, so {FIXED[key][1]}" for key in wrong
        )
        raise UserError(f"{origin}: {', '.join(said)}, which no released {MODEL_TYPE} has and this family cannot run")
    values = {ours: _value(config, theirs, origin, ours not in _FLOATS) for ours, theirs in KEYS.items()}
    layers = positive(config.get("num_hidden_layers"), "num_hidden_layers", origin, whole=True)
    inner = config.get("mamba_d_ssm")
    if inner != values["mamba_num_heads"] * values["mamba_head_dim"]:
        raise UserError(
            f"{origin}: mamba_d_ssm is {inner!r}, mamba_n_heads x mamba_d_head is "
            f"{values['mamba_num_heads']} x {values['mamba_head_dim']}"
        )
    norm = config.get("mamba_rms_norm", False)
    if not isinstance(norm, bool):
        raise UserError(f"{origin}: mamba_rms_norm is {norm!r}; true or false is needed")
    definition = ModelDefinition(
        name=name,
        family=FAMILY,
        pattern=PAIR * int(layers),
        expect=Expect(),
        mamba_norm=norm,
        multipliers=_multipliers(config, origin),
        position_embedding="rope",
        rope_base=_rope_base(config, origin),
        rope_percent=1.0,
        **values,
    )
    definition.validate_structure(origin)
    return definition.counted()


def _value(config: Mapping[str, Any], key: str, origin: str, whole: bool) -> int | float:
    value = config.get(key)
    if key == "head_dim" and value is None:
        heads = positive(config.get("num_attention_heads"), "num_attention_heads", origin, whole=True)
        return positive(config.get("hidden_size"), "hidden_size", origin, whole=True) // heads
    if key == "mamba_d_head" and value in (None, "auto"):
        heads = positive(config.get("mamba_n_heads"), "mamba_n_heads", origin, whole=True)
        return positive(config.get("mamba_d_ssm"), "mamba_d_ssm", origin, whole=True) // heads
    return positive(value, key, origin, whole=whole)


def _rope_base(config: Mapping[str, Any], origin: str) -> int:
    """Return the base, where transformers 4 (`rope_theta`) or 5 (`rope_parameters`) writes it."""
    stated = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta")}
    if not isinstance(stated, Mapping) or stated.get("rope_type", "default") != "default":
        raise UserError(f"{origin}: rope_parameters = {stated}, which no released {MODEL_TYPE} has")
    return rope_base(stated.get("rope_theta", config.get("rope_theta")), origin)


def _multipliers(config: Mapping[str, Any], origin: str) -> MultipliersSchema:
    found: dict[str, Any] = {}
    for key, names in MULTIPLIERS.items():
        stated = config.get(key)
        if stated is None:
            continue
        if isinstance(names, str):
            names, stated = (names,), [stated]
        if not isinstance(stated, list) or len(stated) != len(names):
            raise UserError(f"{origin}: {key} is {stated!r}; {len(names)} numbers are needed")
        values = (positive(value, key, origin, whole=False) for value in stated)
        found |= {name: float(value) for name, value in zip(names, values, strict=True) if value != 1}
    return MultipliersSchema(**found)
