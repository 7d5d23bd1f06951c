"""The model definition: pattern and widths in, counts and shapes out. Imports no torch.

Every stage (training, planning, export, compression) reads a model through this file; `configs/model/<name>.yaml`
holds the numbers once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from nemotron_h.errors import UserError

MAMBA, ATTENTION, FFN = "M", "*", "-"
LAYER_NAMES = {MAMBA: "mamba", ATTENTION: "attention", FFN: "ffn"}


@dataclass(frozen=True)
class Expect:
    """Counts that the definition states and loading checks; parameters are without vocabulary padding."""

    mamba: int
    attention: int
    ffn: int
    parameters: int


@dataclass(frozen=True)
class ModelDefinition:
    """A Nemotron-H model: one letter per layer, and one set of widths for all layers of a type.

    Attributes:
        name: the name of the definition, as in `configs/model/<name>.yaml`.
        pattern: one letter per layer: `M` Mamba-2, `*` attention, `-` FFN.
        hidden_size: width of the residual stream.
        ffn_hidden_size: inner width of each (squared ReLU, non-gated) FFN.
        num_attention_heads, num_query_groups, head_dim: grouped-query attention; `num_query_groups` is the number of
            key-value heads. `num_attention_heads * head_dim` need not be `hidden_size`.
        mamba_num_heads, mamba_head_dim, mamba_num_groups, mamba_state_dim: Mamba-2 heads, their width, the groups
            that share B and C, and the state per channel.
        conv_kernel: window of the causal convolution.
        vocab_size: rows of the (untied) embedding and output matrices, before padding.
        norm_epsilon: of every RMSNorm.
        init_std: standard deviation of the initial weights.
        expect: counts that must come out.
        sources: where the values come from (`paper 2.1`, `ours: ...`), by key.
    """

    name: str
    pattern: str
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    mamba_num_heads: int
    mamba_head_dim: int
    mamba_num_groups: int
    mamba_state_dim: int
    vocab_size: int
    expect: Expect
    conv_kernel: int = 4
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
        layers = sum(self.layer_parameters(symbol) for symbol in self.pattern)
        return layers + 2 * self.vocab_size * self.hidden_size + self.hidden_size

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
        """Check signs, the pattern's rules and divisibility; all that `validate` does but `expect`."""
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type in ("int", "float") and value <= 0:
                raise UserError(f"{origin}: model.{f.name} is {value}; it has to be positive")
        self._validate_pattern(origin)
        for dividend, divisor in (
            ("num_attention_heads", "num_query_groups"),
            ("mamba_num_heads", "mamba_num_groups"),
        ):
            self._validate_divides(origin, dividend, divisor)

    def _validate_pattern(self, origin: str) -> None:
        unknown = sorted(set(self.pattern) - set(LAYER_NAMES))
        if not self.pattern or unknown:
            raise UserError(
                f"{origin}: model.pattern has {('unknown letters ' + ' '.join(unknown)) if unknown else 'no layers'}",
                hint="use M (Mamba-2), * (attention) and - (FFN), one letter per layer",
            )
        if self.pattern[0] != MAMBA:
            raise UserError(f"{origin}: model.pattern starts with {self.pattern[0]}; the first layer is M (paper 2.1)")
        if self.pattern[-1] != FFN:
            raise UserError(f"{origin}: model.pattern ends with {self.pattern[-1]}; the last layer is - (paper 2.1)")
        for index, symbol in enumerate(self.pattern):
            if symbol == ATTENTION and self.pattern[index + 1] != FFN:
                raise UserError(
                    f"{origin}: model.pattern has attention at layer {index} that is not followed by an FFN",
                    hint="attention always directly precedes an FFN (paper 2.1): write *-",
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

    def validate_tensor_parallel(self, size: int) -> None:
        """Check that every sharded dimension splits over `size` ranks.

        Errors:
            UserError: names the dimension and the sizes that fit.
        """
        sharded = {
            "mamba_num_groups": self.mamba_num_groups,
            "mamba_num_heads": self.mamba_num_heads,
            "num_query_groups": self.num_query_groups,
            "num_attention_heads": self.num_attention_heads,
            "ffn_hidden_size": self.ffn_hidden_size,
        }
        bad = {key: value for key, value in sharded.items() if value % size}
        if bad:
            fits = [n for n in range(1, max(sharded.values()) + 1) if all(v % n == 0 for v in sharded.values())]
            raise UserError(
                f"tensor_model_parallel_size={size} does not divide "
                + ", ".join(f"{key}={value}" for key, value in bad.items())
                + f" of {self.name}",
                hint=f"tensor parallel sizes that fit: {', '.join(map(str, fits))}",
            )

    def validate_pipeline_parallel(self, size: int) -> None:
        """Check that every pipeline stage gets a layer."""
        if size > self.num_layers:
            raise UserError(
                f"pipeline_model_parallel_size={size} is more than the {self.num_layers} layers of {self.name}",
                hint=f"use at most {self.num_layers} stages",
            )


def definition_from_dict(values: dict[str, Any], origin: str) -> ModelDefinition:
    """Build and validate a definition from plain values (the `model` part of a recipe)."""
    expect = Expect(**values["expect"])
    definition = ModelDefinition(**{**values, "expect": expect, "sources": dict(values.get("sources") or {})})
    definition.validate(origin)
    return definition
