"""Tell spikes of a metric from its last values."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import fmean

#: a spike is above the mean of the last steps by so many standard deviations; as OLMo-core's SkipStepOptimizer
WINDOW, DEVIATIONS = 128, 6.0
#: ours: steps before there is a verdict; the first losses of a run fall faster than any that follow
LEAST = 32


class Spikes:
    """The last values of a metric, one far from the others as the bound that it passed: it hides none after it."""

    def __init__(self, values: Sequence[float] = ()) -> None:
        self.values: deque[float] = deque(map(float, values), maxlen=WINDOW)

    def add(self, value: float) -> dict[str, float] | None:
        """Take the value of a step, and return it with mean and standard deviation of those before if it is a spike."""
        if not math.isfinite(value):
            return None
        mean = fmean(self.values) if self.values else value
        deviation = math.sqrt(fmean((v - mean) ** 2 for v in self.values)) if self.values else 0.0
        if len(self.values) < LEAST or not deviation:
            self.values.append(value)
            return None
        bound = DEVIATIONS * deviation
        self.values.append(min(max(value, mean - bound), mean + bound))
        return {"value": value, "mean": mean, "deviation": deviation} if value > mean + bound else None
