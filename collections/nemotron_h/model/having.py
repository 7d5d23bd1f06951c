"""Set what the Megatron models' state dicts are asked for, for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def having(name: str, value: Any, models: Iterable[nn.Module]) -> Iterator[None]:
    """Set an attribute of the modules that have it inside the block.

    Args:
        models: modules that hold them, at any depth.
    """
    modules = [module for model in models for module in model.modules() if hasattr(module, name)]
    before = [getattr(module, name) for module in modules]
    for module in modules:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, former in zip(modules, before, strict=True):
            setattr(module, name, former)
