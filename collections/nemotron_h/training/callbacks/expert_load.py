"""Watch how many tokens each expert gets, and move the correction biases that even this out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_attr_wrapped_model
from nemo.lightning.megatron_parallel import MegatronStep
from torch import Tensor

from nemotron_h.model.expert_layers import Router, routers
from nemotron_h.training.callbacks.progress import StageMetrics


class ExpertLoad(StageMetrics):
    """Count the tokens of each expert over a step's batch; with the weights, move each correction bias towards an even
    load: one step up where an expert got fewer tokens than the mean, down where it got more (arXiv 2408.15664).

    megatron-core moves the biases before the step's loss and gradients are looked at. Here a step that is not applied
    moves none, and one that is run again moves them once. Biases of frozen experts stay, as do those under adapters.

    Attributes:
        measured: [2, layers]: largest load over the mean, and the balance loss, of the newest step; 0 for other layers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.routers: list[Router] = []
        self.measured: Tensor | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Be called behind each update of the weights."""
        config = pl_module.config
        self.routers = routers(get_attr_wrapped_model(pl_module, "decoder"))  # a distillation's teacher has its own
        rate = config.bias_update if all(router.weight.requires_grad for router in self.routers) else 0.0
        optimizer = trainer.optimizers[0].mcore_optimizer
        optimizer.step_with_ready_grads = self._followed(optimizer.step_with_ready_grads, rate, config.num_layers)

    def _followed(self, update: Callable[[], Any], rate: float, layers: int) -> Callable[[], Any]:
        def call() -> Any:
            result = update()
            self.measured = balance(self.routers, rate, layers)
            return result

        return call

    def on_megatron_step_start(self, step: MegatronStep) -> MegatronStep:
        """Begin a new count, where a step is run again too."""
        if not step.forward_only:
            for router in self.routers:
                router.forget()
        return step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Log them."""
        for name, value in self.record().items():
            pl_module.log(name, value, batch_size=1)

    def line(self) -> str:
        """Return the worst layer's load for the progress line."""
        return "" if self.measured is None else f"expert load {float(self.measured[0].max()):.2f}x"

    def record(self) -> dict[str, float]:
        """Return the largest load of an expert over the mean, the layer that has it, and the mean balance loss, which
        is 1 where all experts are chosen alike.
        """
        if self.measured is None:
            return {}
        loads, losses = self.measured.tolist()
        of_experts = [loss for load, loss in zip(loads, losses, strict=True) if load]
        worst = max(loads)
        return {
            "expert_load": worst,
            "expert_load_layer": float(loads.index(worst)),
            "balance_loss": sum(of_experts) / len(of_experts),
        }


@torch.no_grad()
def balance(of: Sequence[Router], rate: float, layers: int) -> Tensor:
    """Sum the counts of all ranks, move the correction biases by `rate`, and return what a step measured.

    Args:
        of: this rank's routers.
        rate: of the bias's step; 0 moves none.
        layers: of the whole model.
    Returns:
        [2, layers]: the most tokens of an expert over the mean, and the balance loss without its weight; zero for
        layers without experts.
    """
    measured = torch.zeros(2, layers, device=torch.cuda.current_device())
    if of:
        parts = []
        for router in of:  # counts of each expert, the balance losses of all passes, and how many these are
            zero = measured.new_zeros(())
            parts += [
                router.local_tokens_per_expert,
                torch.stack([sum(router.losses, zero), zero + len(router.losses)]),
            ]
        sums = torch.cat(parts)
        dist.all_reduce(sums, group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True))
        split = iter(sums.split([len(part) for part in parts]))
        # tensor- and context-parallel ranks have parts of a pass each
        ranks = parallel_state.get_tensor_and_context_parallel_world_size()
        for router, counts, (losses, passes) in zip(of, split, split, strict=True):
            mean = counts.mean()
            router.expert_bias += (mean - counts).sign() * rate
            number = router.layer_number - 1
            measured[0, number], measured[1, number] = counts.max() / mean, losses * ranks / passes.clamp(min=1)
    dist.all_reduce(measured, group=parallel_state.get_pipeline_model_parallel_group())
    return measured
