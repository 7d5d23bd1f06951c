"""Matmuls of a model's linear layers: the shape of each on one rank, and whether it runs in FP8. Imports no torch.

The paper's recipe (2.3) has all linear layers in FP8, forward and backward, but those of the first and last layers. The
embedding, output layer, norms, convolution, scan and attention core are not among them. Image encoder and projector
stay in BF16, as in Nemotron Nano 2 VL (arXiv 2511.03929), whose language model is trained in FP8.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.architecture.vision import PROJECTOR, VISION
from nemotron_h.core.errors import UserError

#: precision of a recipe -> formats of weights and activations, and of gradients
FP8_FORMATS = {"fp8_current_scaling": ("E4M3", "E5M2"), "fp8_blockwise": ("E4M3", "E4M3")}
#: what FP8 matmuls need of every dimension: forward, dgrad and wgrad each sum over another one (Transformer Engine)
MULTIPLE = 16
#: tokens of a block of `fp8_blockwise`, which one rank's share of a sequence has to fill
BLOCK = 128
OUTPUT_LAYER = "output_layer"
#: operands of a linear layer's three matmuls: forward, dgrad and wgrad
OPERANDS = ("activation", "weight", "gradient")
#: file of a run's folder: what its casts to float8 did, at the steps that were measured
CAST_STATISTICS = "cast_statistics.json"


@dataclass(frozen=True)
class Gemm:
    """Matmul `x [m, k] @ weight [n, k].T` on one rank; its dgrad and wgrad run in the same precision.

    Attributes:
        layer: number of the layer, from 0; the number of layers for the output layer.
        kind: name of the kind of layers, or `output`.
        name: as in the model.
        m, n, k: tokens, outputs and inputs.
        dtype: `FP8`, `BF16` or `FP32`.
        why: in FP8 its formats, else the reason that keeps the matmul out of it; empty where nothing is in FP8.
        keys: of the model, that inputs and outputs come from.
        count: how many of it the rank has: one for each of its experts, of whose tokens `m` is the mean.
    """

    layer: int
    kind: str
    name: str
    m: int
    n: int
    k: int
    dtype: str
    why: str
    keys: tuple[str, str]
    count: int = 1


def gemm_table(
    definition: ModelDefinition,
    precision: str,
    tensor_parallel: int = 1,
    *,
    tokens: int,
    bf16_edge_layers: int = 2,
    sequence_parallel: bool = False,
    expert_parallel: int = 1,
) -> list[Gemm]:
    """Return the linear layers' matmuls of a forward pass, in the order of the model.

    Args:
        definition: the model.
        precision: of the recipe.
        tensor_parallel: ranks that each weight is split over.
        tokens: of one micro batch, `seq_length * micro_batch_size`.
        bf16_edge_layers: layers at each end that stay in BF16 when `precision` is FP8.
        sequence_parallel: the ranks of a tensor-parallel group share each sequence.
        expert_parallel: ranks that routed experts are split over.
    """
    plain = "FP32" if precision == "fp32" else "BF16"
    formats = FP8_FORMATS.get(precision)
    in_fp8 = f"{formats[0]} weights and activations, {formats[1]} gradients" if formats else ""
    ends = "layer" if bf16_edge_layers == 1 else f"{bf16_edge_layers} layers"
    table = []
    for layer, block in enumerate(definition.blocks):
        edge = ""
        if layer < bf16_edge_layers:
            edge = f"first {ends}"
        elif layer >= definition.num_layers - bf16_edge_layers:
            edge = f"last {ends}"
        dtype, why = (plain, edge if formats else "") if edge or not formats else ("FP8", in_fp8)
        for matrix in block.matrices():
            n, k = matrix.on_rank(tensor_parallel)
            m, count = tokens, 1
            if not matrix.split and sequence_parallel:
                m //= tensor_parallel
            if matrix.experts:  # each rank sends its tokens, and has a share of the experts
                m = max(1, m * matrix.active * expert_parallel // matrix.experts)
                count = matrix.experts // expert_parallel
            precision_of = ("FP32", "in float32" if formats else "") if matrix.exact else (dtype, why)
            table.append(Gemm(layer, block.name, matrix.name, m, n, k, *precision_of, matrix.keys, count))
    head, width = -(-definition.vocab_size // tensor_parallel), definition.hidden_size
    why, keys = "output layer" if formats else "", ("hidden_size", "vocab_size")
    table.append(Gemm(definition.num_layers, "output", OUTPUT_LAYER, tokens, head, width, plain, why, keys))
    return table


def encoder_gemms(definition: ModelDefinition, precision: str, tensor_parallel: int, tiles: int) -> list[Gemm]:
    """Return the matmuls of image encoder and projector in a forward pass of so many tiles; none without them.

    Layers are numbered as the encoder's; the other arguments are those of `gemm_table`.
    """
    encoder = definition.encoder
    if encoder is None:
        return []
    dtype = "FP32" if precision == "fp32" else "BF16"
    table = []
    for part, blocks, rows in (
        (VISION, encoder.blocks, encoder.positions),
        (PROJECTOR, (encoder.projector,), encoder.tokens_per_tile),
    ):
        why = part if precision in FP8_FORMATS else ""
        for layer, block in enumerate(blocks):
            for matrix in block.matrices():
                n, k = matrix.on_rank(tensor_parallel)
                table.append(Gemm(layer, block.name, matrix.name, tiles * rows, n, k, dtype, why, matrix.keys))
    return table


@dataclass(frozen=True)
class GemmGroup:
    """Matmuls that differ in their layer alone.

    Attributes:
        layers: their layers, ascending.
        gemm: the first of them.
    """

    layers: tuple[int, ...]
    gemm: Gemm

    @property
    def span(self) -> str:
        """Return the layers in words: `layer 7`, or `24 layers, 2 to 49`."""
        first, last, count = self.layers[0], self.layers[-1], len(self.layers)
        return f"layer {first}" if count == 1 else f"{count} layers, {first} to {last}"


def fold(table: Iterable[Gemm]) -> list[GemmGroup]:
    """Fold equal matmuls of several layers into one row, in the order of their first layer."""
    groups: dict[Gemm, list[int]] = {}
    for gemm in table:
        groups.setdefault(dataclasses.replace(gemm, layer=-1), []).append(gemm.layer)
    return [GemmGroup(tuple(layers), dataclasses.replace(gemm, layer=layers[0])) for gemm, layers in groups.items()]


def check_gemms(
    definition: ModelDefinition,
    precision: str,
    *,
    seq_length: int,
    micro_batch_size: int,
    tensor_parallel: int = 1,
    sequence_parallel: bool = False,
    context_parallel: int = 1,
    bf16_edge_layers: int = 2,
    origin: str = "",
) -> None:
    """Refuse shapes that FP8 cannot multiply, and an FP8 recipe of which no matmul would run in FP8.

    Args:
        definition, precision, tensor_parallel, bf16_edge_layers: as `gemm_table`.
        seq_length, micro_batch_size: of the data.
        sequence_parallel: the ranks of a tensor-parallel group share each sequence.
        context_parallel: ranks that share it beyond.
        origin: the recipe or file to name in an error.
    Errors:
        UserError: names the key, and the nearest value that fits.
    """
    if precision not in FP8_FORMATS:
        return
    where = f"{origin}: " if origin else ""

    def table(model: ModelDefinition, tensor: int) -> list[Gemm]:
        rows = gemm_table(
            model, precision, tensor, tokens=seq_length * micro_batch_size, bf16_edge_layers=bf16_edge_layers
        )
        return [gemm for gemm in rows if gemm.dtype == "FP8"]

    rows = table(definition, tensor_parallel)
    if not rows:
        raise UserError(
            f"{where}precision_options.bf16_edge_layers = {bf16_edge_layers} at each end leaves none of the "
            f"{definition.num_layers} layers of {definition.name} to {precision}",
            hint=f"set it to {(definition.num_layers - 1) // 2} or less, or precision: bf16",
        )
    gathered = tensor_parallel if sequence_parallel else 1
    _check_tokens(precision, seq_length, micro_batch_size, gathered, context_parallel, where)
    for gemm in rows:
        for width, key in zip((gemm.k, gemm.n), gemm.keys, strict=True):
            if width % MULTIPLE:
                raise UserError(
                    f"{where}{gemm.name} of the {gemm.kind} layers is {gemm.k} x {gemm.n} per rank (model.{key} = "
                    f"{getattr(definition, key)}, parallel.tensor = {tensor_parallel}); {precision} needs multiples "
                    f"of {MULTIPLE}",
                    hint=_remedy(definition, key, gemm, tensor_parallel, table),
                )


def _check_tokens(
    precision: str, seq_length: int, micro_batch_size: int, gathered: int, context: int, where: str
) -> None:
    """Check that one rank's tokens of a micro-batch are a multiple of what FP8 needs.

    Args:
        gathered: ranks whose tokens are gathered for a matmul.
        context: groups of them, which share a sequence.
    """
    shares = gathered * context
    # Transformer Engine gathers whole blocks only
    multiple = (BLOCK if gathered > 1 and precision == "fp8_blockwise" else MULTIPLE) * shares
    if (seq_length * micro_batch_size) % multiple:
        share = f" over {shares} ranks" if shares > 1 else ""
        fits = _nearest(seq_length, lambda length: (length * micro_batch_size) % multiple == 0)
        raise UserError(
            f"{where}data.seq_length * data.micro_batch_size = {seq_length} * {micro_batch_size} tokens{share}: "
            f"{precision} needs a multiple of {multiple}",
            hint=f"the nearest data.seq_length that fits is {fits}",
        )


def _remedy(
    definition: ModelDefinition,
    key: str,
    gemm: Gemm,
    tensor_parallel: int,
    table: Callable[[ModelDefinition, int], list[Gemm]],
) -> str:
    """Return the hint of an error: the keys to set, each to its nearest value that fits."""

    def fits(model: ModelDefinition, tensor: int) -> bool:
        try:
            model.validate_structure("")
            model.validate_tensor_parallel(tensor, "")
        except UserError:
            return False
        return all(not (g.n % MULTIPLE or g.k % MULTIPLE) for g in table(model, tensor) if g.kind == gemm.kind)

    ways = []
    width = _nearest(
        getattr(definition, key),
        lambda value: fits(dataclasses.replace(definition, **{key: value}), tensor_parallel),
    )
    if width is not None:
        ways.append(f"model.{key} to {width}")
    tensor = next((size for size in range(tensor_parallel - 1, 0, -1) if fits(definition, size)), None)
    if tensor is not None:
        ways.append(f"parallel.tensor to {tensor}")
    return f"set {' or '.join([*ways, 'precision to bf16'])}"


def _nearest(value: int, fits: Callable[[int], bool]) -> int | None:
    """Return the nearest positive value that fits, the larger of two; None where none up to twice the value does."""
    for distance in range(1, max(value, MULTIPLE * BLOCK) + 1):
        for candidate in (value + distance, value - distance):
            if candidate > 0 and fits(candidate):
                return candidate
    return None
