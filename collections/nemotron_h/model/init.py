"""Initial weights that do not depend on the parallel layout.

Each parameter is sampled whole from a generator keyed by (seed, global name) and every rank keeps its shard, so one
rank and two start from the same model. Megatron's own initialisation samples each tensor-parallel shard separately.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch

Distribution = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


def generator_for(seed: int, name: str, device: torch.device) -> torch.Generator:
    """Return a generator keyed by the run's seed and a parameter's global name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def normal(std: float) -> Distribution:
    """Return a function that fills a tensor from the normal distribution with mean 0."""
    return lambda t, g: t.normal_(0.0, std, generator=g)


def uniform(low: float, high: float) -> Distribution:
    """Return a function that fills a tensor uniformly in [low, high)."""
    return lambda t, g: t.uniform_(low, high, generator=g)


def log_uniform_a(t: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Return `A_log` of A uniform in [1, 16) (Mamba-2's default)."""
    return t.uniform_(1.0, 16.0, generator=g).log_()


def dt_bias(t: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Return the inverse softplus of dt, log-uniform in [1e-3, 1e-1] with floor 1e-4 (Mamba-2's default)."""
    low, high = math.log(1e-3), math.log(1e-1)
    dt = t.uniform_(low, high, generator=g).exp_().clamp_(min=1e-4)
    return dt + torch.log(-torch.expm1(-dt))


@torch.no_grad()
def fill(
    parameter: torch.Tensor,
    name: str,
    distribution: Distribution,
    seed: int,
    *,
    axis: int | None = None,
    sections: list[int] | None = None,
    tp_rank: int = 0,
    tp_size: int = 1,
) -> None:
    """Sample a whole parameter and keep this rank's shard.

    Args:
        parameter: the local shard, overwritten.
        name: global name (layer numbers count from the model's first layer).
        distribution: fills a float32 tensor of the whole shape.
        seed: the run's seed.
        axis: the sharded axis; None when every rank holds all of it.
        sections: local sizes along `axis` of parts that are sharded one by one (z, x, B, C, dt of an input projection).
        tp_rank, tp_size: position in the tensor-parallel group.
    """
    if parameter.is_meta:
        return
    shape = list(parameter.shape)
    if axis is None or tp_size == 1:
        whole = torch.empty(shape, dtype=torch.float32, device=parameter.device)
        parameter.copy_(distribution(whole, generator_for(seed, name, parameter.device)))
        return
    shape[axis] *= tp_size
    whole = distribution(
        torch.empty(shape, dtype=torch.float32, device=parameter.device),
        generator_for(seed, name, parameter.device),
    )
    local = sections or [parameter.shape[axis]]
    parts = whole.split([size * tp_size for size in local], dim=axis)
    kept = [part.narrow(axis, tp_rank * size, size) for part, size in zip(parts, local, strict=True)]
    parameter.copy_(torch.cat(kept, dim=axis))
