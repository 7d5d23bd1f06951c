"""AdamW with linear warm-up and cosine decay, stated in the units of a recipe."""

from __future__ import annotations

from megatron.core.optimizer import OptimizerConfig
from nemo.lightning.megatron_parallel import MegatronParallel
from nemo.lightning.pytorch.optim import CosineAnnealingScheduler
from nemo.lightning.pytorch.optim.megatron import MegatronOptimizerModule

from nemotron_h.errors import UserError


class CosineAdamW(MegatronOptimizerModule):
    """Megatron's AdamW and NeMo's cosine schedule over the trainer's `max_steps`; made by `cosine_adamw`."""

    def optimizers(self, model: MegatronParallel) -> list:
        """Megatron's optimizer, once the trainer's `max_steps` is known.

        Errors:
            UserError: the run is not longer than its warm-up.
        """
        schedule = self.lr_scheduler
        if schedule.max_steps <= schedule.warmup_steps:
            raise UserError(
                f"the run has {schedule.max_steps} steps, its warm-up {schedule.warmup_steps}",
                hint="raise trainer.max_steps, or set a shorter optim.warmup_steps",
            )
        return super().optimizers(model)


def cosine_adamw(
    peak_lr: float,
    final_lr: float,
    warmup_steps: int,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    clip_grad: float = 1.0,
    distributed_optimizer: bool = True,
) -> CosineAdamW:
    """AdamW with linear warm-up and cosine decay.

    Args:
        peak_lr, final_lr: learning rates at the end of the warm-up and of the run.
        warmup_steps: steps of linear warm-up; the first step has `peak_lr / (warmup_steps + 1)`.
        beta1, beta2, eps, weight_decay: AdamW; norms and biases are not decayed.
        clip_grad: largest global gradient norm; 0 is no clipping.
        distributed_optimizer: shard the optimizer's state over data-parallel ranks.
    """
    # A function, not a constructor: NeMo records constructor arguments and cannot rebuild a module from these.
    return CosineAdamW(
        config=OptimizerConfig(
            optimizer="adam",
            lr=peak_lr,
            min_lr=final_lr,
            adam_beta1=beta1,
            adam_beta2=beta2,
            adam_eps=eps,
            weight_decay=weight_decay,
            clip_grad=clip_grad,
            use_distributed_optimizer=distributed_optimizer,
        ),
        lr_scheduler=CosineAnnealingScheduler(warmup_steps=warmup_steps, constant_steps=0, min_lr=final_lr),
    )
