"""Measure how much a model's layers and channels matter, by forward passes alone.

A layer's removal changes nothing before it, so all removals go through the model together: at layer `i` the streams of
the whole model and of the models without layer 0, ..., i-1 run through the layer, and what went into it becomes the
stream of the model without layer `i`. Every layer's weights are taken once per pass, and the cost is half of that of as
many whole models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from nemotron_h.compression.forward import Forward
from nemotron_h.inference.model import GenerationModel

#: ours: a layer runs on so many elements of its widest activation at a time (float32: 64 MiB)
LAYER_ELEMENTS = 1 << 24
#: ours: elements of all removals' residual streams of one pass (float32: 256 MiB); one window at least
STREAM_ELEMENTS = 1 << 26
Advance = Callable[[int], None]


@torch.inference_mode()
def measure_layers(
    model: GenerationModel,
    windows: np.ndarray,
    metric: str = "mse",
    advance: Advance = lambda _: None,
    device: str | None = None,
    done: Tensor | None = None,
    keep: Callable[[Tensor], None] = lambda _: None,
) -> Tensor:
    """Measure what removing each layer changes, per window.

    Args:
        windows: token ids, int64 [samples, length].
        metric: `mse` of the activations before the output matrix (paper 3.2), the mean over tokens and channels; or
            `kl` of the next token's distribution, of the whole model to the one without the layer, in nats, the mean
            over tokens (2504.11409).
        advance: told of windows that are done.
        device: see `Forward`.
        done: values of the first windows, of an interrupted measurement.
        keep: given the values of all windows so far, after each pass.
    Returns:
        float64 [samples, layers].
    """
    forward = Forward(model, device=device)
    layers, hidden = model.definition.num_layers, model.definition.hidden_size
    rows = max(1, STREAM_ELEMENTS // ((layers + 1) * windows.shape[1] * hidden))
    values = torch.empty(len(windows), layers, dtype=torch.float64)
    start = 0 if done is None else len(done)
    if start:
        values[:start] = done
        advance(start)
    for first in range(start, len(windows), rows):
        tokens = torch.from_numpy(windows[first : first + rows])
        streams = forward.embed(tokens).new_empty(layers + 1, *tokens.shape, hidden)  # the last is the whole model
        whole = streams[layers]
        whole.copy_(forward.embed(tokens))
        for index in range(layers):
            weights = forward.weights(index)
            streams[index] = whole
            for part in _parts(forward, [*streams[:index].flatten(0, 1).unbind(), *whole.unbind()]):
                x = torch.stack(part)
                x += forward.layer(index, weights, x)
                for stream, row in zip(part, x, strict=True):
                    stream.copy_(row)
        for row in range(len(tokens)):
            compare = _mean_square if metric == "mse" else _divergence
            values[first + row] = compare(forward, whole[row], streams[:layers, row]).cpu()
        advance(len(tokens))
        keep(values[: first + len(tokens)])
    return values


def _parts(forward: Forward, rows: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the rows that go through a layer together."""
    count = max(1, LAYER_ELEMENTS // (len(rows[0]) * widest(forward)))
    for first in range(0, len(rows), count):
        yield rows[first : first + count]


def widest(forward: Forward) -> int:
    """Return the channels of the widest activation in a layer."""
    definition = forward.definition
    return max(definition.hidden_size, *(m.outputs for block in definition.blocks for m in block.matrices()))


def _mean_square(forward: Forward, whole: Tensor, removed: Tensor) -> Tensor:
    expected = forward.final(whole)
    return torch.stack([(forward.final(x) - expected).double().square().mean() for x in removed])


def _divergence(forward: Forward, whole: Tensor, removed: Tensor) -> Tensor:
    total = torch.zeros(len(removed), dtype=torch.float64, device=whole.device)
    step = max(1, LAYER_ELEMENTS // forward.definition.vocab_size)
    for first in range(0, len(whole), step):
        expected = forward.logits(whole[first : first + step]).double().log_softmax(-1)
        for number, x in enumerate(removed[:, first : first + step]):
            actual = forward.logits(x).double().log_softmax(-1)
            total[number] += (expected.exp() * (expected - actual)).sum()
    return total / len(whole)


class Sums:
    """Sums over samples of one activation: its mean over the sequence, then l2 over samples, which Minitron
    (2407.14679) found best.
    """

    def __init__(self, sums: Tensor, samples: int = 0) -> None:
        self.sums, self.samples = sums, samples

    @classmethod
    def zero(cls, width: int) -> Sums:
        """Return sums of no samples."""
        return cls(torch.zeros(width, dtype=torch.float64))

    def add(self, values: Tensor) -> None:
        """Add values [samples, length, width]."""
        wide = torch.float64 if values.dtype == torch.float64 else torch.float32
        self.sums += values.abs().mean(1, dtype=wide).double().square().sum(0).cpu()
        self.samples += len(values)

    def values(self) -> Tensor:
        """Return float64 [width]."""
        return self.sums.sqrt()


@torch.inference_mode()
def measure_widths(
    model: GenerationModel,
    windows: np.ndarray,
    advance: Advance = lambda _: None,
    device: str | None = None,
    done: dict[str, Sums] | None = None,
    keep: Callable[[dict[str, Sums]], None] = lambda _: None,
) -> dict[str, Tensor]:
    """Measure how strongly every channel is active, in one forward pass.

    Args:
        windows: token ids, int64 [samples, length].
        advance, device, done, keep: as of `measure_layers`.
    Returns:
        name -> float64 [width]: `layers.I.norm` [hidden], the layer's normalised input;
        `layers.I.neurons` [ffn_hidden_size] of a feed-forward layer, after the activation (paper 3.2); `layers.I.x`
        [heads x head_dim] of a Mamba-2 layer, x's part of the input projection (2504.11409); of a mixture of experts
        `layers.I.experts` [num_experts], the length of what each adds to its tokens, `layers.I.expert_neurons`
        [num_experts x expert_hidden_size], after the activation and weighed by the router, and
        `layers.I.shared_neurons` [shared_expert_hidden_size]; `final_norm` [hidden].
    """
    forward = Forward(model, device=device)
    sums = done or {}
    start = next(iter(sums.values())).samples if sums else 0
    advance(start)

    def add(name: str, values: Tensor) -> None:
        if name not in sums:
            sums[name] = Sums.zero(values.shape[-1])
        sums[name].add(values)

    rows = max(1, LAYER_ELEMENTS // (windows.shape[1] * widest(forward)))
    for first in range(start, len(windows), rows):
        x = forward.embed(torch.from_numpy(windows[first : first + rows]))
        for index in range(model.definition.num_layers):
            x = x + forward.layer(
                index,
                forward.weights(index),
                x,
                lambda part, values, index=index: add(f"layers.{index}.{part}", values),
            )
        add("final_norm", forward.final(x))
        advance(len(x))
        keep(sums)
    return {name: each.values() for name, each in sums.items()}
