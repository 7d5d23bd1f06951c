"""AdamW in the shape that megatron-core's distributed optimizer can checkpoint.

The distributed optimizer expects what Transformer Engine's and Apex's Adam do: `step` is one number per parameter
group, and the state of a parameter is `exp_avg` and `exp_avg_sq` alone. torch's AdamW keeps a step per parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.adamw import adamw


class CheckpointableAdamW(torch.optim.Optimizer):
    """torch's fused AdamW with one step count per parameter group.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas, eps, weight_decay: as in Adam; weight decay is decoupled.
        bias_correction, adam_w_mode, capturable: accepted for the constructor's shape; only the values that
            megatron-core passes for AdamW are supported.
    Errors:
        ValueError: for L2-style Adam (`adam_w_mode=False`), no bias correction, or `capturable`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        capturable: bool = False,
        **kwargs: Any,
    ) -> None:
        if kwargs:
            raise ValueError(f"CheckpointableAdamW: unknown arguments {sorted(kwargs)}")
        if not (bias_correction and adam_w_mode) or capturable:
            raise ValueError("CheckpointableAdamW: only AdamW with bias correction, not capturable")
        # A group is loaded as it was saved, and Transformer Engine's Adam reads `bias_correction` from its own.
        kept = {"lr": lr, "bias_correction": True, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, kept)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            # Counted even where this rank owns no parameter of the group, as the group's step is saved by any rank.
            group["step"] = int(group.get("step", 0)) + 1
            if not params:
                continue
            for p in params:
                if "exp_avg" not in self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            beta1, beta2 = group["betas"]
            adamw(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                # the functional form counts up before it uses the step
                [torch.tensor(float(group["step"] - 1)) for _ in params],
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
        return loss
