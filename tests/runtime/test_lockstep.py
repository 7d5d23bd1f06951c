"""What keeps ranks in step."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

from nemotron_h.training.callbacks.lockstep import GarbageCollection


class Frame:
    """In a cycle with itself, as an error with a frame that has it."""

    def __init__(self) -> None:
        self.error = self


def test_what_the_first_step_leaves_in_cycles_is_freed() -> None:
    try:
        callback = GarbageCollection(gc_interval_train=100, gc_interval_val=100)
        alive = []
        for step in (1, 2, 100):
            left = weakref.ref(Frame())
            callback.on_train_batch_end(SimpleNamespace(global_step=step), None, None, None, 0)
            alive.append(left() is not None)
    finally:
        gc.enable()
    assert alive == [False, True, False]
