"""Work on a batch as one CUDA graph: the GPU is given its few hundred kernels at once, not one by one from Python."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nemotron_h.inference.model import GenerationModel
from nemotron_h.inference.states import States


class Recorded:
    """A function of tensors, through a CUDA graph where there is a GPU.

    The first call runs without: it compiles what is to be compiled. The second is recorded, and run again from then on:
    what the function does on the host is done at the first two calls alone.

    Args:
        function: takes tensors of the same shapes at each call; what it returns is overwritten by the next one. It must
            not refer to what refers to this: states and graph would stay in memory until Python looks for cycles.
        model: whose ops and device tell whether a graph can be.
        graph: None records where the ops allow it; False never does.
    """

    def __init__(self, function: Callable[..., Any], model: GenerationModel, graph: bool | None = None) -> None:
        self.function, self.device = function, model.device
        self.graph: torch.cuda.CUDAGraph | None = None
        self.wanted = model.ops.graphs and model.device.type == "cuda" if graph is None else graph
        self.warm = False

    @torch.inference_mode()
    def __call__(self, *inputs: Tensor) -> Any:
        """Return what the function returns."""
        if not self.wanted or not self.warm:
            self.warm = True
            return self.function(*inputs)
        if self.graph is None:
            self._record(inputs)
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.result

    def _record(self, inputs: tuple[Tensor, ...]) -> None:
        self.inputs = [each.to(self.device).clone() for each in inputs]
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with _without_collection(), torch.cuda.graph(graph):  # records, does not run
            self.result = self.function(*self.inputs)
        self.graph = graph


@contextmanager
def _without_collection() -> Iterator[None]:
    """Keep Python's collector from running inside the block: the graph of a generation before, which a cycle of
    references kept, would be freed there, and CUDA gives up what it records when memory is freed.
    """
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


class Stepper:
    """Reads one token of every sequence after another and scores the next; see `Recorded`.

    Args:
        model, states: of one batch; while a stepper is in use, the states must not be replaced (`States.reserve`).
        graph: None records where the ops allow it; False never does.
    """

    def __init__(self, model: GenerationModel, states: States, graph: bool | None = None) -> None:
        self.states = states
        self.recorded = Recorded(partial(_read, model, states), model, graph)

    def step(self, tokens: Tensor) -> Tensor:
        """Return scores [batch, vocabulary] of the token after `tokens` (int64 [batch]), until the next step."""
        lengths = self.states.lengths + 1
        scores = self.recorded(tokens)
        self.states.lengths[:] = lengths  # a graph's replay does not count them on the host
        return scores


def _read(model: GenerationModel, states: States, tokens: Tensor) -> Tensor:
    hidden = model.step(tokens, states, count_on_device=False)
    if model.device.type != "cpu":
        states.positions += 1
    return model.logits(hidden)
