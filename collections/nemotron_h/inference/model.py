"""The forward pass for generation: many tokens into a state (`extend`), then one token at a time (`step`).

It is written on plain tensors and `nemotron_h.ops`, apart from the training model: one rank, no gradients, no import
of NeMo or megatron-core, and little overhead per token. Tests hold it against the training model at every position.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_h.architecture.definition import ATTENTION, MAMBA, ModelDefinition
from nemotron_h.checkpoint.adapters import open_weights
from nemotron_h.checkpoint.reader import WeightFile, find_checkpoint, read_definition, read_record
from nemotron_h.inference.cpu_step import DTYPES, CpuStep
from nemotron_h.inference.states import KeyValueCache, MambaState, States
from nemotron_h.ops.activation import squared_relu
from nemotron_h.ops.attention import attention_chunk
from nemotron_h.ops.norm import rms_norm_inference
from nemotron_h.ops.select import select_ops
from nemotron_h.platform.memory import check_weights_fit

#: cosines and sines of rotary positions
Rotary = tuple[Tensor, Tensor]


@dataclass
class MambaWeights:
    """A Mamba-2 layer. `A` is negative; `A`, `D` and `dt_bias` are float32 (float64 in a float64 model)."""

    norm: Tensor
    in_proj: Tensor
    conv_weight: Tensor
    conv_bias: Tensor
    A: Tensor
    D: Tensor
    dt_bias: Tensor
    gated_norm: Tensor
    out_proj: Tensor


@dataclass
class AttentionWeights:
    """An attention layer; `qkv` holds, group by group, the group's queries, its key and its value."""

    norm: Tensor
    qkv: Tensor
    proj: Tensor


@dataclass
class FFNWeights:
    """A squared-ReLU FFN."""

    norm: Tensor
    up: Tensor
    down: Tensor


LayerWeights = MambaWeights | AttentionWeights | FFNWeights


class GenerationModel:
    """A model of the family that continues sequences.

    Args:
        definition: the model's shapes.
        embedding, output, final_norm: [vocabulary, hidden], [tokens, hidden], [hidden]; there may be fewer tokens
            than rows of the vocabulary, of which the last are padding then.
        layers: one entry per letter of the pattern.
    """

    def __init__(
        self,
        definition: ModelDefinition,
        embedding: Tensor,
        layers: Sequence[LayerWeights],
        final_norm: Tensor,
        output: Tensor,
    ) -> None:
        self.definition = definition
        self.embedding, self.layers, self.final_norm, self.output = embedding, layers, final_norm, output
        self.ops = select_ops(self.device)
        self._cpu_step: CpuStep | None = None
        width = definition.rotary_dim
        # in float32 whatever the model's dtype, as training computes it
        exponents = torch.arange(0, width, 2, dtype=torch.float32, device=self.device) / max(width, 1)
        self.rotary_frequencies = 1.0 / definition.rope_base**exponents if width else None

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the weights and activations."""
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return self.embedding.device

    def to(self, dtype: torch.dtype) -> GenerationModel:
        """Return a copy in another dtype; Mamba's A, D and dt_bias stay in float32 at least."""

        def cast(weights: MambaWeights | AttentionWeights | FFNWeights) -> MambaWeights | AttentionWeights | FFNWeights:
            exact = ("A", "D", "dt_bias")
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            return type(weights)(**{k: v.to(wide if k in exact else dtype) for k, v in vars(weights).items()})

        ends = (t.to(dtype) for t in (self.embedding, self.final_norm, self.output))
        embedding, final_norm, output = ends
        return GenerationModel(self.definition, embedding, [cast(w) for w in self.layers], final_norm, output)

    def new_states(self, batch: int, capacity: int) -> States:
        """Return the states before the first token; see `States.empty`."""
        return States.empty(self.definition, batch, capacity, self.dtype, self.device)

    @torch.inference_mode()
    def extend(self, tokens: Tensor, states: States, last_only: bool = False) -> Tensor:
        """Read several tokens of every sequence; all sequences must be at one position. Updates `states`.

        Args:
            tokens: int64 [batch, length].
            last_only: compute what follows the last state for the last token alone.
        Returns:
            hidden states [batch, length, hidden], for `logits`; [batch, 1, hidden] with `last_only`.
        """
        start = int(states.lengths[0])
        if (states.lengths != start).any():
            raise ValueError("extend: the sequences are at different positions")
        x = F.embedding(tokens.to(self.device), self.embedding)
        rotary = self.rotary(torch.arange(start, start + tokens.shape[1], device=self.device))
        last_state = max((i for i, state in enumerate(states.layers) if state is not None), default=-1)
        for layer, (weights, state) in enumerate(zip(self.layers, states.layers, strict=True)):
            h = self._norm(x, weights.norm)
            if last_only and layer >= last_state:
                x = x[:, -1:]
            if isinstance(weights, MambaWeights):
                x += self._mamba_extend(h, weights, state, x.shape[1])
            elif isinstance(weights, AttentionWeights):
                x += self._attention_extend(h, weights, state, start, rotary)[:, -x.shape[1] :]
            else:
                x += self._ffn(h, weights)
        states.advance(tokens.shape[1])
        return x

    @torch.inference_mode()
    def step(self, tokens: Tensor, states: States, count_on_device: bool = True) -> Tensor:
        """Read one token of every sequence, each at its own position. Updates `states`.

        Args:
            tokens: int64 [batch].
            count_on_device: False leaves the device's positions to the caller (see `States.advance`).
        Returns:
            hidden states [batch, hidden], for `logits`.
        """
        if self.device.type == "cpu" and self.dtype in DTYPES:
            if self._cpu_step is None or self._cpu_step.batch != len(tokens):
                self._cpu_step = CpuStep(self.definition, len(tokens), self.dtype)
            x = self._cpu_step.run(self, tokens, states)
            states.advance(1)
            return x
        x = F.embedding(tokens.to(self.device), self.embedding)
        longest = int(states.lengths.max()) + 1
        ragged = bool((states.lengths != longest - 1).any())
        positions = states.positions
        lengths = positions + 1
        rotary = self.rotary(positions)
        for weights, state in zip(self.layers, states.layers, strict=True):
            h = self._norm(x, weights.norm)
            if isinstance(weights, MambaWeights):
                x += self._mamba_step(h, weights, state)
            elif isinstance(weights, AttentionWeights):
                q, k, v = self.split_qkv(F.linear(h, weights.qkv), rotary)
                self.ops.cache_append(state.keys, state.values, k, v, positions)
                out = self.ops.attention_step(q, state.keys, state.values, lengths, longest, ragged)
                x += F.linear(out, weights.proj)
            else:
                x += self._ffn(h, weights)
        states.advance(1, count_on_device)
        return x

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return scores of the next token, [..., tokens] from [..., hidden]; the vocabulary's padding is left out."""
        return F.linear(self._norm(hidden, self.final_norm), self.output)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        if not x.is_cuda:  # PyTorch's own is many passes
            return rms_norm_inference(x, weight, group_size=len(weight), eps=self.definition.norm_epsilon)
        return F.rms_norm(x, weight.shape, weight, self.definition.norm_epsilon)

    def _ffn(self, h: Tensor, w: FFNWeights) -> Tensor:
        h = F.linear(h, w.up)
        if h.is_cuda:
            h = squared_relu(h)
        else:
            torch.mul(h.relu_(), h, out=h)
        return F.linear(h, w.down)

    def _split_conv(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        d = self.definition
        width = d.mamba_num_groups * d.mamba_state_dim
        x, b, c = xbc.split([d.d_inner, width, width], dim=-1)
        by_group = (d.mamba_num_groups, d.mamba_state_dim)
        return (
            x.unflatten(-1, (d.mamba_num_heads, d.mamba_head_dim)),
            b.unflatten(-1, by_group),
            c.unflatten(-1, by_group),
        )

    def _mamba_out(self, y: Tensor, z: Tensor, w: MambaWeights) -> Tensor:
        d = self.definition
        size = d.d_inner // d.mamba_num_groups
        y = y.flatten(-2)
        if not y.is_cuda:
            y = rms_norm_inference(y, w.gated_norm, z, group_size=size, eps=d.norm_epsilon)
        else:
            y = self.ops.gated_rms_norm(y, z, w.gated_norm, group_size=size, eps=d.norm_epsilon)
        return F.linear(y, w.out_proj)

    def _mamba_extend(self, h: Tensor, w: MambaWeights, state: MambaState, last: int) -> Tensor:
        """Return the outputs of the `last` tokens."""
        d = self.definition
        if last == h.shape[1]:
            z, xbc, dt = F.linear(h, w.in_proj).split([d.d_inner, d.conv_channels, d.mamba_num_heads], dim=-1)
        else:
            z = F.linear(h[:, -last:], w.in_proj[: d.d_inner])
            xbc, dt = F.linear(h, w.in_proj[d.d_inner :]).split([d.conv_channels, d.mamba_num_heads], dim=-1)
        xbc, conv = self.ops.conv1d(xbc, w.conv_weight, w.conv_bias, initial_state=state.conv, return_final_state=True)
        x, b, c = self._split_conv(xbc)
        y, ssm = self.ops.ssd(
            x, dt, w.A, b, c, D=w.D, dt_bias=w.dt_bias, initial_state=state.ssm, return_final_state=True
        )
        state.conv.copy_(conv)
        state.ssm.copy_(ssm)
        return self._mamba_out(y[:, -last:], z, w)

    def _mamba_step(self, h: Tensor, w: MambaWeights, state: MambaState) -> Tensor:
        d = self.definition
        z, xbc, dt = F.linear(h, w.in_proj).split([d.d_inner, d.conv_channels, d.mamba_num_heads], dim=-1)
        x, b, c = self._split_conv(self.ops.conv1d_step(state.conv, xbc, w.conv_weight, w.conv_bias))
        y = self.ops.ssd_step(state.ssm, x, dt, w.A, b, c, w.D, w.dt_bias)
        return self._mamba_out(y, z, w)

    def rotary(self, positions: Tensor) -> Rotary | None:
        """Return cosines and sines at these positions, [positions, 1, 1, channels]; None without rotary positions."""
        if self.rotary_frequencies is None:
            return None
        angles = torch.outer(positions.float(), self.rotary_frequencies)[:, None, None]
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def split_qkv(self, qkv: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [..., groups, heads per group, head_dim], keys and values [..., groups, head_dim]."""
        d = self.definition
        per_group = qkv.unflatten(-1, (d.num_query_groups, -1, d.head_dim))
        q_and_k, v = per_group[..., :-1, :], per_group[..., -1, :]
        if rotary is not None:
            cos, sin = rotary
            half = d.rotary_dim // 2
            a, b, still = q_and_k.split([half, half, d.head_dim - 2 * half], dim=-1)
            q_and_k = torch.cat([a * cos - b * sin, b * cos + a * sin, still], dim=-1)
        return q_and_k[..., :-1, :], q_and_k[..., -1, :], v

    def _attention_extend(
        self, h: Tensor, w: AttentionWeights, cache: KeyValueCache, start: int, rotary: Rotary | None
    ) -> Tensor:
        q, k, v = self.split_qkv(F.linear(h, w.qkv), rotary)
        end = start + h.shape[1]
        cache.keys[:, :, start:end] = k.transpose(1, 2)
        cache.values[:, :, start:end] = v.transpose(1, 2)
        return F.linear(attention_chunk(q, cache.keys, cache.values, start), w.proj)


def load_model(
    checkpoint: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    lazy: bool = False,
    tokens: int | None = None,
) -> GenerationModel:
    """Load the weights of a training checkpoint, of any parallel layout and with or without Transformer Engine.

    Args:
        checkpoint: a checkpoint or run folder.
        dtype: of weights and activations; Mamba's A, D and dt_bias stay in float32 at least.
        lazy: read a layer each time that it is used, and keep none.
        tokens: a tokenizer's number of tokens; rows of the vocabulary beyond are padding, and get no scores.
    Errors:
        UserError: no checkpoint, a damaged one, weights that do not fit its record, or more of them than memory.
    """
    checkpoint = find_checkpoint(Path(checkpoint))
    definition = read_definition(read_record(checkpoint), f"checkpoint {checkpoint}")
    if not lazy:
        check_weights_fit(definition, dtype.itemsize, device)
    reader = _Reader(open_weights(checkpoint), definition, dtype, device)
    ends = [
        reader.vocabulary("embedding.word_embeddings.weight"),
        reader.take("decoder.final_norm.weight", definition.hidden_size),
        reader.vocabulary("output_layer.weight")[:tokens],
    ]
    layers: Sequence[LayerWeights] = _LazyLayers(reader)
    if lazy:
        reader.read()
    else:
        layers = reader.layers(range(definition.num_layers))
        for weights in layers:
            lay_out(weights)
        ends[2] = column_major(ends[2])
    return GenerationModel(definition, ends[0], layers, *ends[1:])


def lay_out(weights: LayerWeights) -> None:
    """Give a layer's matrices the memory order that a step on the CPU multiplies fastest with."""
    for name, value in vars(weights).items():
        if value.dim() == 2:
            setattr(weights, name, column_major(value))


def column_major(matrix: Tensor) -> Tensor:
    """Return the same matrix, on the CPU stored column by column.

    Matmuls of several rows then take 0.4 to 0.8 of the time, those of one row or of hundreds the same; the
    convolution's taps lie one after the other.
    """
    return matrix.t().contiguous().t() if matrix.device.type == "cpu" else matrix


class _Reader:
    """Weights of a checkpoint: asked for first, then read together."""

    def __init__(self, file: WeightFile, definition: ModelDefinition, dtype: torch.dtype, device: str) -> None:
        self.file, self.definition, self.dtype, self.device = file, definition, dtype, device
        self.targets: dict[str, Tensor] = {}

    def read(self) -> None:
        """Fill what was asked for."""
        self.file.read(self.targets)
        self.targets.clear()

    def layers(self, numbers: Iterable[int]) -> list[LayerWeights]:
        """Read these layers, and what else was asked for."""
        found = [self._layer(f"decoder.layers.{number}", self.definition.pattern[number]) for number in numbers]
        self.read()
        for weights in found:
            if isinstance(weights, MambaWeights):
                weights.A = -weights.A.exp()  # stored as log(-A)
                weights.conv_weight = weights.conv_weight.squeeze(1)
        return found

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Ask for a weight."""
        self.targets[name] = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        return self.targets[name]

    def vocabulary(self, name: str) -> Tensor:
        """Ask for the embedding or the output."""
        # rows of padding depend on the layout that trained it
        padded = max(self.file.shapes.get(name, (0,))[0], self.definition.vocab_size)
        return self.take(name, padded, self.definition.hidden_size)[: self.definition.vocab_size]

    def _joined(self, name: str, parts: dict[str, int], *shape: int) -> Tensor:
        whole = torch.empty(sum(parts.values()), *shape, dtype=self.dtype, device=self.device)
        pieces = whole.split(list(parts.values()))
        self.targets.update({f"{name}.{part}": piece for part, piece in zip(parts, pieces, strict=True)})
        return whole

    def _input_norm(self, layer: str, norm: str, projection: str) -> Tensor:
        # Transformer Engine's layers hold the norm inside the projection that follows it
        fused = f"{layer}.{projection}.layer_norm_weight"
        return self.take(fused if fused in self.file.shapes else f"{layer}.{norm}.weight", self.definition.hidden_size)

    def _layer(self, name: str, symbol: str) -> LayerWeights:
        d, take = self.definition, self.take
        hidden = d.hidden_size
        if symbol == MAMBA:
            width = d.mamba_num_groups * d.mamba_state_dim
            conv = {"x": d.d_inner, "B": width, "C": width}
            exact = torch.float64 if self.dtype == torch.float64 else torch.float32
            heads = [take(f"{name}.mixer.{p}", d.mamba_num_heads, dtype=exact) for p in ("A_log", "D", "dt_bias")]
            return MambaWeights(
                self._input_norm(name, "norm", "mixer.in_proj"),
                self._joined(f"{name}.mixer.in_proj.weight", {"z": d.d_inner, **conv, "dt": d.mamba_num_heads}, hidden),
                self._joined(f"{name}.mixer.conv1d.weight", conv, 1, d.conv_kernel),
                self._joined(f"{name}.mixer.conv1d.bias", conv),
                *heads,
                take(f"{name}.mixer.norm.weight", d.d_inner),
                take(f"{name}.mixer.out_proj.weight", hidden, d.d_inner),
            )
        if symbol == ATTENTION:
            queries = d.num_attention_heads * d.head_dim
            return AttentionWeights(
                self._input_norm(name, "input_layernorm", "self_attention.linear_qkv"),
                take(f"{name}.self_attention.linear_qkv.weight", queries + 2 * d.num_query_groups * d.head_dim, hidden),
                take(f"{name}.self_attention.linear_proj.weight", hidden, queries),
            )
        return FFNWeights(
            self._input_norm(name, "pre_mlp_layernorm", "mlp.linear_fc1"),
            take(f"{name}.mlp.linear_fc1.weight", d.ffn_hidden_size, hidden),
            take(f"{name}.mlp.linear_fc2.weight", hidden, d.ffn_hidden_size),
        )


class _LazyLayers(Sequence[LayerWeights]):
    """Layers that are read when they are asked for."""

    def __init__(self, reader: _Reader) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return self.reader.definition.num_layers

    def __getitem__(self, number: int) -> LayerWeights:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self.reader.layers([number])[0]
