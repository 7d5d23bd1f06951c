"""Gradients that are added to Megatron's gradient buffer (`weight.main_grad`) by the op that computes them."""

from __future__ import annotations

import torch
from torch import Tensor


def passed_on(weight: Tensor, gradient: Tensor) -> Tensor:
    """Add a weight's whole gradient to Megatron's buffer where there is one; what autograd is given in its place.

    Args:
        gradient: shaped as `weight`, of any dtype.
    """
    if not hasattr(weight, "main_grad"):
        return gradient.to(weight.dtype)
    weight.main_grad.add_(gradient)
    return handed_over(weight)


def handed_over(weight: Tensor) -> Tensor:
    """Tell Megatron's hook that the buffer has the gradient; what autograd is given in its place, shaped as `weight`.

    The hook wants a gradient of any content; a weight without the hook's flag gets zeros. So does one that several
    layers share, whose gradients autograd sums: Megatron's flag `zero_out_wgrad` has the hook add them to the buffer.
    """
    if hasattr(weight, "grad_added_to_main_grad"):
        weight.grad_added_to_main_grad = True
        if not getattr(weight, "zero_out_wgrad", False):
            return torch.empty_like(weight)
    return torch.zeros_like(weight)
