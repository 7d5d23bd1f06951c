"""Transformer Engine's Adam with bfloat16 moments, without its copies of all moments in float32 and in checkpoints that
any other optimizer reads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from megatron.core import optimizer as megatron_optimizer
from torch import Tensor

from nemotron_h.core.errors import UserError
from nemotron_h.platform import hardware

#: the release of Transformer Engine whose Adam this one changes; older ones were not tried
LEAST = hardware.TESTED
#: elements whose moments are float32 at a time; one parameter may have more
PIECE = 1 << 28


def check(distributed_optimizer: bool) -> None:
    """Check that this process can keep its moments in bfloat16.

    Errors:
        UserError: without a GPU, Transformer Engine or the distributed optimizer.
    """
    without = "or leave out optim.moments=bf16 (a checkpoint goes on with either)"
    if not torch.cuda.is_available():
        raise UserError("optim.moments = 'bf16', and PyTorch sees no GPU", hint=without.removeprefix("or "))
    if not distributed_optimizer:
        raise UserError(
            "optim.moments = 'bf16' without the distributed optimizer",
            hint=f"set optim.distributed_optimizer=true, {without}",
        )
    hardware.check_import("optim.moments = 'bf16'", LEAST, without)


def pieces(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the parameters in their order, as many at a time as have `PIECE` elements."""
    piece: list[Tensor] = []
    elements = 0
    for p in params:
        if piece and elements + p.numel() > PIECE:
            yield piece
            piece, elements = [], 0
        piece.append(p)
        elements += p.numel()
    if piece:
        yield piece


def fuse(param: Tensor, remainder: Tensor) -> Tensor:
    """Fuse a bfloat16 weight and its remainder, the lower 16 bits (int16), to the float32 main weight.

    The weight is the main weight rounded; where the remainder's first bit is set, it was rounded up.
    """
    upper = param.detach().view(torch.int16).int() - (remainder < 0).int()
    return ((upper << 16) | (remainder.int() & 0xFFFF)).view(torch.float32)


def split(main: Tensor) -> tuple[Tensor, Tensor]:
    """Split a float32 main weight into the bfloat16 weight and the remainder: `fuse` gives it back, bit for
    bit.
    """
    bits = main.detach().contiguous().view(torch.int32)
    remainder = bits.to(torch.int16)  # the lower half
    upper = (bits >> 16) + (remainder < 0).int()
    return upper.to(torch.int16).view(torch.bfloat16), remainder


def lean_adam() -> type:
    """Return the optimizer's class; a function, as Transformer Engine is imported where it is wanted.

    Errors:
        ImportError: Transformer Engine is not installed.
    """
    from transformer_engine.pytorch.optimizers import FusedAdam

    class LeanAdam(FusedAdam):
        """`FusedAdam` that steps through a group in pieces and gives and takes main weights in float32."""

        def step(self, closure: Any = None, grad_scaler: Any = None) -> None:
            groups = self.param_groups
            try:
                for group in groups:
                    done = group.get("step", 0)
                    for params in pieces(group["params"]):
                        self.param_groups = [{**group, "params": params, "step": done}]
                        super().step(closure, grad_scaler)
                    group["step"] = done + 1
            finally:
                self.param_groups = groups

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            # the states one by one: Transformer Engine's wants main weights in parts
            super().load_state_dict({**state_dict, "state": {}})
            saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
            own = chain.from_iterable(group["params"] for group in self.param_groups)
            for key, param in zip(saved, own, strict=True):
                for name, value in state_dict["state"].get(key, {}).items():
                    if name == "master_param" and value.dtype == torch.int16:  # Megatron's place holder
                        parts = param.dtype == torch.bfloat16
                        self._initialize_state(param, name, zero_buffer=True, store_param_remainders=parts)
                    else:
                        self.set_scaled_state(param, name, value.float())

        def get_unscaled_state(self, param: Tensor, state_name: str) -> Tensor:
            if state_name != "master_param":
                return super().get_unscaled_state(param, state_name)
            if param.dtype == torch.float32:  # the step updates it and leaves the copy that is kept of it
                return param.detach()
            return fuse(param, self.state[param][state_name])

        def set_scaled_state(self, param: Tensor, state_name: str, unscaled_state: Tensor) -> None:
            if state_name == "master_param" and unscaled_state.dtype == torch.float32:
                weight = unscaled_state
                if param.dtype == torch.bfloat16:
                    weight, unscaled_state = split(unscaled_state)
                param.data.copy_(weight)
            super().set_scaled_state(param, state_name, unscaled_state)

    return LeanAdam


@contextlib.contextmanager
def chosen() -> Iterator[None]:
    """Make Megatron's optimizers of it inside the block."""
    original = megatron_optimizer.Adam
    megatron_optimizer.Adam = lean_adam()
    try:
        yield
    finally:
        megatron_optimizer.Adam = original
