"""The model definition: pattern and widths in, counts and shapes out. Imports no torch.

Every stage (training, planning, export, compression) reads a model through this file; `configs/model/<name>.yaml`
holds the numbers once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any

from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import check_number, nearest, ranges
from nemotron_h.schema.recipe import ModelSchema

MAMBA, ATTENTION, FFN = "M", "*", "-"
LAYER_NAMES = {MAMBA: "mamba", ATTENTION: "attention", FFN: "ffn"}

#: families of patterns; each has its rules in `ModelDefinition._validate_pattern`
PRUNED = "pruned"
FAMILIES = ("nemotron_h", "transformer", "mamba2", PRUNED)
POSITION_EMBEDDINGS = ("none", "rope")

#: keys that belong to one type of layer: required where the pattern has it, and not allowed elsewhere
WIDTHS = {
    MAMBA: ("mamba_num_heads", "mamba_head_dim", "mamba_num_groups", "mamba_state_dim", "conv_kernel"),
    ATTENTION: ("num_attention_heads", "num_query_groups", "head_dim"),
    FFN: ("ffn_hidden_size",),
}


_WHOLE = {each.name for each in fields(ModelSchema) if each.type == "int"}


@dataclass(frozen=True)
class Expect:
    """Counts that the definition states and loading checks; parameters are without vocabulary padding."""

    mamba: int
    attention: int
    ffn: int
    parameters: int


@dataclass(frozen=True)
class ModelDefinition:
    """A model of the family: one letter per layer, and one set of widths for all layers of a type.

    Widths of layer types that the pattern lacks are 0, which is how they are left out.

    Attributes:
        name: the name of the definition, as in `configs/model/<name>.yaml`.
        family: which rules the pattern follows: `nemotron_h` (paper 2.1), `transformer` (attention and FFN in pairs),
            `mamba2` (Mamba-2 alone), or `pruned`: any order, as removing layers leaves it.
        pattern: one letter per layer: `M` Mamba-2, `*` attention, `-` FFN.
        hidden_size: width of the residual stream.
        ffn_hidden_size: inner width of each (squared ReLU, non-gated) FFN.
        num_attention_heads, num_query_groups, head_dim: grouped-query attention; `num_query_groups` is the number of
            key-value heads. `num_attention_heads * head_dim` need not be `hidden_size`.
        mamba_num_heads, mamba_head_dim, mamba_num_groups, mamba_state_dim: Mamba-2 heads, their width, the groups
            that share B and C, and the state per channel.
        conv_kernel: window of the causal convolution.
        position_embedding: `none` (paper 2.1), or `rope` (rotary, in attention layers).
        rope_base: base of the rotary angles' wave lengths, with `rope` only.
        rope_percent: part of each head that is rotated, in (0, 1], with `rope` only.
        vocab_size: rows of the (untied) embedding and output matrices, before padding.
        norm_epsilon: of every RMSNorm.
        init_std: standard deviation of the initial weights.
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
    position_embedding: str = "none"
    rope_base: int = 0
    rope_percent: float = 0.0
    norm_epsilon: float = 1e-5
    init_std: float = 0.02
    sources: dict[str, str] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        """Layers of all types."""
        return len(self.pattern)

    @property
    def d_inner(self) -> int:
        """Channels of a Mamba-2 mixer."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_channels(self) -> int:
        """Channels of the causal convolution: x, B and C."""
        return self.d_inner + 2 * self.mamba_num_groups * self.mamba_state_dim

    @property
    def in_proj_size(self) -> int:
        """Output width of a mixer's input projection: z, x, B, C and dt."""
        return self.d_inner + self.conv_channels + self.mamba_num_heads

    @property
    def rotary_dim(self) -> int:
        """Channels of each head that are rotated; 0 without rotary positions."""
        return int(self.head_dim * self.rope_percent)

    def count(self, symbol: str) -> int:
        """How many layers have this letter."""
        return self.pattern.count(symbol)

    def layer_parameters(self, symbol: str) -> int:
        """Parameters of one layer, its input norm included."""
        hidden = self.hidden_size
        if symbol == MAMBA:
            convolution = self.conv_channels * (self.conv_kernel + 1)
            per_head = 3 * self.mamba_num_heads  # A_log, D, dt_bias
            projections = hidden * (self.in_proj_size + self.d_inner)
            return hidden + projections + convolution + per_head + self.d_inner
        if symbol == ATTENTION:
            query = self.num_attention_heads * self.head_dim
            key_value = 2 * self.num_query_groups * self.head_dim
            return hidden + hidden * (2 * query + key_value)
        return hidden + 2 * hidden * self.ffn_hidden_size

    @property
    def parameters(self) -> int:
        """All parameters, without vocabulary padding."""
        return sum(self.layer_parameters(symbol) for symbol in self.pattern) + self.other_parameters

    @property
    def other_parameters(self) -> int:
        """Parameters outside of the layers: embedding, output, final norm."""
        return 2 * self.vocab_size * self.hidden_size + self.hidden_size

    def validate(self, origin: str) -> None:
        """Check pattern, divisibility and `expect`.

        Args:
            origin: the file or recipe to name in an error.
        Errors:
            UserError: names the key, the origin, and the value that would fit.
        """
        self.validate_structure(origin)
        actual = Expect(self.count(MAMBA), self.count(ATTENTION), self.count(FFN), self.parameters)
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
        """Check what is given, the pattern's rules and divisibility; all that `validate` does but `expect`."""
        for key, known in (("family", FAMILIES), ("position_embedding", POSITION_EMBEDDINGS)):
            value = getattr(self, key)
            if value not in known:
                hint = f"{nearest(value, known)}Known: {', '.join(known)}."
                raise UserError(f"{origin}: model.{key} = {value!r} is unknown", hint=hint)
        self._validate_pattern(origin)
        self._validate_widths(origin)
        self._validate_positions(origin)
        unknown = sorted(set(self.sources) - {f.name for f in fields(self)})
        if unknown:
            hint = nearest(unknown[0], [f.name for f in fields(self)])
            raise UserError(
                f"{origin}: model.sources names {', '.join(unknown)}, which a model does not have", hint=hint
            )
        for symbol, dividend, divisor in (
            (ATTENTION, "num_attention_heads", "num_query_groups"),
            (MAMBA, "mamba_num_heads", "mamba_num_groups"),
        ):
            if symbol in self.pattern:
                self._validate_divides(origin, dividend, divisor)

    def _validate_pattern(self, origin: str) -> None:
        pattern = self.pattern
        unknown = sorted(set(pattern) - set(LAYER_NAMES))
        if not pattern or unknown:
            raise UserError(
                f"{origin}: model.pattern has {('unknown letters ' + ' '.join(unknown)) if unknown else 'no layers'}",
                hint="use M (Mamba-2), * (attention) and - (FFN), one letter per layer",
            )
        if self.family == PRUNED:
            return
        if self.family == "mamba2":
            other = next((index for index, symbol in enumerate(pattern) if symbol != MAMBA), None)
            if other is not None:
                raise UserError(
                    f"{origin}: model.pattern has {pattern[other]} at layer {other}; family mamba2 has M alone",
                    hint=f"nearest: {MAMBA * len(pattern)}; or set model.family to nemotron_h",
                )
        elif self.family == "transformer":
            pairs = (ATTENTION + FFN) * max(1, len(pattern) // 2)
            if pattern != pairs:
                raise UserError(
                    f"{origin}: model.pattern = {pattern} is not *- over and over, as family transformer has it",
                    hint=f"nearest: {pairs}; or set model.family to nemotron_h",
                )
        else:
            self._validate_hybrid_pattern(origin)

    def _validate_hybrid_pattern(self, origin: str) -> None:
        pattern = self.pattern
        if pattern[0] != MAMBA:
            raise UserError(f"{origin}: model.pattern starts with {pattern[0]}; the first layer is M (paper 2.1)")
        if pattern[-1] != FFN:
            raise UserError(f"{origin}: model.pattern ends with {pattern[-1]}; the last layer is - (paper 2.1)")
        for index, symbol in enumerate(pattern):
            if symbol == ATTENTION and pattern[index + 1] != FFN:
                raise UserError(
                    f"{origin}: model.pattern has attention at layer {index} that is not followed by an FFN",
                    hint="attention always directly precedes an FFN (paper 2.1): write *-",
                )

    def _validate_widths(self, origin: str) -> None:
        for key, allowed in ranges(ModelSchema).items():
            if key.startswith("expect."):
                continue
            value = getattr(self, key)
            check_number(f"model.{key}", value, allowed, f"{origin}: ")
            if isinstance(value, float) and key in _WHOLE:
                raise UserError(f"{origin}: model.{key} = {value} is not a whole number")
        for symbol, keys in WIDTHS.items():
            for key in keys:
                if symbol in self.pattern:
                    self._validate_positive(origin, key)
                elif getattr(self, key):
                    raise UserError(
                        f"{origin}: model.{key} = {getattr(self, key)} has no use: "
                        f"the pattern has no {symbol} ({LAYER_NAMES[symbol]}) layer",
                        hint=f"leave model.{key} out, or add {symbol} to model.pattern",
                    )

    def _validate_positive(self, origin: str, key: str) -> None:
        if (value := getattr(self, key)) <= 0:
            raise UserError(f"{origin}: model.{key} is {value}; it has to be positive", hint=f"give model.{key}")

    def _validate_positions(self, origin: str) -> None:
        if self.position_embedding == "none":
            for key in ("rope_base", "rope_percent"):
                if getattr(self, key):
                    raise UserError(
                        f"{origin}: model.{key} = {getattr(self, key)} has no use: model.position_embedding is none",
                        hint=f"leave model.{key} out, or set model.position_embedding to rope",
                    )
            return
        if self.family == "nemotron_h":
            raise UserError(
                f"{origin}: model.position_embedding = {self.position_embedding}; the family has none (paper 2.1)",
                hint="nearest: none",
            )
        if ATTENTION not in self.pattern:
            raise UserError(
                f"{origin}: model.position_embedding = {self.position_embedding}, "
                "but the pattern has no attention layer to apply it in",
                hint="nearest: none",
            )
        self._validate_positive(origin, "rope_base")
        width = self.rotary_dim
        if not 0 < self.rope_percent <= 1 or width < 2 or width % 2:
            fits = [n / self.head_dim for n in range(2, self.head_dim + 1, 2)]
            closest = min(fits, key=lambda part: abs(part - self.rope_percent), default=None)
            raise UserError(
                f"{origin}: model.rope_percent = {self.rope_percent} rotates {width} of {self.head_dim} channels; "
                "it has to be in (0, 1], and to rotate an even number of them",
                hint=f"nearest: {closest}",
            )

    def _validate_divides(self, origin: str, dividend: str, divisor: str) -> None:
        a, b = getattr(self, dividend), getattr(self, divisor)
        if a % b:
            fits = [n for n in range(1, a + 1) if a % n == 0]
            nearest = min(fits, key=lambda n: abs(n - b))
            raise UserError(
                f"{origin}: model.{dividend} = {a} is not a multiple of model.{divisor} = {b}",
                hint=f"the nearest {divisor} that divides {a} is {nearest}",
            )

    def validate_tensor_parallel(self, size: int, origin: str, key: str = "parallel.tensor") -> None:
        """Check that every sharded dimension splits over `size` ranks.

        Args:
            size: tensor-parallel ranks.
            origin, key: the file or recipe, and the setting, to name in an error.
        Errors:
            UserError: names the dimensions, and the nearest size that fits.
        """
        by_type = {
            MAMBA: ("mamba_num_groups", "mamba_num_heads"),
            ATTENTION: ("num_query_groups", "num_attention_heads"),
            FFN: ("ffn_hidden_size",),
        }
        sharded = {
            name: getattr(self, name) for symbol in by_type if symbol in self.pattern for name in by_type[symbol]
        }
        bad = {name: value for name, value in sharded.items() if size < 1 or value % size}
        if bad:
            fits = [n for n in range(1, max(sharded.values()) + 1) if all(v % n == 0 for v in sharded.values())]
            raise UserError(
                f"{origin}: {key} = {size} does not divide "
                + ", ".join(f"{name} = {value}" for name, value in bad.items())
                + f" of model {self.name}",
                hint=f"nearest: {min(fits, key=lambda n: abs(n - size))}; sizes that fit: {', '.join(map(str, fits))}",
            )

    def validate_pipeline_parallel(self, size: int, origin: str, key: str = "parallel.pipeline") -> None:
        """Check that every pipeline stage gets a layer; arguments as of `validate_tensor_parallel`."""
        if not 1 <= size <= self.num_layers:
            raise UserError(
                f"{origin}: {key} = {size} does not fit the {self.num_layers} layers of model {self.name}",
                hint=f"nearest: {min(max(size, 1), self.num_layers)}",
            )


def pipeline_layers(num_layers: int, stages: int) -> list[range]:
    """Layers of each pipeline stage: contiguous, sizes differing by one at most, larger stages first."""
    size, extra = divmod(num_layers, stages)
    starts = [stage * size + min(stage, extra) for stage in range(stages + 1)]
    return [range(a, b) for a, b in pairwise(starts)]


def definition_from_dict(values: dict[str, Any], origin: str) -> ModelDefinition:
    """Build and validate a definition from plain values (the `model` part of a recipe)."""
    expect = Expect(**values["expect"])
    definition = ModelDefinition(**{**values, "expect": expect, "sources": dict(values.get("sources") or {})})
    definition.validate(origin)
    return definition


def family_of(pattern: str) -> str:
    """The family whose rules a pattern follows; `pruned` where it follows those of none."""
    for family in ("mamba2", "transformer", "nemotron_h"):
        try:
            ModelDefinition("", pattern, 1, 1, Expect(0, 0, 0, 0), family)._validate_pattern("")
        except UserError:
            continue
        return family
    return PRUNED
