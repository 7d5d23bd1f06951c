"""Find the largest haystack that fits."""

from __future__ import annotations

from collections.abc import Callable


def largest(fits: Callable[[int], bool], least: int, step: int, most: int | None = None) -> int | None:
    """Return the largest of least, least + step, least + 2 step, ... up to `most` that fits; None where none does.

    Steps double until one is too large, then a binary search goes on between the last two.

    Args:
        fits: holds up to some number of units and for none beyond.
        most: None is without end.
    """
    bound = None if most is None else max(0, (most - least) // step)
    if not fits(least):
        return None
    below, above = 0, 1
    while bound is None or above <= bound:
        if not fits(least + above * step):
            break
        below, above = above, 2 * above
    else:
        above = bound + 1
    while above - below > 1:
        middle = (below + above) // 2
        if fits(least + middle * step):
            below = middle
        else:
            above = middle
    return least + below * step
