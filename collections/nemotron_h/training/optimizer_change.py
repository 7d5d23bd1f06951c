"""Resume with another optimizer than the checkpoint's, where that is declared: `resume.optimizer_change`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from nemotron_h.checkpoint.index import read_index
from nemotron_h.checkpoint.reader import WEIGHTS, read_record
from nemotron_h.core.errors import UserError

ADAMW = "adamw"


class FreshStates:
    """States of the optimizer that a checkpoint of another one lacks: they begin at zero.

    Args:
        tensors: names in the checkpoint.
    """

    def __init__(self, tensors: Iterable[str]) -> None:
        self.tensors = list(tensors)
        self.zeros: dict[tuple[int, str], Tensor] = {}

    def take_out(self, state: dict[str, Any]) -> None:
        """Remove them from what is to be loaded, megatron-core's sharded states of one optimizer."""
        for number, weight in state["param_state"].items():
            for name in [name for name, tensor in weight.items() if not self._is_saved(tensor.key)]:
                self.zeros[number, name] = weight.pop(name).data.zero_()

    def put_back(self, state: dict[str, Any]) -> None:
        """Add them to what was loaded."""
        for (number, name), zeros in self.zeros.items():
            state["param_state"][number][name] = zeros

    def _is_saved(self, key: str) -> bool:
        # a weight of several parts is saved as a tensor for each
        return any(name == key or name.startswith(f"{key}.") for name in self.tensors)


def fresh_states(checkpoint: Path, name: str, change: str | None) -> FreshStates | None:
    """Return the states that begin anew where the checkpoint is another optimizer's; None where it is this one's.

    Args:
        name: of this run's optimizer.
        change: `resume.optimizer_change`.
    Errors:
        UserError: it is another's, and the change is not declared.
    """
    saved = read_record(checkpoint).get("settings", {}).get("optim.name", ADAMW)
    if saved == name:
        return None
    if change is None:
        raise UserError(
            f"checkpoint {checkpoint} was written with optim.name = {saved}, which is {name} now",
            hint=f"set optim.name={saved}; or, where the change is meant from this step on, "
            "resume.optimizer_change=from_step",
        )
    return FreshStates(
        key for key in read_index(checkpoint / WEIGHTS).state_dict_metadata if key.startswith("optimizer")
    )
