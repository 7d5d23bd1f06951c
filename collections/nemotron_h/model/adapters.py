"""LoRA and DoRA on the layers' matrices, in Megatron's tensor and sequence parallelism.

A matrix W [outputs, inputs] keeps its weights, and its output becomes

    lora   W x + s B A x
    dora   m / |W + s B A| * (W x + s B A x)        rows of m and of the norm are those of W

with A [rank, inputs], B [outputs, rank] and s = alpha / rank; B begins at 0 and m at |W|, so that an untrained adapter
changes nothing. The norm is a constant for the gradients (DoRA, arXiv:2402.09353, 4.3). Each routed expert has an
adapter of its own, on the rank that has the expert.

NeMo's own LoRA is not used: it has no layout of `in_proj` whose parts z, x, B, C, dt are split over ranks one by one,
its DoRA takes norms over the inputs of one rank, and its recipes refuse this family.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.random import get_expert_parallel_rng_tracker_name
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from nemotron_h.model import init
from nemotron_h.model.having import having
from nemotron_h.schema.recipe import AdapterSchema

#: of an adapted layer's submodule, and so in the names of its weights
NAME = "adapter"
PARTS = ("all", "base", "adapter")


class Adapter(nn.Module):
    """The trained part beside one matrix.

    Args:
        settings: kind, rank, alpha, dropout.
        weight: this rank's part of the matrix.
        split: of the matrix over tensor-parallel ranks, as `Matrix.split`; "" where each has all of it.
        sequence_parallel: whether activations outside the layer are split along the sequence.
        routed: whether it is an expert's, whose tokens are those that its rank was sent.
    """

    def __init__(
        self,
        settings: AdapterSchema,
        weight: nn.Parameter,
        split: str,
        sequence_parallel: bool = False,
        routed: bool = False,
    ) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        self.scale = settings.alpha / settings.rank
        self.dropout, self.split, self.sequence_parallel = settings.dropout, split, sequence_parallel
        self.row_parallel, self.routed = split == "inputs", routed
        self.group = parallel_state.get_tensor_model_parallel_group()
        like = {"dtype": weight.dtype, "device": weight.device}
        self.a = nn.Parameter(torch.empty(settings.rank, inputs, **like))
        self.b = nn.Parameter(torch.zeros(outputs, settings.rank, **like))
        self.magnitude = None
        if settings.kind == "dora":
            self.magnitude = nn.Parameter(torch.ones(outputs, dtype=torch.float32, device=weight.device))
        # which are split, and along which axis; of the others a rank sees a part of the sequence, or all of it
        for name, parameter in self.named_parameters():
            own = routed or split == ("inputs" if name == "a" else "outputs")
            set_tensor_model_parallel_attributes(parameter, own, 1 if name == "a" else 0, 1)
            parameter.sequence_parallel = sequence_parallel and not own
            # Megatron reduces gradients of experts over the ranks that have the same ones
            parameter.allreduce = getattr(weight, "allreduce", True)

    def initialize(self, name: str, seed: int) -> None:
        """Initialize A from (seed, the matrix's global name), uniform as in `nn.Linear`: the same in any layout."""
        ranks = self.group.size() if self.row_parallel else 1
        bound = 1 / math.sqrt(self.a.shape[1] * ranks)
        shard = {"axis": 1, "tp_rank": self.group.rank(), "tp_size": ranks} if self.row_parallel else {}
        init.fill(self.a, f"{name}.{NAME}.a", init.uniform(-bound, bound), seed, **shard)

    @torch.no_grad()
    def lengths(self, weight: Tensor) -> Tensor:
        """Return |W + s B A| of every row of this rank, [outputs], in float32 at least."""
        exact = torch.promote_types(weight.dtype, torch.float32)
        rows = torch.addmm(weight.to(exact), self.b.to(exact), self.a.to(exact), alpha=self.scale)
        squares = rows.square().sum(dim=1)
        if self.row_parallel:
            torch.distributed.all_reduce(squares, group=self.group)
        return squares.sqrt()

    @torch.no_grad()
    def measure(self, weight: Tensor) -> None:
        """Set DoRA's m to the present lengths of the rows."""
        if self.magnitude is not None:
            self.magnitude.copy_(self.lengths(weight))

    def forward(self, x: Tensor, out: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the adapted layer's output.

        Args:
            x: its input [sequence, batch, inputs], as the layer got it (normalised where it norms its input); of an
                expert [tokens, inputs].
            out: W x + bias [sequence, batch, outputs], as the layer returns it.
            weight: W.
            bias: of the layer, which DoRA's lengths do not scale; None or empty is none.
        """
        h = self._across(F.linear(self._dropped(x), self.a))
        out = out + F.linear(h, self.b).mul(self.scale)
        if self.magnitude is None:
            return out
        scale = (self.magnitude / self.lengths(weight)).to(out.dtype)
        if bias is None or not bias.numel():  # Transformer Engine's layers without one have an empty one
            return out * scale
        return (out - bias) * scale + bias

    def _across(self, h: Tensor) -> Tensor:
        """Return A x as B takes it: the narrow activation crosses the ranks, never x."""
        if not self.split:
            return h
        if self.row_parallel:
            if self.sequence_parallel:
                return reduce_scatter_to_sequence_parallel_region(h)
            return reduce_from_tensor_model_parallel_region(h)
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(h)
        return copy_to_tensor_model_parallel_region(h)

    def _dropped(self, x: Tensor) -> Tensor:
        if not self.dropout or not self.training:
            return x
        if self.routed:
            with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                return F.dropout(x, self.dropout)
        if self.row_parallel or self.sequence_parallel:  # each rank has a part of x of its own
            with get_cuda_rng_tracker().fork():
                return F.dropout(x, self.dropout)
        return F.dropout(x, self.dropout)

    def _apply(self, fn, recurse: bool = True):
        """Keep the lengths in float32 when the model is cast to a lower precision (moves still apply)."""
        kept = None if self.magnitude is None else self.magnitude.data
        super()._apply(fn, recurse)
        if kept is not None and self.magnitude.dtype != kept.dtype and self.magnitude.dtype.itemsize < 4:
            self.magnitude.data = kept.to(self.magnitude.device)
        return self

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Return the adapter's tensors in Megatron's distributed-checkpoint layout."""
        state = self.state_dict(prefix="", keep_vars=True)
        axes = {"inputs": {"a": 1}, "outputs": {"b": 0, "magnitude": 0}, "": {}}[self.split]
        return make_sharded_tensors_for_checkpoint(state, prefix, axes, sharded_offsets)


class _Adapted:
    """Mixin before a parallel linear layer's class: the same layer with an `adapter`. The base's names stay."""

    def pairs(self) -> Iterator[tuple[str, str, Adapter]]:
        """Yield the names of weight and adapter, and the adapter."""
        yield "weight", NAME, self.adapter

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor | None]:
        if hasattr(self, "activation_dtype"):  # Transformer Engine refuses a float32 parameter, such as DoRA's lengths
            self.activation_dtype = x.dtype
        out, bias = super().forward(x, *args, **kwargs)
        if isinstance(out, tuple):  # Transformer Engine's layer with a norm, asked for the normalised input
            out, x = out
        return self.adapter(x, out, self.weight, getattr(self, "bias", None)), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        own = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        state = {key: value for key, value in own.items() if not key.startswith(f"{prefix}{NAME}.")}
        return {**state, **self.adapter.sharded_state_dict(f"{prefix}{NAME}.", sharded_offsets, metadata)}


class _AdaptedGroup(_Adapted):
    """Mixin before Transformer Engine's layer of all experts of a rank (`weight0`, ...): `adapter` has as many."""

    def pairs(self) -> Iterator[tuple[str, str, Adapter]]:
        """Yield the names of each expert's weight and adapter, and the adapter."""
        for index, adapter in enumerate(self.adapter):
            yield f"weight{index}", f"{NAME}.{index}", adapter

    def forward(self, x: Tensor, m_splits: list[int]) -> tuple[Tensor, Tensor | None]:
        if hasattr(self, "activation_dtype"):  # as above
            self.activation_dtype = x.dtype
        out, bias = super(_Adapted, self).forward(x, m_splits)
        rows = zip(self.pairs(), x.split(m_splits), out.split(m_splits), strict=True)
        return torch.cat([adapter(x, out, getattr(self, name)) for (name, _, adapter), x, out in rows]), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Return the layout of `SequentialMLP`, whose names Megatron's grouped layers have too."""
        state = super(_Adapted, self).sharded_state_dict(prefix, sharded_offsets, metadata)
        experts, rank = len(self.adapter), parallel_state.get_expert_model_parallel_rank()
        total = experts * parallel_state.get_expert_model_parallel_world_size()
        for index, (_, name, adapter) in enumerate(self.pairs()):
            offsets = (*sharded_offsets, (len(sharded_offsets), rank * experts + index, total))
            own = adapter.sharded_state_dict(f"{prefix}{name}.", offsets, metadata)
            replace_prefix_for_sharding(own, f"{prefix}{name}.", f"{prefix}{NAME}.")
            for tensor in own.values():
                tensor.replica_id = (*tensor.replica_id[:2], parallel_state.get_expert_data_parallel_rank())
            state |= own
        return state


@functools.cache
def _adapted_class(layer: type, mixin: type = _Adapted) -> type:
    return type(f"Adapted{layer.__name__}", (mixin, layer), {})


def attach(model: nn.Module, settings: AdapterSchema, seed: int) -> None:
    """Freeze a model and put adapters on its targets.

    Args:
        model: a `NemotronHMegatronModel`, this rank's part.
        settings: checked by `check_adapter`.
        seed: of the adapters' initial weights.
    """
    model.requires_grad_(False)
    config = model.config
    blocks = config.definition().blocks
    for layer in model.decoder.layers:
        number = layer.layer_number - 1
        matrices = {matrix.name: matrix for matrix in blocks[number].matrices()}
        for name, matrix in matrices.items():
            if matrix.experts and name in settings.targets:
                for linear, weights in layer.expert_linears(name):
                    _attach_to_experts(linear, weights, settings, f"layers.{number}.mlp", seed)
        for name, linear in list(layer.named_modules()):
            target = next((own for own in matrices if f".{name}".endswith(f".{own}")), None)
            if target not in settings.targets or matrices[target].experts:
                continue
            if hasattr(linear, "return_layernorm_output"):
                linear.return_layernorm_output = True
            linear.adapter = Adapter(settings, linear.weight, matrices[target].split, config.sequence_parallel)
            linear.adapter.initialize(f"layers.{number}.{name}", seed)
            linear.adapter.measure(linear.weight)
            linear.__class__ = _adapted_class(type(linear))


def _attach_to_experts(
    linear: nn.Module, weights: Mapping[str, str], settings: AdapterSchema, layer: str, seed: int
) -> None:
    """Put an adapter beside each of a linear layer's weights, `ExpertsLayer.expert_linears`; `layer` begins names."""
    adapters = []
    for weight, name in weights.items():
        matrix = getattr(linear, weight)
        adapters.append(Adapter(settings, matrix, "", routed=True))
        adapters[-1].initialize(f"{layer}.{name}", seed)
        adapters[-1].measure(matrix)
    alone = list(weights) == ["weight"]
    linear.adapter = adapters[0] if alone else nn.ModuleList(adapters)
    linear.__class__ = _adapted_class(type(linear), _Adapted if alone else _AdaptedGroup)


def adapted(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every adapted layer of a model with its name."""
    for name, module in model.named_modules():
        if isinstance(module, _Adapted):
            yield name, module


def is_adapter_key(key: str) -> bool:
    """Tell whether a name is that of an adapter's weight."""
    return f".{NAME}." in key


def only(part: str, models: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """Restrict the models' `sharded_state_dict` to one part inside the block, such as `adapter`.

    Args:
        part: one of `PARTS`.
        models: modules that hold the Megatron models, at any depth.
    """
    return having("state_part", part, models)
