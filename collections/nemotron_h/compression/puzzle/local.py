"""Train the variants of a layer to do what the layer does (2411.19146, 3), and compare each in its place.

Each reads what the parent's layer reads, and its loss is |o_p - o_c|^2 / |o_p|^2 of what both add to the residual
stream: no gradient passes between layers, so that layers are trained apart, in any order and at the same time. The
parent's activations are computed again for each batch, none is stored.

Axes: b windows, l tokens, h hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_h.architecture.blocks.block import Block
from nemotron_h.compression.forward import Forward
from nemotron_h.compression.puzzle.initial import Fit
from nemotron_h.compression.scoring import LOGITS_ELEMENTS
from nemotron_h.inference.model import GenerationModel
from nemotron_h.model.blocks.registry import RUNNING

Advance = Callable[[int], None]
#: what is added to a residual stream [b, l, h], of that stream
Part = Callable[[Tensor], Tensor]


class Trained:
    """Layer, or several, that `train` trains.

    Attributes:
        tensors: its weights.
    """

    tensors: list[Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """Return what it adds to the residual stream x [b, l, h]."""
        raise NotImplementedError

    def parameter_groups(self, lr: float, steps: int) -> list[dict[str, Any]]:
        """Return what trains in so many steps, as an optimizer's groups."""
        return [{"params": self.tensors, "lr": lr}]

    def begin(self, done: float) -> Tensor | float:
        """Begin a step, of which this share is done before it, and return what its loss has beside the error."""
        return 0.0

    def finish(self) -> None:
        """End the training: `tensors` are its result."""


class Piece(Trained):
    """A layer outside of its model.

    Args:
        block: its widths.
        tensors: its weights, as a checkpoint holds them; copies are trained, and run in the parent's dtype.
        forward: of the parent.
    """

    def __init__(self, block: Block, tensors: Sequence[Tensor], forward: Forward) -> None:
        self.running = RUNNING[block.letter](block, forward.definition.norm_epsilon)
        self.tensors, self.forward = [tensor.to(forward.device, copy=True) for tensor in tensors], forward

    def __call__(self, x: Tensor) -> Tensor:
        """Return what it adds to the residual stream x [b, l, h]."""
        return self.forward.apply(self.running, self.weights(), x)

    def weights(self) -> Any:
        """Return its weights as a model in memory has them."""
        return self.running.loaded(self.running.weights(self.forward.cast(self.running.block, self.tensors)))


def own_layer(forward: Forward, layer: int) -> Part:
    """Return what a layer of the parent adds to the residual stream."""
    weights = forward.weights(layer)
    return lambda x: forward.layer(layer, weights, x)


class Replaced:
    """The parent with something in its layers' places.

    Args:
        forward: of the parent.
        part: layer of the parent -> what is there, asked for when it runs; None is no layer.
    """

    def __init__(self, forward: Forward, part: Callable[[int], Part | None]) -> None:
        self.forward, self.part = forward, part

    def logits(self, tokens: Tensor) -> Tensor:
        """Return logits [rows, length, vocabulary] of tokens, int64 [rows, length]."""
        x = self.forward.embed(tokens)
        for layer in range(self.forward.definition.num_layers):
            if part := self.part(layer):
                x = x + part(x)
        return self.forward.logits(x)


class Chain(Trained):
    """Layers outside of their model, one after the other.

    Args:
        parts: of each what it adds to the residual stream; those that are a `Piece` are trained.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self.tensors = [tensor for part in parts if isinstance(part, Piece) for tensor in part.tensors]

    def __call__(self, x: Tensor) -> Tensor:
        """Return what they add to the residual stream x [b, l, h]."""
        stream = x
        for part in self.parts:
            stream = stream + part(stream)
        return stream - x


@dataclass(frozen=True)
class Training:
    """Length and step of a variant's training; as of `LocalSchema`, with all tokens of the variant."""

    tokens: int
    batch: int
    lr: float


def prefix(forward: Forward, tokens: np.ndarray, layer: int) -> Tensor:
    """Return the residual stream [b, l, h] that the parent's layer reads, of tokens [b, l]."""
    x = forward.embed(torch.from_numpy(tokens))
    for before in range(layer):
        x = x + forward.layer(before, forward.weights(before), x)
    return x


def outputs(forward: Forward, layers: range, x: Tensor) -> Tensor:
    """Return what layers of the parent, one after the other, add to the residual stream x [b, l, h]."""
    stream = x
    for layer in layers:
        stream = stream + forward.layer(layer, forward.weights(layer), stream)
    return stream - x


class Aim:
    """Aim of a variant's training: what the parent's layers add to the residual stream."""

    def target(self, forward: Forward, layers: range, x: Tensor, dtype: torch.dtype) -> Any:
        """Return what layers of the parent have of it, of the residual stream x [b, l, h] that the first reads."""
        return outputs(forward, layers, x).to(dtype)

    def distance(self, piece: Any, x: Tensor, target: Any) -> Tensor:
        """Return how far a variant is from the target, a sum over tokens, in its dtype."""
        return (piece(x).to(target.dtype) - target).square().sum()

    def size(self, target: Any) -> Tensor:
        """Return the distance of a variant that has nothing of it."""
        return target.square().sum()


#: |o_p - o_c|^2 of |o_p|^2
OUTPUT = Aim()


def train(
    forward: Forward,
    layers: range,
    pieces: Mapping[str, Trained],
    lengths: Mapping[str, Training],
    batches: Callable[[int], np.ndarray],
    advance: Advance = lambda _: None,
    aim: Aim = OUTPUT,
) -> None:
    """Train what may stand in the place of a layer, or of several, all on the same text, each as long as it is to be.

    Args:
        forward: of the parent.
        layers: of the parent, one after the other.
        pieces: variants by name; their weights change.
        lengths: by name.
        batches: number of a step -> token ids, int64 [b, l].
        advance: told the tokens of each step.
        aim: of which the loss is the distance over the size.
    """
    first = batches(0).size
    steps = {name: math.ceil(length.tokens / first) for name, length in lengths.items()}
    optimizers = {}
    for name, piece in pieces.items():
        groups = piece.parameter_groups(lengths[name].lr, steps[name])
        # the usual betas; no decay, which would pull a layer away from what it imitates
        optimizers[name] = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
        _require_grad(optimizers[name], True)
    rates = {name: [group["lr"] for group in optimizer.param_groups] for name, optimizer in optimizers.items()}
    for step in range(max(steps.values(), default=0)):
        with torch.no_grad():
            x = prefix(forward, batches(step), layers.start)
            target = aim.target(forward, layers, x, torch.float32)
            scale = aim.size(target)
        for name, optimizer in optimizers.items():
            if step >= steps[name]:
                continue
            done = step / steps[name]
            for group, lr in zip(optimizer.param_groups, rates[name], strict=True):
                group["lr"] = lr * (1 + math.cos(math.pi * done)) / 2
            beside = pieces[name].begin(done)
            loss = aim.distance(pieces[name], x, target) / scale + beside
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        advance(first)
    for name, optimizer in optimizers.items():
        _require_grad(optimizer, False)
        pieces[name].finish()


def _require_grad(optimizer: torch.optim.Optimizer, required: bool) -> None:
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            tensor.requires_grad_(required)
            tensor.grad = None


@torch.inference_mode()
def errors(
    forward: Forward,
    layers: range,
    pieces: Mapping[str, Trained],
    windows: np.ndarray,
    batch: int,
    aim: Aim = OUTPUT,
) -> dict[str, float]:
    """Return the distance of each variant over the size, of all windows [samples, l]: |o_p - o_c|^2 / |o_p|^2, of which
    a layer that is left out has 1, where no other aim is given.
    """
    total, apart = 0.0, dict.fromkeys(pieces, 0.0)
    for start in range(0, len(windows), batch):
        x = prefix(forward, windows[start : start + batch], layers.start)
        target = aim.target(forward, layers, x, torch.float64)
        total += float(aim.size(target))
        for name, piece in pieces.items():
            apart[name] += float(aim.distance(piece, x, target))
    return {name: value / total for name, value in apart.items()}


def imitate(
    forward: Forward,
    layers: range,
    pieces: Mapping[str, Trained],
    lengths: Mapping[str, Training],
    batches: Callable[[int], np.ndarray],
    held_out: np.ndarray,
    advance: Advance = lambda _: None,
    aim: Aim = OUTPUT,
) -> dict[str, tuple[float, float]]:
    """Train as `train`, and give back its weights to what training made worse on held-out text [samples, l].

    Returns:
        by name `errors` before and after it.
    """
    batch = max(length.batch for length in lengths.values())
    initial = {name: [tensor.clone() for tensor in piece.tensors] for name, piece in pieces.items()}
    before = errors(forward, layers, pieces, held_out, batch, aim)
    train(forward, layers, pieces, lengths, batches, advance, aim)
    after = errors(forward, layers, pieces, held_out, batch, aim)
    for name, piece in pieces.items():
        if not after[name] <= before[name]:  # not a number is worse too
            for tensor, value in zip(piece.tensors, initial[name], strict=True):
                tensor.copy_(value)
            after[name] = before[name]
    return {name: (before[name], after[name]) for name in pieces}


@torch.inference_mode()
def fit_linear(forward: Forward, layer: int, windows: np.ndarray, batch: int) -> Fit:
    """Return the sums that fit a linear layer to a parent's layer over windows [samples, l]."""
    weights, hidden = forward.weights(layer), forward.definition.hidden_size
    sums = torch.zeros(2, hidden, hidden, dtype=torch.float64, device=forward.device)
    for start in range(0, len(windows), batch):
        x = prefix(forward, windows[start : start + batch], layer)
        inputs = forward.norm(x, weights.norm).flatten(0, 1).double()
        sums[0].addmm_(inputs.T, inputs)
        sums[1].addmm_(inputs.T, forward.layer(layer, weights, x).flatten(0, 1).double())
    return Fit(*sums.cpu())


@dataclass(frozen=True)
class Change:
    """Results of a model with something replaced, beside those of its parent.

    Attributes:
        kl: from the parent's distribution of the next token to this one's, in nats, the mean over tokens.
        loss: mean cross entropy of the text's next token, in nats.
        accuracy: share of positions whose most probable token is the text's next one.
    """

    kl: float
    loss: float
    accuracy: float

    def measured(self, measure: str, parent: Change) -> float:
        """Return what is lost against the parent by a measure, of `MEASURES`."""
        if measure == "kl":
            return self.kl
        return self.loss - parent.loss if measure == "loss" else parent.accuracy - self.accuracy


@torch.inference_mode()
def changes(
    forward: Forward,
    layer: int,
    pieces: Mapping[str, Piece | None],
    windows: np.ndarray,
    batch: int,
    advance: Advance = lambda _: None,
) -> dict[str, Change]:
    """Compare the parent with each of its variants in a layer's place, and no other change (2411.19146, 4.2).

    Args:
        pieces: by name; None leaves the layer out. The parent itself is not among them.
        windows: token ids, int64 [samples, l + 1].
        advance: told the tokens of each batch.
    Returns:
        by name; "" is the parent.
    """
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in ("", *pieces)}
    for start in range(0, len(windows), batch):
        text = windows[start : start + batch]
        x = prefix(forward, text[:, :-1], layer)
        weights = forward.weights(layer)
        streams = {"": x + forward.layer(layer, weights, x)}
        for name, piece in pieces.items():
            streams[name] = x if piece is None else x + piece(x)
        for after in range(layer + 1, forward.definition.num_layers):
            weights = forward.weights(after)
            streams = {name: each + forward.layer(after, weights, each) for name, each in streams.items()}
        labels = torch.from_numpy(text[:, 1:])
        for name, sum_of in compare(forward, streams, labels).items():
            sums[name] += sum_of
        advance(labels.numel())
    count = windows[:, 1:].size
    return {name: Change(*(total / count).tolist()) for name, total in sums.items()}


def compare(forward: Forward, streams: Mapping[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    """Return sums over tokens of KL from the stream "", of cross entropy and of hits, float64 [3] of each stream.

    Args:
        streams: after the last layer, [b, l, h].
        labels: next tokens, int64 [b, l].
    """
    rows = max(1, LOGITS_ELEMENTS // forward.definition.vocab_size)
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in streams}
    wanted = labels.flatten().to(forward.device).split(rows)
    parts = {name: x.flatten(0, 1).split(rows) for name, x in streams.items()}
    for number, labels_of in enumerate(wanted):
        expected = forward.logits(parts[""][number]).float().log_softmax(-1)
        for name, each in parts.items():
            actual = expected if name == "" else forward.logits(each[number]).float().log_softmax(-1)
            kl = F.kl_div(actual, expected, reduction="none", log_target=True).sum(-1).double().sum()
            loss = F.nll_loss(actual, labels_of, reduction="none").double().sum()
            hits = (actual.argmax(-1) == labels_of).sum()
            sums[name] += torch.stack([kl, loss, hits.double()]).cpu()
    return sums


@torch.inference_mode()
def child_changes(
    parent: GenerationModel, children: Mapping[str, GenerationModel], windows: np.ndarray, batch: int
) -> dict[str, Change]:
    """Compare whole children, by name, with their parent over windows [samples, l + 1]."""
    forwards = {"": Forward(parent), **{name: Forward(child) for name, child in children.items()}}
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in forwards}
    for start in range(0, len(windows), batch):
        text = windows[start : start + batch]
        layers = {name: each.definition.num_layers for name, each in forwards.items()}
        streams = {name: prefix(each, text[:, :-1], layers[name]) for name, each in forwards.items()}
        for name, sum_of in compare(forwards[""], streams, torch.from_numpy(text[:, 1:])).items():
            sums[name] += sum_of
    return {name: Change(*(sums[name] / windows[:, 1:].size).tolist()) for name in children}
