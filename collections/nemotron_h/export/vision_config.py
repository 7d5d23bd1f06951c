"""An image encoder as Hugging Face's `config.json` of type `internvl_vision`, and back; a projector. Imports no torch.

The released InternViT folders are of another type, `intern_vit_6b`, whose code comes with them: their keys and names of
tensors are read too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nemotron_h.architecture.vision import VISION, Encoder
from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import check_name, nearest
from nemotron_h.export.config import OURS, positive
from nemotron_h.schema.vision import ProjectorSchema, VisionSchema

MODEL_TYPE, RELEASED_TYPE = "internvl_vision", "intern_vit_6b"
#: `model_type` of the folder of a whole model, and of its projector
WHOLE_TYPE, PROJECTOR_TYPE = "nemotron_h_vlm", "nemotron_h_projector"
_NORMS = {"layernorm": "layer_norm", "rmsnorm": "rms_norm"}
#: of transformers' norms of queries and keys, whatever the others have
_QK_EPSILON = 1e-6


@dataclass(frozen=True)
class _Type:
    """A type of encoders.

    Attributes:
        keys: key of `VisionSchema` -> that of config.json.
        defaults: what a file means that does not say it.
        fixed: key -> the one value that is read and written.
        idle: keys that change no number of a trained model.
    """

    keys: Mapping[str, str]
    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any]
    idle: tuple[str, ...] = field(default=())


_SHARED = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "norm": "norm_type",
    "norm_epsilon": "layer_norm_eps",
    "init_std": "initializer_range",
}
_WITHOUT_EFFECT = (
    *("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "_name_or_path"),
    "_attn_implementation_autoset",
)
TYPES = {
    MODEL_TYPE: _Type(
        {**_SHARED, "qkv_bias": "attention_bias", "qk_norm": "use_qk_norm", "layer_scale": "layer_scale_init_value"},
        {
            "num_hidden_layers": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "image_size": [448, 448],
            "patch_size": [14, 14],
            "norm_type": "layer_norm",
            "layer_norm_eps": 1e-6,
            "initializer_range": 0.02,
            "attention_bias": False,
            "use_qk_norm": False,
            "layer_scale_init_value": 0.1,
        },
        {
            "hidden_act": "gelu",
            "num_channels": 3,
            "use_mask_token": False,
            "use_mean_pooling": True,
            "use_absolute_position_embeddings": True,
            "hidden_dropout_prob": 0.0,
            "attention_dropout": 0.0,
            "projection_dropout": 0.0,
        },
    ),
    RELEASED_TYPE: _Type(
        {**_SHARED, "qkv_bias": "qkv_bias", "qk_norm": "qk_normalization", "layer_scale": "initializer_factor"},
        {},
        {"hidden_act": "gelu", "num_channels": 3, "dropout": 0.0, "attention_dropout": 0.0},
        ("drop_path_rate", "use_flash_attn", "use_bfloat16"),
    ),
}
#: name inside an encoder of `MODEL_TYPE` -> of `RELEASED_TYPE`, which has queries, keys and values in one
_RELEASED_NAMES = (
    (r"embeddings\.cls_token", "embeddings.class_embedding"),
    (r"embeddings\.position_embeddings", "embeddings.position_embedding"),
    (r"embeddings\.patch_embeddings\.projection", "embeddings.patch_embedding"),
    (r"encoder\.layer\.", "encoder.layers."),
    (r"attention\.[qkv]_proj", "attn.qkv"),
    (r"attention\.projection_layer", "attn.proj"),
    (r"attention\.", "attn."),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"lambda_", "ls"),
)


def stored_names(theirs: Iterable[str], model_type: str) -> list[str]:
    """Return the names in an encoder's folder of the tensors that make up a row, in the order of their rows.

    Args:
        theirs: names of `Encoder.tensors`.
    """
    names = [name.removeprefix(f"{VISION}.") for name in theirs]
    if model_type == RELEASED_TYPE:
        for pattern, name in _RELEASED_NAMES:
            names = [re.sub(pattern, name, each) for each in names]
    return list(dict.fromkeys(names))


def to_config(encoder: Encoder, dtype: str) -> dict[str, Any]:
    """Return the content of an encoder's `config.json`.

    Errors:
        UserError: transformers' type cannot express it.
    """
    widths, of_type = encoder.widths, TYPES[MODEL_TYPE]
    _check_epsilon(widths, f"model.vision ({widths.name})", OURS)
    values = {theirs: getattr(widths, ours) for ours, theirs in of_type.keys.items()}
    sides = {key: [values[key]] * 2 for key in ("image_size", "patch_size")}
    return {
        "architectures": ["InternVLVisionModel"],
        "model_type": MODEL_TYPE,
        **values,
        **sides,
        "norm_type": _NORMS[widths.norm],
        **of_type.fixed,
        "torch_dtype": dtype,
    }


def from_config(config: Mapping[str, Any], name: str, origin: str) -> VisionSchema:
    """Return the encoder that a `config.json` describes.

    Args:
        config: the file's content.
        name: of the encoder.
        origin: the file, to name in an error.
    Errors:
        UserError: another type, a key that is not known, a variant that is not imported, a value is missing.
    """
    check_name("the encoder's name", name, f"{origin}: ")
    found = config.get("model_type")
    if found not in TYPES:
        raise UserError(
            f"{origin}: model_type is {found}; of image encoders {' and '.join(TYPES)} are read",
            hint="give the folder of an InternViT, as its release or transformers has it",
        )
    of_type = TYPES[found]
    known = {*of_type.keys.values(), *of_type.fixed, *of_type.idle, *_WITHOUT_EFFECT, "model_type"}
    if unknown := sorted(set(config) - known):
        raise UserError(
            f"{origin}: {found} has no key {', '.join(unknown)} here: what it would change is not known",
            hint=f"{nearest(unknown[0], known)}Remove what has no effect.",
        )
    if wrong := [key for key, value in of_type.fixed.items() if config.get(key, value) != value]:
        said = ", ".join(f"{key} = {config[key]}" for key in wrong)
        raise UserError(
            f"{origin}: {said}, which is not imported",
            hint=f"encoders with {', '.join(f'{key} = {of_type.fixed[key]}' for key in wrong)} are",
        )
    values = {ours: _value(config, of_type, ours, theirs, origin) for ours, theirs in of_type.keys.items()}
    widths = VisionSchema(name=name, **values)
    if found == MODEL_TYPE:
        _check_epsilon(widths, origin, "save it with layer_norm_eps = 1e-6")
    return widths


def _check_epsilon(widths: VisionSchema, origin: str, hint: str) -> None:
    if widths.qk_norm and widths.norm_epsilon != _QK_EPSILON:
        raise UserError(
            f"{origin}: norms have the epsilon {widths.norm_epsilon:g}, and {MODEL_TYPE} has {_QK_EPSILON:g} in those "
            "of queries and keys",
            hint=hint,
        )


def _value(config: Mapping[str, Any], of_type: _Type, ours: str, theirs: str, origin: str) -> Any:
    value = config.get(theirs, of_type.defaults.get(theirs))
    if ours in ("qkv_bias", "qk_norm"):
        if not isinstance(value, bool):
            raise UserError(f"{origin}: {theirs} is {value!r}; true or false is needed")
        return value
    if ours == "norm":
        norms = {theirs: ours for ours, theirs in _NORMS.items()}
        if value not in norms:
            raise UserError(f"{origin}: {theirs} is {value!r}; {' or '.join(norms)} is needed")
        return norms[value]
    if isinstance(value, list):
        if len(value) != 2 or value[0] != value[1]:
            raise UserError(f"{origin}: {theirs} is {value}; tiles and patches are squares here")
        value = value[0]
    return positive(value, theirs, origin, whole=ours not in ("norm_epsilon", "init_std", "layer_scale"))


def projector_config(encoder: Encoder, dtype: str) -> dict[str, Any]:
    """Return the content of a projector's `config.json`."""
    projector = encoder.projector
    return {
        "model_type": PROJECTOR_TYPE,
        "input_size": projector.hidden_size,
        "intermediate_size": projector.ffn_hidden_size,
        "output_size": projector.output_size,
        "rms_norm_eps": encoder.projector_epsilon,
        "hidden_act": "relu2",
        "torch_dtype": dtype,
    }


def projector_from_config(config: Mapping[str, Any], origin: str) -> ProjectorSchema:
    """Return the projector that a `config.json` describes; its other widths follow from its neighbours.

    Errors:
        UserError: another type, or a value is missing.
    """
    for key, value in (("model_type", PROJECTOR_TYPE), ("hidden_act", "relu2")):
        if config.get(key) != value:
            raise UserError(f"{origin}: {key} is {config.get(key)!r}; {value} is read")
    inner = positive(config.get("intermediate_size"), "intermediate_size", origin, whole=True)
    epsilon = positive(config.get("rms_norm_eps"), "rms_norm_eps", origin, whole=False)
    return ProjectorSchema(int(inner), float(epsilon))
