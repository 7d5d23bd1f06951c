"""The model definition: pattern and widths in, counts and shapes out. Imports no torch.

Every stage (training, planning, export, compression) reads a model through this file; `configs/model/<name>.yaml`
holds the numbers once.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from nemotron_h.architecture.blocks.block import Block
from nemotron_h.architecture.blocks.families import FAMILIES, check_pattern
from nemotron_h.architecture.blocks.registry import KINDS
from nemotron_h.architecture.multipliers import Multipliers, check_multipliers, resolve
from nemotron_h.architecture.positions import POSITION_EMBEDDINGS, SCALING_KEYS, check_positions
from nemotron_h.architecture.vision import Encoder, check_vision
from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import check_number, nearest, ranges
from nemotron_h.schema.multipliers import MultipliersSchema
from nemotron_h.schema.recipe import ModelSchema
from nemotron_h.schema.vision import ProjectorSchema, VisionSchema

_WHOLE = {each.name for each in fields(ModelSchema) if each.type == "int"}
#: what a block is made of, beside multipliers: numbers of the model
_BLOCK_KEYS = tuple(each.name for each in fields(ModelSchema) if each.type in ("int", "float", "bool"))
#: keys with keys of their own
_NESTED = {"multipliers": MultipliersSchema, "vision": VisionSchema, "projector": ProjectorSchema}
#: what kinds of layers have parts for or not -> value of a model that says nothing
SWITCHES: dict[str, bool] = {
    each.name: each.default
    for each in fields(ModelSchema)
    if any(each.name in kind.switches for kind in KINDS.values())
}


@dataclass(frozen=True)
class Expect:
    """Counts that the definition states and loading checks; parameters are without vocabulary padding.

    Attributes:
        mamba, attention, ffn, parallel, swiglu, experts, linear: layers of each kind.
        parameters: of the language model, without `mtp`.
        active: of these, what one token passes; 0 in a model without experts, where it passes all.
        mtp: parameters of the block that predicts further tokens.
        vision: parameters of the image encoder.
    """

    mamba: int = 0
    attention: int = 0
    ffn: int = 0
    parameters: int = 0
    parallel: int = 0
    swiglu: int = 0
    experts: int = 0
    linear: int = 0
    active: int = 0
    mtp: int = 0
    vision: int = 0


@dataclass(frozen=True)
class ModelDefinition:
    """A model of the family: one letter per layer, one set of widths, and other widths in some layers.

    Widths of kinds of layers that the pattern lacks are 0, which is how they are left out.

    Attributes:
        name: the name of the definition, as in `configs/model/<name>.yaml`.
        family: which rules the pattern follows: `nemotron_h` (paper 2.1), `transformer` (attention and FFN in pairs),
            `mamba2` (Mamba-2 alone), `llama` (attention and SwiGLU in pairs), `falcon_h1` (attention beside Mamba-2,
            and SwiGLU, in pairs), or `pruned`: any order, as removing layers leaves it.
        pattern: one letter per layer: `M` Mamba-2, `*` attention, `-` FFN, `P` attention beside Mamba-2, `S` SwiGLU,
            `E` a mixture of experts, `L` a linear layer.
        hidden_size: width of the residual stream.
        ffn_hidden_size: inner width of each FFN: squared ReLU without a gate, or SwiGLU.
        num_attention_heads, num_query_groups, head_dim: grouped-query attention; `num_query_groups` is the number of
            key-value heads. `num_attention_heads * head_dim` need not be `hidden_size`.
        mamba_num_heads, mamba_head_dim, mamba_num_groups, mamba_state_dim: Mamba-2 heads, their width, the groups
            that share B and C, and the state per channel.
        conv_kernel: window of the causal convolution.
        num_experts, experts_per_token: routed experts of a layer, and how many of them a token passes.
        expert_hidden_size, shared_expert_hidden_size: inner widths of each routed expert and of the shared one.
        expert_scaling: the routed experts' weights, which sum to 1, are multiplied by it.
        expert_latent_size: width of the routed experts' inputs and outputs, between two linear layers; 0 is
            `hidden_size`, without these.
        mtp_pattern: layers of the block that predicts further tokens, such as `*E` (multi-token prediction, arXiv
            2412.19437 2.2); empty is none. It also has a linear layer of a token's embedding and the state before, and
            three norms.
        mtp_steps: how many further tokens it predicts, one after the other by the same weights.
        mamba_norm: an RMSNorm follows the gate of each mixer; false leaves it out.
        position_embedding: `none` (paper 2.1), or `rope` (rotary, in attention layers).
        rope_base: base of the rotary angles' wave lengths, with `rope` only.
        rope_percent: part of each head that is rotated, in (0, 1], with `rope` only.
        rope_scaling_factor, rope_low_freq_factor, rope_high_freq_factor, rope_original_length: Llama 3.1's scaling of
            the rotary angles (`architecture/positions.py`); 0 leaves them as they are.
        qkv_bias: the projections of queries, keys and values have biases (Qwen2).
        qk_norm: an RMSNorm of each head's query and key, before they are rotated (Qwen3).
        tied_embeddings: the output matrix is the embedding.
        vocab_size: rows of the embedding and output matrices, before padding.
        norm_epsilon: of every RMSNorm.
        init_std: standard deviation of the initial weights.
        multipliers: factors of activations, stated or by a rule of the shape.
        vision, projector: image encoder, and what maps its patches to image tokens; None reads text alone.
        overrides: layer -> widths of its own, such as `{18: {num_query_groups: 4}}`; a searched child's layers differ.
        expect: counts that must come out.
        sources: where the values come from (`paper 2.1`, `ours: ...`), by key.
    """

    name: str
    pattern: str
    hidden_size: int
    vocab_size: int
    expect: Expect
    family: str = "nemotron_h"
    ffn_hidden_size: int = 0
    num_attention_heads: int = 0
    num_query_groups: int = 0
    head_dim: int = 0
    mamba_num_heads: int = 0
    mamba_head_dim: int = 0
    mamba_num_groups: int = 0
    mamba_state_dim: int = 0
    conv_kernel: int = 0
    num_experts: int = 0
    experts_per_token: int = 0
    expert_hidden_size: int = 0
    shared_expert_hidden_size: int = 0
    expert_scaling: float = 0.0
    expert_latent_size: int = 0
    mtp_pattern: str = ""
    mtp_steps: int = 0
    mamba_norm: bool = True
    position_embedding: str = "none"
    rope_base: int = 0
    rope_percent: float = 0.0
    rope_scaling_factor: float = 0.0
    rope_low_freq_factor: float = 0.0
    rope_high_freq_factor: float = 0.0
    rope_original_length: int = 0
    qkv_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    norm_epsilon: float = 1e-5
    init_std: float = 0.02
    multipliers: MultipliersSchema = field(default_factory=MultipliersSchema)
    vision: VisionSchema | None = None
    projector: ProjectorSchema | None = None
    overrides: dict[int, dict[str, int]] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Hydra and JSON have numbers of layers as text
        numbered = {int(n) if str(n).isdecimal() else n: dict(widths) for n, widths in self.overrides.items()}
        object.__setattr__(self, "overrides", numbered)
        for key, schema in _NESTED.items():
            if isinstance(values := getattr(self, key), Mapping):  # of a recipe or a record
                object.__setattr__(self, key, schema(**values))

    @property
    def num_layers(self) -> int:
        """Return the layers of all kinds."""
        return len(self.pattern)

    @property
    def rotary_dim(self) -> int:
        """Return the channels of each head that are rotated; 0 without rotary positions."""
        return int(self.head_dim * self.rope_percent)

    @property
    def rope_scaling(self) -> tuple[float, float, float, int] | None:
        """Return the values of `SCALING_KEYS`; None where the rotary angles are not scaled."""
        return tuple(getattr(self, key) for key in SCALING_KEYS) if self.rope_scaling_factor else None

    @cached_property
    def scales(self) -> Multipliers:
        """Return the factors of activations: those that are stated, and the rule's."""
        return resolve(self.multipliers, {name: getattr(self, name) for name in _BLOCK_KEYS})

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Return the layers, each with its own widths."""
        return tuple(self.block(letter, self.overrides.get(index, {})) for index, letter in enumerate(self.pattern))

    @cached_property
    def mtp_blocks(self) -> tuple[Block, ...]:
        """Return the layers of the block that predicts further tokens."""
        return tuple(self.block(letter) for letter in self.mtp_pattern)

    @property
    def encoder(self) -> Encoder | None:
        """Return the image encoder and the projector; None of a model that reads text alone."""
        return None if self.vision is None else Encoder.of(self)

    @property
    def kinds(self) -> tuple[type[Block], ...]:
        """Return the kinds of the layers that there are, in the order of the registry."""
        return tuple(kind for letter, kind in KINDS.items() if letter in self.pattern)

    def block(self, letter: str, overrides: Mapping[str, int] | None = None) -> Block:
        """Return a layer of this letter with the model's widths, some of them overridden."""
        widths = {name: getattr(self, name) for name in _BLOCK_KEYS}
        return KINDS[letter].of({**widths, **(overrides or {}), "multipliers": self.scales})

    def count(self, symbol: str) -> int:
        """Return how many layers have this letter."""
        return self.pattern.count(symbol)

    @property
    def parameters(self) -> int:
        """Return all parameters of the language model, without vocabulary padding."""
        return sum(block.parameters for block in self.blocks) + self.other_parameters

    @property
    def vision_parameters(self) -> int:
        """Return the parameters of image encoder and projector; none of them are in `parameters`."""
        return self.encoder.parameters + self.encoder.projector.parameters if self.encoder else 0

    @property
    def has_experts(self) -> bool:
        """Tell whether tokens pass some of its parameters alone."""
        return any(kind.distributed for kind in self.kinds)

    @property
    def active_parameters(self) -> int:
        """Return the parameters that one token passes, as model cards count them: embedding and output included."""
        return sum(block.active_parameters for block in self.blocks) + self.other_parameters

    @property
    def mtp_parameters(self) -> int:
        """Return the parameters of the block that predicts further tokens; none of them are in `parameters`."""
        if not self.mtp_pattern:
            return 0
        # norms of the embedding, the state before and the output; a projection of the first two, concatenated
        return sum(block.parameters for block in self.mtp_blocks) + self.hidden_size * (2 * self.hidden_size + 3)

    def planned_only(self) -> dict[str, int | str]:
        """Return key -> value of what can be planned and not trained."""
        values = {key: getattr(self, key) for key in ("expert_latent_size", "mtp_pattern")}
        return {key: value for key, value in values.items() if value}

    @property
    def other_parameters(self) -> int:
        """Return the parameters outside of the layers: embedding, output, final norm."""
        looked_up = 0 if self.tied_embeddings else self.vocab_size * self.hidden_size
        return looked_up + self.output_parameters

    @property
    def output_parameters(self) -> int:
        """Return the parameters that the scores of a token take: output matrix, final norm."""
        return self.vocab_size * self.hidden_size + self.hidden_size

    def layer_counts(self) -> dict[str, int]:
        """Return name of a kind of layers -> how many there are, of all kinds."""
        return {kind.name: self.count(letter) for letter, kind in KINDS.items()}

    def counts(self) -> Expect:
        """Return what `expect` has to be."""
        names = {each.name for each in fields(Expect)}
        stated = {name: count for name, count in self.layer_counts().items() if name in names}
        active = self.active_parameters if self.has_experts else 0
        vision = self.encoder.parameters if self.encoder else 0
        return Expect(**stated, parameters=self.parameters, active=active, mtp=self.mtp_parameters, vision=vision)

    def counted(self) -> ModelDefinition:
        """Return the same model with `expect` filled in."""
        return replace(self, expect=self.counts())

    def differences(self, other: ModelDefinition, here: str, there: str, but: Container[str] = ()) -> list[str]:
        """Return what makes another model of this one, a text for each field.

        Args:
            here, there: words behind this model's value and the other's, such as `in the checkpoint`, `now`.
            but: fields that may differ, beside `expect` and `sources`.
        """
        return [
            f"{each.name}: {own} {here}, {others} {there}"
            for each in fields(self)
            if each.name not in ("expect", "sources") and each.name not in but
            if (own := getattr(self, each.name)) != (others := getattr(other, each.name))
        ]

    def validate(self, origin: str) -> None:
        """Check pattern, divisibility and `expect`.

        Args:
            origin: the file or recipe to name in an error.
        Errors:
            UserError: names the key, the origin, and the value that would fit.
        """
        self.validate_structure(origin)
        actual = self.counts()
        if actual != self.expect:
            wrong = [
                f"{f.name}: {getattr(actual, f.name):,} counted, {getattr(self.expect, f.name):,} expected"
                for f in fields(Expect)
                if getattr(actual, f.name) != getattr(self.expect, f.name)
            ]
            raise UserError(
                f"{origin}: model.expect does not match pattern and widths: {'; '.join(wrong)}",
                hint="correct model.pattern or the widths, or state the new counts in model.expect",
            )

    def validate_structure(self, origin: str) -> None:
        """Check that needed widths are set, the pattern's rules and divisibility: all of `validate` but `expect`."""
        for key, known in (("family", FAMILIES), ("position_embedding", POSITION_EMBEDDINGS)):
            value = getattr(self, key)
            if value not in known:
                hint = f"{nearest(value, known)}Known: {', '.join(known)}."
                raise UserError(f"{origin}: model.{key} = {value!r} is unknown", hint=hint)
        check_pattern(self.pattern, self.family, origin)
        self._validate_widths(origin)
        check_multipliers(self, origin)
        self._validate_overrides(origin)
        check_positions(self, origin)
        self._validate_mtp(origin)
        if self.vision or self.projector:
            check_vision(self, origin)
        names = {f.name for f in fields(self)}
        unknown = sorted(key for key in self.sources if key.partition(".")[0] not in names)
        if unknown:
            hint = nearest(unknown[0], names)
            raise UserError(
                f"{origin}: model.sources names {', '.join(unknown)}, which a model does not have", hint=hint
            )
        for index, block in enumerate(self.blocks):
            for dividend, divisor in block.divides:
                _check_divides(block, dividend, divisor, origin, index if index in self.overrides else None)
            for part, whole in block.at_most:
                a, b, where = getattr(block, part), getattr(block, whole), f"{origin}: model"
                if a > b:
                    raise UserError(f"{where}.{part} = {a} is above model.{whole} = {b}", hint=f"set it to {b} or less")

    def _validate_widths(self, origin: str) -> None:
        for key, allowed in ranges(ModelSchema).items():
            if key == "overrides" or "." in key:
                continue
            value = getattr(self, key)
            check_number(f"model.{key}", value, allowed, f"{origin}: ")
            if isinstance(value, float) and key in _WHOLE:
                raise UserError(f"{origin}: model.{key} = {value} is not a whole number")
        for kind in KINDS.values():
            for key in kind.widths:
                if kind in self.kinds:
                    if key not in kind.optional:
                        self._validate_positive(origin, key)
                elif getattr(self, key) and not any(key in other.widths for other in self.kinds):
                    raise UserError(
                        f"{origin}: model.{key} = {getattr(self, key)} has no use: "
                        f"the pattern has no {kind.letter} ({kind.name}) layer",
                        hint=f"leave model.{key} out, or add {kind.letter} to model.pattern",
                    )
        for key, default in SWITCHES.items():
            if getattr(self, key) == default:
                continue
            stated = f"{origin}: model.{key} = {str(not default).lower()}"
            if not any(key in kind.switches for kind in self.kinds):
                owners = " or ".join(kind.title for kind in KINDS.values() if key in kind.switches)
                raise UserError(f"{stated} has no use: the pattern has no {owners} layer", f"leave model.{key} out")
            if without := [kind for kind in self.kinds if key in kind.lacks]:
                names = ", ".join(f"{kind.letter} ({kind.title})" for kind in without)
                raise UserError(f"{stated}: layers {names} of the pattern have none", f"leave model.{key} out")

    def _validate_overrides(self, origin: str) -> None:
        for index, widths in self.overrides.items():
            key = f"{origin}: model.overrides.{index}"
            if not isinstance(index, int) or not 0 <= index < self.num_layers:
                raise UserError(
                    f"{key}: the model has no such layer", hint=f"layers are numbered 0 to {self.num_layers - 1}"
                )
            kind = KINDS[self.pattern[index]]
            for name, value in widths.items():
                if name not in kind.widths:
                    raise UserError(
                        f"{key}.{name}: a {kind.name} layer has no such width",
                        hint=f"{nearest(name, kind.widths)}Known: {', '.join(kind.widths) or 'none'}.",
                    )
                check_number(f"model.overrides.{index}.{name}", value, ranges(ModelSchema)[name], f"{origin}: ")
                if isinstance(value, float) or value <= 0:
                    raise UserError(f"{key}.{name} = {value} is not a positive whole number")

    def _validate_positive(self, origin: str, key: str) -> None:
        if (value := getattr(self, key)) <= 0:
            raise UserError(f"{origin}: model.{key} is {value}; it has to be positive", hint=f"give model.{key}")

    def _validate_mtp(self, origin: str) -> None:
        if self.mtp_pattern and (others := sorted(set(self.mtp_pattern) - set(self.pattern))):
            raise UserError(
                f"{origin}: model.mtp_pattern = {self.mtp_pattern} has {' '.join(others)}, which model.pattern has not",
                hint=f"use {' '.join(dict.fromkeys(self.pattern))}",
            )
        if bool(self.mtp_pattern) != (self.mtp_steps > 0):
            raise UserError(
                f"{origin}: model.mtp_pattern = {self.mtp_pattern!r} and model.mtp_steps = {self.mtp_steps}",
                hint="state both, such as *E and 1, or leave both out",
            )

    def validate_expert_parallel(self, size: int, ranks: int, origin: str) -> None:
        """Check that the experts split over `size` ranks, and that these are among the ranks of a pipeline stage.

        Args:
            size: expert-parallel ranks.
            ranks: tensor- times data-parallel ranks, over which they lie.
            origin: the file or recipe to name in an error.
        Errors:
            UserError: names the key, and the nearest size that fits.
        """
        counts = {key: getattr(block, key) for block in self.blocks for key in block.distributed}
        if not self.has_experts and size > 1:
            raise UserError(
                f"{origin}: parallel.expert = {size} is unused: model {self.name} has no experts",
                hint="leave parallel.expert out",
            )
        bad = [f"{key} = {value} of model {self.name}" for key, value in counts.items() if size < 1 or value % size]
        if size < 1 or ranks % size:
            bad.append(f"the {ranks} ranks of a pipeline stage (parallel.nodes * devices / pipeline)")
        if bad:
            common = math.gcd(ranks, *counts.values())
            fits = [n for n in range(1, common + 1) if common % n == 0]
            raise UserError(
                f"{origin}: parallel.expert = {size} does not divide {', nor '.join(bad)}",
                hint=f"nearest: {min(fits, key=lambda n: abs(n - size))}; sizes that fit: {', '.join(map(str, fits))}",
            )

    def validate_tensor_parallel(self, size: int, origin: str) -> None:
        """Check that every sharded dimension splits over `size` ranks.

        Args:
            size: tensor-parallel ranks.
            origin: the file or recipe to name in an error.
        Errors:
            UserError: names the dimensions, and the nearest size that fits.
        """
        sharded: dict[str, int] = {}
        for index, block in enumerate(self.blocks):
            own = self.overrides.get(index, {})
            for name in block.sharded:
                sharded[f"overrides.{index}.{name}" if name in own else name] = getattr(block, name)
        bad = {name: value for name, value in sharded.items() if size < 1 or value % size}
        if bad:
            common = math.gcd(*sharded.values())
            fits = [n for n in range(1, common + 1) if common % n == 0]
            raise UserError(
                f"{origin}: parallel.tensor = {size} does not divide "
                + ", ".join(f"{name} = {value}" for name, value in bad.items())
                + f" of model {self.name}",
                hint=f"nearest: {min(fits, key=lambda n: abs(n - size))}; sizes that fit: {', '.join(map(str, fits))}",
            )
        if self.encoder:
            self.encoder.validate_tensor_parallel(size, origin)

    def validate_pipeline_parallel(self, size: int, origin: str) -> None:
        """Check that every pipeline stage gets a layer; arguments as of `validate_tensor_parallel`."""
        if not 1 <= size <= self.num_layers:
            raise UserError(
                f"{origin}: parallel.pipeline = {size} does not fit the {self.num_layers} layers of model {self.name}",
                hint=f"nearest: {min(max(size, 1), self.num_layers)}",
            )


def pipeline_layers(num_layers: int, stages: int) -> list[range]:
    """Split the layers into pipeline stages: contiguous, sizes differing by one at most, larger stages first."""
    size, extra = divmod(num_layers, stages)
    starts = [stage * size + min(stage, extra) for stage in range(stages + 1)]
    return [range(a, b) for a, b in pairwise(starts)]


def stage_blocks(definition: ModelDefinition, stages: int, stage: int) -> tuple[Block, ...]:
    """Return the layers of one of so many pipeline stages."""
    layers = pipeline_layers(definition.num_layers, stages)[stage]
    return definition.blocks[layers.start : layers.stop]


def definition_from_dict(values: dict[str, Any], origin: str, count: bool = False) -> ModelDefinition:
    """Build and validate a definition from plain values (the `model` part of a recipe); `count` fills in `expect`."""
    expect = Expect(**values["expect"])
    maps = {"sources": dict(values.get("sources") or {}), "overrides": dict(values.get("overrides") or {})}
    definition = ModelDefinition(**{**values, "expect": expect, **maps})
    if count:
        definition.validate_structure(origin)
        return definition.counted()
    definition.validate(origin)
    return definition


def _check_divides(block: Block, dividend: str, divisor: str, origin: str, layer: int | None) -> None:
    """Check that one width of a block is a multiple of another; `layer` is that of an override."""
    a, b = getattr(block, dividend), getattr(block, divisor)
    if a % b:
        where = "model" if layer is None else f"model.overrides.{layer}"
        fits = [n for n in range(1, a + 1) if a % n == 0]
        raise UserError(
            f"{origin}: {where}.{dividend} = {a} is not a multiple of {where}.{divisor} = {b}",
            hint=f"the nearest {divisor} that divides {a} is {min(fits, key=lambda n: abs(n - b))}",
        )
