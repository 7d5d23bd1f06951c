"""A dense Transformer as Hugging Face's `config.json` of type `llama`, `qwen2` or `qwen3`, and back. Imports no torch.

Each layer there is two of the pattern: attention and SwiGLU. The types differ in their attention: that of `qwen2` has
biases, that of `qwen3` a norm of each head's query and key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemotron_h.architecture.definition import Expect, ModelDefinition
from nemotron_h.architecture.multipliers import ONES
from nemotron_h.architecture.positions import SCALING_KEYS
from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import check_name, nearest
from nemotron_h.export.config import OURS, check_uniform, positive, rope_base

FAMILY = "llama"
PAIR = "*S"

#: definition -> config.json, where both hold one value
KEYS = {
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "norm_epsilon": "rms_norm_eps",
    "init_std": "initializer_range",
}
_FLOATS = ("norm_epsilon", "init_std")
#: transformers' defaults, which a file that says nothing means
_DEFAULTS = {"rms_norm_eps": 1e-6, "initializer_range": 0.02, "rope_theta": 10_000.0}
#: of Llama 3.1's scaling, in the order of `SCALING_KEYS`
_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
#: keys that are written or have been, and the one value that is read; it is also what a file means that has no such key
_NOTHING = {
    "pretraining_tp": 1,
    "rope_interleaved": False,
    "partial_rotary_factor": 1.0,
    "use_mrope": False,
    "quantization_config": None,
}
#: what else transformers or the releases write, and no number of the model depends on
_WITHOUT_EFFECT = {
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "is_llama_config",
    "max_position_embeddings",
    "pad_token_id",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "use_cache",
    "_attn_implementation_autoset",
    "_name_or_path",
}
_READ = {
    *("model_type", "num_hidden_layers", "tie_word_embeddings", "layer_types"),
    *("rope_theta", "rope_scaling", "rope_parameters"),
}


@dataclass(frozen=True)
class _Type:
    """A type of models.

    Attributes:
        architecture: transformers' class.
        switches: of the definition, that all its models have.
        fixed: key -> the one value that is read and written; transformers' default too.
        idle: keys that these values leave without effect.
        derives_head_dim: a file without `head_dim` means the hidden size over the heads.
    """

    architecture: str
    switches: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    idle: tuple[str, ...] = ()
    derives_head_dim: bool = True


_WINDOW = ("sliding_window", "max_window_layers")
_SHARED = {"hidden_act": "silu", "attention_dropout": 0.0}
TYPES = {
    "llama": _Type("LlamaForCausalLM", (), {**_SHARED, "attention_bias": False, "mlp_bias": False}),
    "qwen2": _Type("Qwen2ForCausalLM", ("qkv_bias",), {**_SHARED, "use_sliding_window": False}, _WINDOW),
    "qwen3": _Type(
        "Qwen3ForCausalLM",
        ("qk_norm",),
        {**_SHARED, "attention_bias": False, "use_sliding_window": False},
        _WINDOW,
        derives_head_dim=False,
    ),
}
#: of all types
SWITCHES = tuple(key for each in TYPES.values() for key in each.switches)


def type_of(definition: ModelDefinition) -> str:
    """Return the type that has a model's attention.

    Errors:
        UserError: none has.
    """
    own = tuple(key for key in SWITCHES if getattr(definition, key))
    for name, each in TYPES.items():
        if each.switches == own:
            return name
    raise UserError(
        f"model {definition.name} has model.{' and model.'.join(own)}, which none of Hugging Face's {', '.join(TYPES)} "
        "has together",
        hint=OURS,
    )


def check_expressible(definition: ModelDefinition) -> None:
    """Refuse a model that no type can express.

    Errors:
        UserError: other kinds of layers, widths of their own in some, positions that are not rotary, multipliers.
    """
    reader = f"Hugging Face's {type_of(definition)}"
    check_uniform(definition, reader, {"attention", "swiglu"})
    if definition.position_embedding != "rope" or definition.rope_percent != 1:
        raise UserError(
            f"model {definition.name} does not rotate whole heads (model.position_embedding, model.rope_percent); "
            f"{reader} does, so it would compute something else",
            hint=OURS,
        )
    if definition.scales != ONES:
        raise UserError(f"model {definition.name} has model.multipliers, which {reader} does not know", hint=OURS)


def to_config(
    definition: ModelDefinition, *, dtype: str, max_positions: int, token_ids: Mapping[str, int | None]
) -> dict[str, Any]:
    """Return the content of `config.json`; arguments as of `config.to_config`.

    Errors:
        UserError: as of `check_expressible`.
    """
    check_expressible(definition)
    name, d = type_of(definition), definition
    widths = {theirs: getattr(d, ours) for ours, theirs in KEYS.items()}
    if name == "qwen2" and d.head_dim * d.num_attention_heads == d.hidden_size:
        del widths["head_dim"]  # the releases have no such key
    return {
        "architectures": [TYPES[name].architecture],
        "model_type": name,
        **widths,
        "num_hidden_layers": d.num_layers // len(PAIR),
        "rope_theta": float(d.rope_base),
        "rope_scaling": _scaling_of(d),
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": d.tied_embeddings,
        **TYPES[name].fixed,
        "use_cache": True,
        **token_ids,
        "torch_dtype": dtype,
    }


def _scaling_of(definition: ModelDefinition) -> dict[str, Any] | None:
    if definition.rope_scaling is None:
        return None
    return {**dict(zip(_SCALING, definition.rope_scaling, strict=True)), "rope_type": "llama3"}


def from_config(config: Mapping[str, Any], name: str, origin: str) -> ModelDefinition:
    """Return the definition, with its counts in `expect`, that a `config.json` describes.

    Args:
        config: the file's content, as transformers, the hub or `to_config` wrote it.
        name: of the definition.
        origin: the file, to name in an error.
    Errors:
        UserError: a key that is not known; a variant that is not imported; a value is missing.
    """
    check_name("the model's name", name, f"{origin}: ")
    model_type = config["model_type"]
    of_type = TYPES[model_type]
    fixed = {**of_type.fixed, **_NOTHING}
    known = {*KEYS.values(), *fixed, *of_type.idle, *_WITHOUT_EFFECT, *_READ}
    if unknown := sorted(set(config) - known):
        raise UserError(
            f"{origin}: {model_type} has no key {', '.join(unknown)} here: what it would change is not known",
            hint=f"{nearest(unknown[0], known)}Save the model anew by transformers, or remove what has no effect",
        )
    if wrong := [key for key, value in fixed.items() if config.get(key, value) != value]:
        said = ", ".join(f"{key} = {config[key]}" for key in wrong)
        needed = ", ".join(f"{key} = {fixed[key]}" for key in wrong)
        raise UserError(f"{origin}: {said}, which is not imported", hint=f"models with {needed} are")
    layers = int(positive(config.get("num_hidden_layers"), "num_hidden_layers", origin, whole=True))
    _check_layer_types(config.get("layer_types"), layers, origin)
    tied = config.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise UserError(f"{origin}: tie_word_embeddings is {tied!r}; true or false is needed")
    definition = ModelDefinition(
        name=name,
        family=FAMILY,
        pattern=PAIR * layers,
        expect=Expect(),
        position_embedding="rope",
        rope_percent=1.0,
        tied_embeddings=tied,
        **dict.fromkeys(of_type.switches, True),
        **_positions(config, origin),
        **{ours: _value(config, theirs, origin, of_type, ours not in _FLOATS) for ours, theirs in KEYS.items()},
    )
    definition.validate_structure(origin)
    return definition.counted()


def _value(config: Mapping[str, Any], key: str, origin: str, of_type: _Type, whole: bool) -> int | float:
    value = config.get(key, _DEFAULTS.get(key))
    if key == "num_key_value_heads" and value is None:
        value = config.get("num_attention_heads")
    if key == "head_dim" and value is None and of_type.derives_head_dim:
        sizes = (positive(config.get(k), k, origin, whole=True) for k in ("hidden_size", "num_attention_heads"))
        hidden, heads = sizes
        if hidden % heads:
            raise UserError(f"{origin}: hidden_size = {hidden} is not a multiple of num_attention_heads = {heads}")
        return hidden // heads
    return positive(value, key, origin, whole=whole)


def _check_layer_types(types: Any, layers: int, origin: str) -> None:
    if types is not None and types != ["full_attention"] * layers:
        raise UserError(
            f"{origin}: layer_types is {types}; {layers} times full_attention is imported",
            hint="attention to a window is not: a model that has it in no layer says so by use_sliding_window: false",
        )


def _positions(config: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Return base and scaling: `rope_theta` and `rope_scaling` of transformers 4, or `rope_parameters` of 5."""
    key = "rope_parameters" if config.get("rope_parameters") is not None else "rope_scaling"
    stated = config.get(key) or {}
    if not isinstance(stated, Mapping):
        raise UserError(f"{origin}: {key} is {stated!r}; a mapping or null is needed")
    stated = dict(stated)
    base = stated.pop("rope_theta", config.get("rope_theta", _DEFAULTS["rope_theta"]))
    kinds = {stated.pop(name) for name in ("rope_type", "type") if name in stated} or {"default"}
    scales = {"default": (), "llama3": _SCALING}
    if len(kinds) > 1 or not kinds <= set(scales):
        raise UserError(
            f"{origin}: {key}.rope_type = {' and '.join(map(str, kinds))}, which is not imported",
            hint=f"positions of the types {' and '.join(scales)} are",
        )
    names = scales[kinds.pop()]
    if unknown := sorted(set(stated) - set(names)):
        raise UserError(f"{origin}: {key} has {', '.join(unknown)}: what it would change is not known")
    values = [positive(stated.get(n), f"{key}.{n}", origin, whole=n == _SCALING[-1]) for n in names]
    scaling = dict(zip(SCALING_KEYS, map(_as_written, SCALING_KEYS, values), strict=False))
    return {"rope_base": rope_base(base, origin), **scaling}


def _as_written(key: str, value: float) -> int | float:
    """Return a number in the type of its key in the definition."""
    return value if key == SCALING_KEYS[-1] else float(value)
