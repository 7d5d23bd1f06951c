"""AdamW or Muon with linear warm-up and a cosine or a warm-up-stable-decay schedule, in the units of a recipe."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig
from nemo.core.optim.lr_scheduler import CosineAnnealing, WarmupHoldAnnealLinear
from nemo.lightning.megatron_parallel import MegatronParallel
from nemo.lightning.pytorch.optim import LRSchedulerModule
from nemo.lightning.pytorch.optim.megatron import MegatronOptimizerModule
from torch import nn

from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import check_one_of
from nemotron_h.recipe.checks import check_distributed_optimizer, check_learning_rates, check_muon
from nemotron_h.schema.recipe import NEWTON_SCHULZ, STATE_DTYPES
from nemotron_h.training import muon
from nemotron_h.training.guarded_optimizer import GuardedOptimizer
from nemotron_h.training.qk_clip import QkClip, of_attentions


class _OfThisRecipe:
    """A schedule that takes its step from a checkpoint and everything else from the recipe.

    NeMo's are functions of the step alone, so a run that resumes with the same settings has the same rates, bit for
    bit, and one that resumes with another peak, warm-up or length has those of the new curve from its next step on.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Stand at the checkpoint's step and set every group's rate for the next one."""
        self.last_epoch, self._step_count = state_dict["last_epoch"] - 1, state_dict["_step_count"]
        self.step()
        self._step_count = state_dict["_step_count"]


class Cosine(_OfThisRecipe, CosineAnnealing):
    """NeMo's linear warm-up and cosine."""


class StableDecay(_OfThisRecipe, WarmupHoldAnnealLinear):
    """NeMo's linear warm-up, constant rate and linear decay."""


class ExponentialDecay(StableDecay):
    """The same, with a decay that multiplies the rate by one factor every step (as Falcon-Mamba)."""

    def _get_lr(self, step: int) -> list[float]:
        share = (step - self.hold_steps) / (self.max_steps - self.hold_steps)
        return [peak * (self.min_lr / peak) ** share for peak in self.base_lrs]


class Schedule(LRSchedulerModule):
    """Linear warm-up, then a cosine or a constant rate and a decay, in steps (NeMo's own module takes ratios).

    Args:
        warmup_steps: steps of linear warm-up.
        decay_steps: steps of decay, the last of the run; None is a cosine from the warm-up to the end.
        min_lr: learning rate at the end of the run.
        max_steps: steps of the run; NeMo's strategy sets it to the trainer's.
        exponential: the decay is not linear.
    """

    def __init__(
        self,
        warmup_steps: int,
        decay_steps: int | None,
        min_lr: float,
        max_steps: int = 10,
        exponential: bool = False,
    ) -> None:
        super().__init__()
        self.warmup_steps, self.decay_steps, self.min_lr, self.max_steps = warmup_steps, decay_steps, min_lr, max_steps
        self.exponential = exponential

    def scheduler(self, model: Any, optimizer: Any) -> dict[str, Any]:
        """Return it as Lightning's `configure_optimizers` does; one unit is a step.

        Errors:
            UserError: the run is shorter than warm-up and decay.
        """
        lengths = {"warmup_steps": self.warmup_steps, "max_steps": self.max_steps, "min_lr": self.min_lr}
        if self.decay_steps is None:
            schedule = Cosine(optimizer, **lengths, constant_steps=0)
        else:
            stable = self.max_steps - self.warmup_steps - self.decay_steps
            if stable < 0:
                raise UserError(
                    f"the run has {self.max_steps} steps, its warm-up {self.warmup_steps} and its decay "
                    f"{self.decay_steps}",
                    hint="raise tokens, or lower optim.warmup_tokens and optim.decay_tokens",
                )
            decay = ExponentialDecay if self.exponential else StableDecay
            schedule = decay(optimizer, **lengths, hold_steps=stable)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step", "frequency": 1},
            "monitor": "val_loss",
        }


class ScheduledAdamW(MegatronOptimizerModule):
    """Megatron's AdamW, or Muon on it, and a schedule over the trainer's `max_steps`; built by `scheduled_adamw`.

    Attributes beyond NeMo's:
        settings: the arguments of `scheduled_adamw`, for the run's record.
        clip: of attention logits; None where they are not clipped, or this rank has no attention.
    """

    settings: dict[str, Any]
    clip: QkClip | None = None

    def optimizers(self, model: MegatronParallel) -> list:
        """Build Megatron's optimizer, once the trainer's `max_steps` is known.

        Errors:
            UserError: the run is not longer than its warm-up, or the optimizer is whole and weights are bfloat16.
        """
        check_distributed_optimizer(self.config.use_distributed_optimizer, self.config.bf16)
        schedule = self.lr_scheduler
        if schedule.max_steps <= schedule.warmup_steps:
            raise UserError(
                f"the run has {schedule.max_steps} steps, its warm-up {schedule.warmup_steps}",
                hint="raise tokens, or lower optim.warmup_tokens",
            )
        with muon.chosen() if self.muon else adam_of(self.config):
            optimizers = [each.mcore_optimizer for each in super().optimizers(model)]
        guarded = [GuardedOptimizer(each, self.settings["skip_spikes"]) for each in optimizers]
        if self.muon:
            self._attach_muon(guarded, list(model))
        return guarded

    def _attach_muon(self, optimizers: list[GuardedOptimizer], models: list[nn.Module]) -> None:
        limit = self.settings.get("qk_clip")
        self.clip = None if limit is None else of_attentions(models, limit)
        for each in optimizers:
            settings = self.settings["momentum"], self.settings["newton_schulz"]
            muon.attach(each.mcore_optimizer, models, *settings, self.clip)
            if self.clip is not None:
                each.before_pass = self.clip.forget

    @property
    def muon(self) -> bool:
        """Return True if the layers' matrices are Muon's."""
        return self.settings.get("name") == "muon"


def state_dtypes(moments: str) -> dict[str, Any]:
    """Return the fields of Megatron's `OptimizerConfig` for Adam's moments in `fp32` or `bf16`.

    With `bf16` main weights are kept as the bfloat16 weights and the 16 bits that these lack: exact, in half the room.
    """
    if moments == "fp32":
        return {}
    return {
        "use_precision_aware_optimizer": True,
        "exp_avg_dtype": torch.bfloat16,
        "exp_avg_sq_dtype": torch.bfloat16,
        "store_param_remainders": True,
    }


def adam_of(config: OptimizerConfig) -> AbstractContextManager[None]:
    """Have Megatron's optimizers, inside the block, built on the Adam that keeps what `state_dtypes` chose."""
    if not config.use_precision_aware_optimizer:
        return nullcontext()
    from nemotron_h.platform import lean_adam

    return lean_adam.chosen()


def scheduled_adamw(
    peak_lr: float,
    final_lr: float,
    warmup_steps: int,
    decay_steps: int | None = None,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    clip_grad: float = 1.0,
    distributed_optimizer: bool = True,
    moments: str = "fp32",
    skip_spikes: bool = False,
    exponential_decay: bool = False,
    name: str = "adamw",
    momentum: float = 0.95,
    newton_schulz: str = "simple",
    qk_clip: float | None = None,
) -> ScheduledAdamW:
    """Build AdamW, or Muon with AdamW beside it, with a warm-up and a cosine, or a constant rate and a decay.

    Args:
        peak_lr, final_lr: learning rates at the end of the warm-up and of the run.
        warmup_steps: steps of linear warm-up; the first step has `peak_lr / (warmup_steps + 1)`.
        decay_steps: None is a cosine to the end of the run; a number, a constant rate until the last so many steps.
        beta1, beta2, eps, weight_decay: AdamW; norms and biases are not decayed.
        clip_grad: largest global gradient norm; 0 is no clipping.
        distributed_optimizer: shard the optimizer's state over data-parallel ranks.
        moments: dtype of Adam's moments, `fp32` or `bf16`.
        skip_spikes: do not apply a step whose loss or gradient norm is a spike.
        exponential_decay: of the last `decay_steps`.
        name, momentum, newton_schulz, qk_clip: as `OptimSchema`.
    Errors:
        UserError: `final_lr` is above `peak_lr`, or 0 after an exponential decay; there is no such dtype, or `bf16`
            without what it needs: a GPU, Transformer Engine, the distributed optimizer; Muon without the latter.
    """
    settings = dict(locals())
    if not exponential_decay:
        del settings["exponential_decay"]  # a resume names the settings that differ, and older runs recorded none
    if name == "adamw":
        for key in ("name", "momentum", "newton_schulz"):
            del settings[key]
    if qk_clip is None:
        del settings["qk_clip"]
    check_muon(name, distributed_optimizer, moments)
    check_one_of("optim.newton_schulz", newton_schulz, NEWTON_SCHULZ)
    check_learning_rates(peak_lr, final_lr, exponential=exponential_decay)
    check_one_of("moments", moments, STATE_DTYPES)
    if moments == "bf16":
        from nemotron_h.platform import lean_adam

        lean_adam.check(distributed_optimizer)
    # A function, not a constructor: NeMo records constructor arguments and cannot rebuild a module from these.
    optimizer = ScheduledAdamW(
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
            **state_dtypes(moments),
        ),
        lr_scheduler=Schedule(warmup_steps, decay_steps, final_lr, exponential=exponential_decay),
    )
    optimizer.settings = settings
    return optimizer


def setting_of(group: dict[str, Any]) -> dict[str, Any]:
    """Return what of a parameter group the recipe decides; its learning rate is the schedule's."""
    return {key: value for key, value in group.items() if key not in ("params", "step", "lr")}
