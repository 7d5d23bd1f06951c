"""State of a model as its checkpoints hold it: all, the weights beside adapters, or these alone."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from nemotron_h.model import adapters
from nemotron_h.model.stored_names import ask_for, other_names

#: key of Transformer Engine's state of a layer, or of one of many matrices of a layer
_EXTRA = re.compile(r"_extra_state\d*$")


class StoredParts:
    """Mixin of a Megatron model, which registers `_expect_no_extra_state` and `_expect_a_part` as hooks of loading.

    Attributes:
        state_part: which weights `sharded_state_dict` holds, one of `adapters.PARTS`: checkpoints of adapters hold no
            more than these.
        stored: names in the checkpoint that is being read; empty while none is.
    """

    state_part = "all"
    stored: Collection[str] = ()

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return megatron-core's sharded state of `state_part`, without Transformer Engine's `_extra_state`.

        The scales of all recipes here come from the tensors at hand, so there is no FP8 state to keep, and a checkpoint
        without it continues in any precision.
        """
        state = super().sharded_state_dict(*args, **kwargs)
        state = {key: value for key, value in state.items() if not _EXTRA.search(key)}
        if self.stored:
            ask_for(state, self.stored, other_names(self.config.definition()))
        if self.state_part == "all":
            return state
        wanted = self.state_part == "adapter"
        return {key: value for key, value in state.items() if adapters.is_adapter_key(key) == wanted}

    def _expect_no_extra_state(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Leave out extra state that a checkpoint could bring: Transformer Engine unpickles it."""
        for name, module in self.named_modules():
            if type(module).get_extra_state is not nn.Module.get_extra_state:
                state_dict[f"{prefix}{name}._extra_state"] = None

    def _expect_a_part(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Accept the base alone, or the adapters alone; DoRA's lengths begin at the base's."""
        tuned = list(adapters.adapted(self))
        parts = {
            adapters.is_adapter_key(name) for name in state_dict if name.startswith(prefix) and not _EXTRA.search(name)
        }
        if not tuned or len(parts) != 1:
            return
        base = not parts.pop()
        own = {n: t for n, t in self.state_dict().items() if adapters.is_adapter_key(n) == base and torch.is_tensor(t)}
        state_dict.update({f"{prefix}{name}": tensor for name, tensor in own.items() if not _EXTRA.search(name)})
        if base:
            for name, layer in tuned:
                for weight, key, adapter in layer.pairs():
                    if adapter.magnitude is not None:
                        matrix = state_dict[f"{prefix}{name}.{weight}"].to(getattr(layer, weight))
                        state_dict[f"{prefix}{name}.{key}.magnitude"] = adapter.lengths(matrix)
