"""Megatron's optimizer with a look at the step's loss and gradient norm before the update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from nemo.core.optim import McoreDistributedOptimizer
from torch import Tensor

from nemotron_h.platform.checkpoint_writer import STAGING

#: result of the step's closure, and its loss and gradient norm as all ranks know them
Measured = tuple[Any, float, float]


class GuardedOptimizer(McoreDistributedOptimizer):
    """NeMo's optimizer, which updates weights by finite gradients alone, and on request by none of a spike.

    A step that is not applied leaves weights and optimizer states as they are. Learning rate and data go on, as with
    OLMo-core's SkipStepOptimizer. The gradient norm is that before clipping.

    Args:
        skip_spikes: leave out the update of a step whose loss or gradient norm is a spike.
    Attributes:
        rerun: takes a call that runs the step again, and loss and gradient norm of which one is not finite; returns
            what the call returned, or raises. `NanGuard` sets it.
        before_pass: called before each forward and backward pass, of a step that is run again too.
        is_spike: takes loss and gradient norm of each step before its update. `Incidents` sets it.
    """

    def __init__(self, optimizer: MegatronOptimizer, skip_spikes: bool = False) -> None:
        super().__init__(optimizer)
        self.skip_spikes = skip_spikes
        self.rerun: Callable[[Callable[[], Measured], float, float], Measured] = _stop
        self.before_pass: Callable[[], None] = lambda: None
        self.is_spike: Callable[[float, float], bool] = lambda loss, norm: False

    def step(self, closure: Callable[[], Any]) -> tuple[Any, float, float | None]:
        """Run the step, and update the weights unless its numbers forbid it.

        Returns:
            what the closure returned, the gradient norm, and the number of zeros in it where it is asked for.
        """
        result, loss, norm = self._measured(closure)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            result, loss, norm = self.rerun(partial(self._measured, closure), loss, norm)
        optimizer = self.mcore_optimizer
        with torch.no_grad():
            zeros = optimizer.count_zeros() if optimizer.config.log_num_zeros_in_grad else None
            if not (self.is_spike(loss, norm) and self.skip_spikes):
                self._clip(norm)
                STAGING.wait_on_gpu()  # for what a save still copies
                optimizer.step_with_ready_grads()
        return result, norm, zeros

    @contextmanager
    def _with_states(self) -> Iterator[None]:
        """Leave out the parts of Megatron's optimizer that have nothing to train, whose states it would read all the
        same: where adapters of split experts alone are trained, that of all other weights.
        """
        whole = self.mcore_optimizer
        trained = [each for each in self._optimizers() if not getattr(each, "is_stub_optimizer", False)]
        if len(trained) < len(self._optimizers()):
            self.mcore_optimizer = ChainedOptimizer(trained)
        try:
            yield
        finally:
            self.mcore_optimizer = whole

    def state_dict(self) -> Any:
        """Return the states that all ranks have alike."""
        with self._with_states():
            return super().state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        """Load what a checkpoint has for `sharded_state_dict`."""
        with self._with_states():
            super().load_state_dict(state_dict)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the states in Megatron's distributed-checkpoint layout; arguments as of NeMo's."""
        with self._with_states():
            return super().sharded_state_dict(*args, **kwargs)

    def _measured(self, closure: Callable[[], Any]) -> Measured:
        """Run the forward and backward pass."""
        self.before_pass()
        result = closure()
        with torch.no_grad():
            self.mcore_optimizer.prepare_grads()
            norm = self.mcore_optimizer.get_grad_norm()
            return result, *agreed(result, norm, self._duplicates())

    def _optimizers(self) -> list[MegatronOptimizer]:
        return getattr(self.mcore_optimizer, "chained_optimizers", [self.mcore_optimizer])

    def _duplicates(self) -> list[Tensor]:
        """Return the gradients of weights that each tensor-parallel rank has whole: the norm takes the first rank's."""
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            return []
        weights = (w for each in self._optimizers() for w in each.get_parameters())
        whole = (w for w in weights if not param_is_not_tensor_parallel_duplicate(w))
        gradients = (w.grad if w.grad is not None else getattr(w, "decoupled_grad", None) for w in whole)
        return [gradient for gradient in gradients if gradient is not None]

    def _clip(self, norm: float) -> None:
        """Scale the gradients as Megatron's own step does."""
        for optimizer in self._optimizers():
            config, weights = optimizer.config, optimizer.get_parameters()
            if config.clip_grad > 0 and weights:
                decoupled = config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
                clip_grad_by_total_norm_fp32(weights, config.clip_grad, norm, decoupled)


def _stop(run: Callable[[], Measured], loss: float, norm: float) -> Measured:
    raise FloatingPointError(f"loss {loss}, gradient norm {norm}")


def agreed(loss: Tensor, norm: float, others: list[Tensor]) -> tuple[float, float]:
    """Return loss and gradient norm alike on all ranks: one that any rank has as not finite is infinite or NaN.

    Args:
        loss: of the step, which the last pipeline stage alone knows.
        norm: of the gradients.
        others: gradients that it does not have, which count where they are not finite.
    """
    if others:
        norm += 0 * float(sum(each.float() for each in torch._foreach_norm(others)))
    if dist.get_world_size() == 1:
        return float(loss), norm
    known = (float(loss) if parallel_state.is_pipeline_last_stage() else None, norm)
    # MAX passes no NaN on in every library: kinds of number go beside the values
    kinds = [0.0 if value is None or math.isfinite(value) else 1.0 + math.isnan(value) for value in known]
    values = [-math.inf if value is None or kind else value for value, kind in zip(known, kinds, strict=True)]
    packed = torch.tensor([*kinds, *values], dtype=torch.float64, device=torch.cuda.current_device())
    dist.all_reduce(packed, op=dist.ReduceOp.MAX)
    *kinds, loss, norm = packed.tolist()
    return tuple((value, math.inf, math.nan)[int(kind)] for kind, value in zip(kinds, (loss, norm), strict=True))
