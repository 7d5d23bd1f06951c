"""The forward pass for generation: many tokens into a state (`extend`), then one token at a time (`step`), or a few on
trial, of which some are accepted (`try_tokens`, `accept`).

It is written on plain tensors and `nemotron_h.ops`, apart from the training model: one rank, no gradients, no import
of NeMo or megatron-core, and little overhead per token. Tests hold it against the training model at every position.

Axes: b batch, l tokens, h hidden, v the tokens that get scores, f rotary frequencies. A layer adds to the residual
stream x what it computes of its RMSNorm: x += layer(norm(x)); the scores are norm(x) W_out^T.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.checkpoint.adapters import open_weights
from nemotron_h.checkpoint.definition import read_definition
from nemotron_h.checkpoint.reader import WeightFile, find_checkpoint, read_record
from nemotron_h.inference.states import States
from nemotron_h.model.blocks.cpu_step import Residual
from nemotron_h.model.blocks.registry import running_layers
from nemotron_h.model.blocks.running import Rotary, Running, State, Step, Trial
from nemotron_h.ops.float8_matrix import Float8Matrix, takes
from nemotron_h.ops.norm import rms_norm_inference
from nemotron_h.ops.rotary import rotary_frequencies
from nemotron_h.ops.select import select_ops
from nemotron_h.platform.memory import check_weights_fit

#: dtypes of weights that `Running.cpu_step` takes; in others a step has casts between its operations
CPU_STEP_DTYPES = (torch.float32, torch.float64)


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
        layers: Sequence[Any],
        final_norm: Tensor,
        output: Tensor,
    ) -> None:
        self.definition = definition
        self.embedding, self.layers, self.final_norm, self.output = embedding, layers, final_norm, output
        self.ops = select_ops(self.device)
        self.running = running_layers(definition)
        self._cpu_buffers: CpuBuffers | None = None
        self.rotary_frequencies: Tensor | None = None
        if definition.rotary_dim:
            self.rotary_frequencies = rotary_frequencies(
                definition.rotary_dim, definition.rope_base, definition.rope_scaling, self.device
            )

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the weights and activations."""
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return self.embedding.device

    def to(self, dtype: torch.dtype) -> GenerationModel:
        """Return a copy in another dtype; what is exact (Mamba's A, D and dt_bias) stays in float32 at least."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def cast(weights: Any, exact: tuple[str, ...]) -> Any:
            return type(weights)(**{k: v.to(wide if k in exact else dtype) for k, v in vars(weights).items()})

        ends = (t.to(dtype) for t in (self.embedding, self.final_norm, self.output))
        embedding, final_norm, output = ends
        layers = [cast(w, running.exact) for w, running in zip(self.layers, self.running, strict=True)]
        return GenerationModel(self.definition, embedding, layers, final_norm, output)

    def in_float8(self) -> GenerationModel:
        """Return a copy whose layers' matrices are in FP8; embedding, head and all that is no matrix stay."""
        layers = [round_matrices(w, running) for w, running in zip(self.layers, self.running, strict=True)]
        return GenerationModel(self.definition, self.embedding, layers, self.final_norm, self.output)

    def first_layers(self, count: int) -> GenerationModel:
        """Return a model of the first layers between this one's embedding and head; weights are shared."""
        part = copy.copy(self)
        part.layers, part.running, part._cpu_buffers = self.layers[:count], self.running[:count], None
        return part

    def new_states(self, batch: int, capacity: int) -> States:
        """Return the states before the first token; see `States.empty`."""
        return States.empty(self.running, batch, capacity, self.dtype, self.device)

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the embeddings [..., hidden] of tokens, int64 [...]."""
        return F.embedding(tokens.to(self.device), self.embedding)

    @torch.inference_mode()
    def extend(self, tokens: Tensor, states: States, last_only: bool = False, embedded: Tensor | None = None) -> Tensor:
        """Read several tokens of every sequence; all sequences must be at one position. Updates `states`.

        Args:
            tokens: int64 [batch, length].
            last_only: compute what follows the last state for the last token alone.
            embedded: [batch, length, hidden] in place of the tokens' embeddings, and overwritten.
        Returns:
            hidden states [batch, length, hidden], for `logits`; [batch, 1, hidden] with `last_only`.
        """
        start = int(states.lengths[0])
        if (states.lengths != start).any():
            raise ValueError("extend: the sequences are at different positions")
        x = self.embed(tokens) if embedded is None else embedded  # [b, l, h]
        rotary = self.rotary(torch.arange(start, start + tokens.shape[1], device=self.device))
        last_state = max((i for i, state in enumerate(states.layers) if state is not None), default=-1)
        layers = zip(self.running, self.layers, states.layers, strict=True)
        for number, (running, weights, state) in enumerate(layers):
            h = self.norm(x, weights.norm)
            if last_only and number >= last_state:
                x = x[:, -1:]  # [b, 1, h]: nothing after the last state reads the tokens before
            x += running.extend(self.ops, weights, h, state, start, rotary, x.shape[1])
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
        longest = int(states.lengths.max()) + 1
        ragged = bool((states.lengths != longest - 1).any())
        positions = states.positions
        at = Step(positions, positions + 1, longest, ragged, self.rotary(positions))
        x = self.embed(tokens)  # [b, h]
        layers = zip(self.running, self.layers, states.layers, strict=True)
        if self.device.type == "cpu" and self.dtype in CPU_STEP_DTYPES:
            if self._cpu_buffers is None or self._cpu_buffers.batch != len(tokens):
                self._cpu_buffers = CpuBuffers(self, len(tokens))
            x = self._cpu_buffers.run(x, layers, at)
        else:
            for running, weights, state in layers:
                x += running.step(self.ops, weights, self.norm(x, weights.norm), state, at)
        states.advance(1, count_on_device)
        return x

    def window(self, states: States, width: int) -> list[State | None]:
        """Return room for what the layers remember of `width` tokens that every sequence reads on trial.

        Errors:
            UserError: a kind of layer cannot take tokens back.
        """
        return [running.window(state, width) for running, state in zip(self.running, states.layers, strict=True)]

    @torch.inference_mode()
    def try_tokens(self, tokens: Tensor, states: States, window: list[State | None], slot: int = 0) -> Tensor:
        """Read a few tokens of every sequence, each at its own position, and leave `states` before the window.

        Args:
            tokens: int64 [batch, length].
            slot: tokens of the window that were read before these, since `accept`.
        Returns:
            hidden states [batch, length, hidden], for `logits`.
        """
        length = tokens.shape[1]
        positions = states.positions + slot  # [b]
        rotary = None
        if self.rotary_frequencies is not None:
            each = positions[:, None] + torch.arange(length, device=self.device)  # [b, l]
            cos, sin = self.rotary(each.flatten())
            rotary = cos.unflatten(0, each.shape), sin.unflatten(0, each.shape)  # [b, l, 1, 1, f]
        longest = int(states.lengths.max()) + slot + length
        at = Trial(positions, positions + 1, longest, slot, rotary)
        x = self.embed(tokens)  # [b, l, h]
        layers = zip(self.running, self.layers, states.layers, window, strict=True)
        for running, weights, state, part in layers:
            x += running.try_tokens(self.ops, weights, self.norm(x, weights.norm), state, part, at)
        return x

    @torch.inference_mode()
    def accept(self, states: States, window: list[State | None], counts: Tensor) -> None:
        """Advance `states` over the first tokens of the window; the others are as if never read.

        The host's `states.lengths` are left to the caller: a CUDA graph may hold what is done here.

        Args:
            counts: int64 [batch], on the device; tokens that each sequence keeps.
        """
        layers = zip(self.running, self.layers, states.layers, window, strict=True)
        for running, weights, state, part in layers:
            running.accept(self.ops, weights, state, part, counts)
        if self.device.type != "cpu":
            states.positions += counts

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return scores of the next token, [..., tokens] from [..., hidden]; the vocabulary's padding is left out."""
        return F.linear(self.norm(hidden, self.final_norm), self.output)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the RMSNorm of x [..., hidden]."""
        if not x.is_cuda:  # PyTorch's own is many passes
            return rms_norm_inference(x, weight, group_size=len(weight), eps=self.definition.norm_epsilon)
        return F.rms_norm(x, weight.shape, weight, self.definition.norm_epsilon)

    def rotary(self, positions: Tensor) -> Rotary | None:
        """Return cosines and sines at these positions, [positions, 1, 1, f]; None without rotary positions."""
        if self.rotary_frequencies is None:
            return None
        angles = torch.outer(positions.float(), self.rotary_frequencies)[:, None, None]
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)


class CpuBuffers:
    """Buffers of a step of a batch on the CPU; layers of equal widths share them.

    Args:
        model: in one of `CPU_STEP_DTYPES`.
        batch: sequences.
    """

    def __init__(self, model: GenerationModel, batch: int) -> None:
        d = model.definition
        self.batch = batch
        self.residual = Residual(batch, d.hidden_size, eps=d.norm_epsilon, dtype=model.dtype)
        blocks = {running.block: running for running in model.running}
        self.of_blocks = {block: running.cpu_buffers(batch, model.dtype) for block, running in blocks.items()}

    def run(self, x: Tensor, layers: Iterable[tuple[Running, Any, Any]], at: Step) -> Tensor:
        """Return hidden states [batch, hidden], a new tensor, of the embeddings x; updates the states."""
        residual = self.residual
        residual.values.copy_(x)
        for running, weights, state in layers:
            running.cpu_step(self.of_blocks[running.block], residual, weights, residual(weights.norm), state, at)
        return residual.values.clone()


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
        dtype: of weights and activations; Mamba's A, D and dt_bias stay in float32 at least. float8_e4m3fn is that of
            the layers' matrices alone (`nemotron_h.ops.float8_matrix`), with bfloat16 for all else.
        lazy: read a layer each time that it is used, and keep none.
        tokens: a tokenizer's number of tokens; rows of the vocabulary beyond are padding, and get no scores.
    Errors:
        UserError: no checkpoint, a damaged one, weights that do not fit its record, or more of them than memory.
    """
    checkpoint = find_checkpoint(Path(checkpoint))
    definition = read_definition(read_record(checkpoint), f"checkpoint {checkpoint}")
    if not lazy:
        check_weights_fit(definition, dtype.itemsize, device)
    float8, dtype = dtype == torch.float8_e4m3fn, torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype
    reader = _Reader(open_weights(checkpoint), definition, dtype, device)
    ends = [
        reader.vocabulary("embedding.word_embeddings.weight"),
        reader.take("decoder.final_norm.weight", definition.hidden_size),
    ]
    if not definition.tied_embeddings:
        ends.append(reader.vocabulary("output_layer.weight")[:tokens])
    layers: Sequence[Any] = _LazyLayers(reader)
    if lazy:
        reader.read()
    elif float8:  # one after the other, so that no more than one is wide
        layers = [round_matrices(reader.layers([n])[0], reader.running[n]) for n in range(definition.num_layers)]
    else:
        layers = reader.layers(range(definition.num_layers))
        for weights in layers:
            lay_out(weights)
    embedding, final_norm, output = ends if len(ends) == 3 else (*ends, ends[0][:tokens])
    # multipliers are in the weights: of the layers' by `Running.loaded`
    scales = definition.scales
    if scales.head != 1:
        output = output * scales.head
    if scales.embedding != 1:
        embedding = embedding * scales.embedding
    return GenerationModel(definition, embedding, layers, final_norm, output if lazy else column_major(output))


def round_matrices(weights: Any, running: Running) -> Any:
    """Return a layer's weights with its matrices in FP8, of sizes that FP8 takes, but those that are exact."""
    return type(weights)(
        **{k: Float8Matrix.round(v) if takes(v) and k not in running.exact else v for k, v in vars(weights).items()}
    )


def lay_out(weights: Any) -> None:
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
        self.running = running_layers(definition)
        self.targets: dict[str, Tensor] = {}

    def read(self) -> None:
        """Fill what was asked for."""
        self.file.read(self.targets)
        self.targets.clear()

    def layers(self, numbers: Iterable[int]) -> list[Any]:
        """Read these layers, and what else was asked for."""
        asked = [(self.running[number], self._layer(number)) for number in numbers]
        self.read()
        return [running.loaded(running.weights(tensors)) for running, tensors in asked]

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Ask for a weight."""
        self.targets[name] = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        return self.targets[name]

    def vocabulary(self, name: str) -> Tensor:
        """Ask for the embedding or the output."""
        # rows of padding depend on the layout that trained it
        padded = max(self.file.shapes.get(name, (0,))[0], self.definition.vocab_size)
        return self.take(name, padded, self.definition.hidden_size)[: self.definition.vocab_size]

    def _layer(self, number: int) -> list[Tensor]:
        """Ask for the tensors of a layer, in the order of `Block.tensors`."""
        exact = torch.float64 if self.dtype == torch.float64 else torch.float32
        tensors = []
        for row in self.definition.blocks[number].tensors(f"decoder.layers.{number}.", ""):
            (name, shape), *more = row.ours.items()
            if not more:
                # Transformer Engine's layers hold the norm inside the projection that follows it
                name = row.fused if row.fused in self.file.shapes else name
                tensors.append(self.take(name, *shape, dtype=exact if row.exact else None))
                continue
            whole = torch.empty(
                sum(rows for rows, *_ in row.ours.values()), *shape[1:], dtype=self.dtype, device=self.device
            )
            parts = whole.split([rows for rows, *_ in row.ours.values()])
            self.targets.update(zip(row.ours, parts, strict=True))
            tensors.append(whole)
        return tensors


class _LazyLayers(Sequence[Any]):
    """Layers that are read when they are asked for."""

    def __init__(self, reader: _Reader) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return self.reader.definition.num_layers

    def __getitem__(self, number: int) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self.reader.layers([number])[0]
