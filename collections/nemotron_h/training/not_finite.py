"""Find where values of a training step are not finite, while it is run again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core import parallel_state
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch import Tensor, nn


@dataclass
class Place:
    """Place on one rank where values of a step are not finite.

    Attributes:
        rank, stage: of all ranks, and of the pipeline.
        micro_batch: number, from 0, of the first with such a value; None where none has one, or none is told apart.
        samples: of that micro-batch, with their sources.
        part: whose output has the first such value, empty where only the loss or gradients have one.
        gradients: weights with such a gradient before ranks are summed, in the order of the backward pass.
        weights: that are not finite themselves.
        trained: how many weights have gradients.
        largest: the largest gradient, where each is finite.
    """

    rank: int
    stage: int
    micro_batch: int | None = None
    samples: str = ""
    part: str = ""
    gradients: list[str] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    trained: int = 0
    largest: str = ""

    @property
    def order(self) -> tuple[float, ...]:
        """Return what ranks are sorted by: the first micro-batch; of it the first stage of that pass."""
        number = math.inf if self.micro_batch is None else self.micro_batch
        return (number, not self.gradients, self.stage if self.part else -self.stage, self.rank)

    def where(self, micro_batches: int) -> str:
        """Return it in words, of so many micro-batches."""
        number = "" if self.micro_batch is None else f"micro-batch {self.micro_batch + 1} of {micro_batches} on "
        return f"{number}rank {self.rank}" + (f", samples {self.samples}" if self.samples else "")

    def first_value(self) -> str:
        """Return a sentence that names where a loss that is not finite comes from."""
        weights = f" Weights that are not finite: {', '.join(self.weights[:3])}." if self.weights else ""
        if self.part:
            return f"It first appears in the output of {self.part}.{weights}"
        return f"Every layer's output is finite; the loss itself is not.{weights}"

    def first_gradient(self) -> str:
        """Return a sentence that names the weights whose gradients are not finite."""
        if self.gradients:
            count = f"{len(self.gradients)} of {self.trained}"
            return f"Of {count} weights, first in the backward pass: {', '.join(self.gradients[:3])}."
        return f"Each value is finite, their norm is not: the largest is {self.largest}."


class Search:
    """Look at the outputs of layers and at gradients of the steps that run inside the block, and note the first values
    that are not finite. Gradients are reduced at the end of the step there, so that they are this rank's until then.

    Args:
        trainer: whose step is run.
        pl_module: its model.
        samples: returns the samples of a micro-batch in words.
    """

    def __init__(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, samples: Callable[[dict[str, Any]], str]
    ) -> None:
        self.model = get_attr_wrapped_model(pl_module, "decoder", return_model_obj=True)
        self.config, self.ddp, self.samples = get_model_config(pl_module), trainer.strategy.ddp_config, samples
        self.place = Place(trainer.global_rank, parallel_state.get_pipeline_model_parallel_rank())
        self.batches: list[dict[str, Any]] = []
        self.before: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Search:
        self.handles = [m.register_forward_hook(self._hook(name)) for name, m in _named_parts(self.model).items()]
        reduce = self.config.finalize_model_grads_func

        def look_and_reduce(*args: Any, **kwargs: Any) -> Any:
            self._look_at_gradients()
            return reduce(*args, **kwargs)

        self._swap(self.config, "finalize_model_grads_func", look_and_reduce)
        self._swap(self.config, "grad_sync_func", None)
        self._swap(self.ddp, "overlap_grad_reduce", False)
        return self

    def _swap(self, owner: Any, name: str, value: Any) -> None:
        self.before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def __exit__(self, *_: object) -> None:
        for before in self.before:
            setattr(*before)
        for handle in self.handles:
            handle.remove()

    def begin(self, batch: dict[str, Any]) -> None:
        """Note a micro-batch that begins; without pipeline stages the one before has gone backward by now."""
        if self.batches and parallel_state.get_pipeline_model_parallel_world_size() == 1:
            self._look_at_gradients()
        self.batches.append(batch)

    def end(self, output: Tensor) -> None:
        """Note the loss of a micro-batch, or what a stage sends on."""
        if not _holds_only_finite(output):
            self._note()

    def _hook(self, part: str) -> Callable:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            if not self.place.part and not _holds_only_finite(output):
                self._note()
                self.place.part = part

        return look

    def _note(self) -> None:
        if self.place.micro_batch is None:
            self.place.micro_batch = len(self.batches) - 1
            self.place.samples = self.samples(self.batches[-1])
            self.place.weights = [name for name, weight in _weights(self.model) if not _holds_only_finite(weight)]

    def _look_at_gradients(self) -> None:
        """Note gradients that are not finite, once; with pipeline stages no micro-batch is known for them."""
        if self.place.gradients:
            return
        largest = {name: float(torch.linalg.vector_norm(g, math.inf)) for name, g in _gradients(self.model)}
        self.place.trained = len(largest)
        self.place.gradients = [name for name, value in largest.items() if not math.isfinite(value)][::-1]
        if not self.place.gradients:
            name = max(largest, key=largest.__getitem__, default="")
            self.place.largest = f"{largest[name]:.1e}, of {name}" if name else ""
        elif parallel_state.get_pipeline_model_parallel_world_size() == 1:
            self._note()


def fingerprint(pl_module: pl.LightningModule) -> Tensor:
    """Return norms of every gradient [weights, 2], the same bits where each of their values is; NaN is 0."""
    model = get_attr_wrapped_model(pl_module, "decoder", return_model_obj=True)
    norms = [torch.linalg.vector_norm(g, order).float() for _, g in _gradients(model) for order in (1, 2)]
    return torch.stack(norms).nan_to_num() if norms else torch.zeros(0)


def _gradients(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights that are trained by name, with Megatron's sums of their gradients."""
    return ((name, weight.main_grad) for name, weight in _weights(model) if hasattr(weight, "main_grad"))


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield weights by their names in the whole model: a pipeline stage counts its layers from 0."""
    layers = {str(n): str(layer.layer_number - 1) for n, layer in enumerate(model.decoder.layers)}
    for name, weight in model.named_parameters():
        stack, _, rest = name.partition("decoder.layers.")
        number, _, part = rest.partition(".")
        yield (f"{stack}decoder.layers.{layers[number]}.{part}" if rest else name), weight


def _named_parts(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a forward pass in order, by the names that an error uses."""
    parts: dict[str, nn.Module] = {}
    if getattr(model, "pre_process", True):
        parts["the embedding"] = model.embedding
    definition = model.config.definition()
    if definition.encoder and model.pre_process:
        named = enumerate(zip(definition.encoder.blocks, model.vision.layers, strict=True))
        parts |= {f"layer {number} of the encoder ({block.name})": layer for number, (block, layer) in named}
        parts["the projector"] = model.projector
    blocks = definition.blocks
    for layer in model.decoder.layers:
        number = layer.layer_number - 1
        parts[f"layer {number} ({blocks[number].name})"] = layer
    if getattr(model, "post_process", True):
        parts["the final norm"] = model.decoder.final_norm
        parts["the output layer"] = model.output_layer
    return parts


def _holds_only_finite(value: Any) -> bool:
    tensors = value if isinstance(value, tuple | list) else (value,)
    return all(bool(torch.isfinite(t).all()) for t in tensors if torch.is_tensor(t) and t.is_floating_point())
