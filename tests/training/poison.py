"""Disturb a step of a run: `worker.py RECIPE poison=STEP:PART[:RANK]`, of whose parts `Poison` has a method each."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor, nn

from nemotron_h.core import spikes


class Poison(pl.Callback):
    """Do what `told` says, (step from 1, part, rank or None for all); layer 3, attention, is what is hit.

    A spike takes four steps before it here. A step that is skipped is held to leave weights and optimizer alone.
    """

    def __init__(self, told: list[str]) -> None:
        parts = [(*each.split(":"), None)[:3] for each in told]
        self.told = [(int(step), part, rank and int(rank)) for step, part, rank in parts]
        self.handles: list[Any] = []
        self.before: list[Tensor] = []
        spikes.LEAST = 4

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.act(trainer, pl_module, trainer.global_step + 1, begins=True)
        self.before = self.state(trainer)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []
        skipped = any(step == trainer.global_step and part == "spike" for step, part, _ in self.told)
        now = self.state(trainer)
        same = all(map(torch.equal, self.before, now)) and len(self.before) == len(now)
        assert same == (skipped and trainer.optimizers[0].skip_spikes), trainer.global_step
        self.act(trainer, pl_module, trainer.global_step, begins=False)

    @staticmethod
    def state(trainer) -> list[Tensor]:
        """Weights, main weights and moments, and the optimizer's steps."""
        optimizer = trainer.optimizers[0].mcore_optimizer
        leaves = getattr(optimizer, "chained_optimizers", [optimizer])
        tensors = [value for leaf in leaves for state in leaf.optimizer.state.values() for value in state.values()]
        steps = [torch.tensor(group.get("step", 0)) for leaf in leaves for group in leaf.optimizer.param_groups]
        main = [weight for leaf in leaves for weight in leaf.get_parameters()]
        weights = list(trainer.strategy.megatron_parallel.parameters())
        return [each.detach().clone() for each in (*weights, *main, *steps, *tensors)]

    def act(self, trainer, pl_module, step: int, begins: bool) -> None:
        layers = get_attr_wrapped_model(pl_module, "decoder", return_model_obj=True).decoder.layers
        layer = next((layer for layer in layers if layer.layer_number == 4), None)  # on another stage
        for at, part, rank in self.told:
            if at == step and begins == (part != "saved") and rank in (None, trainer.global_rank) and layer is not None:
                getattr(self, part)(layer, layer.self_attention.linear_proj.weight)

    @torch.no_grad()
    def weight(self, layer: nn.Module, weight: Tensor) -> None:
        """Let it not be a number."""
        weight[0, 0] = torch.nan

    saved = weight  # after the step

    def gradient(self, layer: nn.Module, weight: Tensor) -> None:
        """Let it be infinite whenever it is computed."""
        weight.register_hook(lambda gradient: gradient * torch.inf)

    def spike(self, layer: nn.Module, weight: Tensor) -> None:
        """Let it be large in this step."""
        self.handles.append(weight.register_hook(lambda gradient: gradient * 1e4))

    def disk(self, layer: nn.Module, weight: Tensor) -> None:
        """Let it have no room from now on."""
        usage = shutil.disk_usage
        shutil.disk_usage = lambda path: usage(path)._replace(free=1000)

    def gradient_once(self, layer: nn.Module, weight: Tensor) -> None:
        """Let that of its output be infinite in the second micro-batch, the first time: a kernel may add the weight's
        own into a buffer, past all hooks.
        """

        def hook(module: nn.Module, args: tuple, output: tuple[Tensor, ...]) -> None:
            output[0].register_hook(lambda gradient: gradient * torch.inf)

        self.once(layer.register_forward_hook, hook)

    def duplicate_once(self, layer: nn.Module, weight: Tensor) -> None:
        """Let that of a weight which each tensor-parallel rank has whole be infinite, the first time."""
        self.once(layer.input_layernorm.weight.register_hook, lambda gradient: gradient * torch.inf)

    def output_once(self, layer: nn.Module, weight: Tensor) -> None:
        """Let it have a NaN in the second micro-batch, the first time."""
        self.once(layer.register_forward_hook, lambda module, args, output: (output[0] * torch.nan, *output[1:]))

    def unsteady(self, layer: nn.Module, weight: Tensor) -> None:
        """Let its gradient be infinite, and that of another weight another one each time."""
        self.gradient(layer, weight)
        numbers = iter(range(1, 99))
        layer.self_attention.linear_qkv.weight.register_hook(lambda gradient: gradient * next(numbers))

    def once(self, register: Callable, change: Callable) -> None:
        """Change what a hook sees the second time that it is called."""
        calls = iter(range(99))
        self.handles.append(register(lambda *given: change(*given) if next(calls) == 1 else None))
