"""Save the states of a rank's optimizers as those of one, so that any layout reads them.

megatron-core has an optimizer of its own for weights whose gradients are reduced over other ranks than those of the
rest: experts. Which optimizers a rank has thus depends on its layers and on the layout, and the states of several are
saved, and looked for, in another form than those of one. A state's name is its weight's, so one form does for both.
"""

from __future__ import annotations

import functools
from typing import Any

from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from nemotron_h.platform.flat_shards import SHARDING

#: what tells the groups of weights apart, but for the ranks that their gradients are reduced over
_GROUP = ("wd_mult", "lr_mult", "is_decoupled_lr")
_OF_EXPERTS = "is_expert_parallel"


def install() -> None:
    """Have megatron-core's optimizers save and load as one, in the format of `flat_shards`."""
    if getattr(ChainedOptimizer.sharded_state_dict, "nemotron_h", False):
        return
    save, load, load_one = (
        ChainedOptimizer.sharded_state_dict,
        ChainedOptimizer.load_state_dict,
        DistributedOptimizer.load_state_dict,
    )

    @functools.wraps(save)
    def sharded_state_dict(self: ChainedOptimizer, *args: Any, **kwargs: Any) -> dict[str, Any]:
        kind = (kwargs.get("metadata") or {}).get("distrib_optim_sharding_type")
        if len(self.chained_optimizers) == 1 or kind != SHARDING:
            return save(self, *args, **kwargs)
        self._synchronize_steps()
        states = [each.sharded_state_dict(*args, **kwargs) for each in self.chained_optimizers]
        groups = [group for state in states for group in state["optimizer"]["param_groups"]]
        tensors = [tensors for state in states for tensors in state["param_state"].values()]
        merged = {**states[0]["optimizer"], "param_groups": groups}
        return {**states[0], "optimizer": merged, "param_state": dict(enumerate(tensors))}

    @functools.wraps(load)
    def load_state_dict(self: ChainedOptimizer, state: dict[str, Any]) -> None:
        if len(self.chained_optimizers) == 1 or "param_state" not in state:
            load(self, state)
            return
        tensors = iter(state["param_state"].values())
        for each in self.chained_optimizers:
            own = [next(tensors) for _ in range(_weights(each))]
            each.load_state_dict({**state, "param_state": dict(enumerate(own))})
        self._synchronize_steps()

    @functools.wraps(load_one)
    def load_groups(self: DistributedOptimizer, state: dict[str, Any]) -> None:
        """Load, with settings of a group of the other kind of weights where the checkpoint's rank 0 had none."""
        saved = state["optimizer"]["param_groups"]
        groups = [_nearest(own, saved) for own in self.optimizer.param_groups]
        load_one(self, {**state, "optimizer": {**state["optimizer"], "param_groups": groups}})

    sharded_state_dict.nemotron_h = True  # type: ignore[attr-defined]
    ChainedOptimizer.sharded_state_dict, ChainedOptimizer.load_state_dict = sharded_state_dict, load_state_dict
    DistributedOptimizer.load_state_dict = load_groups


def _weights(optimizer: DistributedOptimizer) -> int:
    """Return of how many weights this rank has a part of the states."""
    ranges = (bucket for buffer in optimizer.gbuf_ranges for buckets in buffer.values() for bucket in buckets)
    return sum(len(bucket["param_map"]) for bucket in ranges)


def _nearest(own: dict[str, Any], saved: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the saved settings of a group, as a group of the same kind of weights."""

    def of(group: dict[str, Any]) -> list[Any]:
        # NeMo changes names: `pre_wd_mult`
        return [group.get(key, group.get(f"pre_{key}")) for key in _GROUP]

    alike = [group for group in saved if of(group) == of(own)]
    best = next((group for group in alike if group.get(_OF_EXPERTS) == own.get(_OF_EXPERTS)), None)
    return {**(best or alike[0]), _OF_EXPERTS: own.get(_OF_EXPERTS)}
