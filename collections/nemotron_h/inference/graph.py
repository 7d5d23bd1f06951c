"""A step as one CUDA graph: the GPU is given its few hundred kernels at once, not one by one from Python."""

from __future__ import annotations

import torch
from torch import Tensor

from nemotron_h.inference.model import GenerationModel
from nemotron_h.inference.states import States


class Stepper:
    """Reads one token of every sequence after another and scores the next; through a CUDA graph where there is a GPU.

    The first step runs without: it compiles what is to be compiled. The second is recorded, and run again from then on.

    Args:
        model, states: of one batch; while a stepper is in use, the states must not be replaced (`States.reserve`).
        graph: None records where the ops allow it; False never does.
    """

    def __init__(self, model: GenerationModel, states: States, graph: bool | None = None) -> None:
        self.model, self.states = model, states
        self.graph: torch.cuda.CUDAGraph | None = None
        self.wanted = model.ops.graphs and model.device.type == "cuda" if graph is None else graph
        self.warm = False

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Return scores [batch, vocabulary] of the token after `tokens` (int64 [batch]), until the next step."""
        if not self.wanted or not self.warm:
            self.warm = True
            return self.model.logits(self.model.step(tokens, self.states))
        if self.graph is None:
            self._record(tokens)
        self.tokens.copy_(tokens)
        self.graph.replay()
        self.states.advance(1, on_device=False)
        return self.scores

    def _record(self, tokens: Tensor) -> None:
        self.tokens = tokens.to(self.model.device).clone()
        lengths = self.states.lengths.copy()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):  # records, does not run
            hidden = self.model.step(self.tokens, self.states, count_on_device=False)
            self.states.positions += 1
            self.scores = self.model.logits(hidden)
        self.states.lengths[:] = lengths  # what recording counted on the host did not happen
        self.graph = graph
