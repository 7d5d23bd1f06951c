"""Read what a step takes each rank of a run by itself, as the run last compared them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median_low

from nemotron_h.core.errors import UserError
from nemotron_h.core.files import read_json_object
from nemotron_h.core.progress import RANK_TIMES

#: ours: rows of the table, of the slowest ranks
ROWS = 8


@dataclass(frozen=True)
class RankTimes:
    """The comparison.

    Attributes:
        step: that it was made at.
        seconds: of a step of each rank, before the ranks wait for each other; the mean of the steps before.
        slow: rank -> the step since which it is slower than the others.
    """

    step: int
    seconds: list[float]
    slow: dict[int, int]

    @property
    def median(self) -> float:
        """Return the median over the ranks; of an even number, the lower one."""
        return median_low(self.seconds)

    def slowest(self) -> list[int]:
        """Return the ranks, the slowest first."""
        return sorted(range(len(self.seconds)), key=lambda rank: -self.seconds[rank])


def read_ranks(folder: Path) -> RankTimes | None:
    """Return the comparison of a run; None of one rank, or of a run that came to none.

    Errors:
        UserError: the file is not as a run writes it.
    """
    file = folder / RANK_TIMES
    if not file.exists():
        return None
    content = read_json_object(file)
    try:
        seconds = [float(value) for value in content["seconds"]]
        slow = {int(rank): int(step) for rank, step in content["slow_since_step"].items()}
        times = RankTimes(int(content["step"]), seconds, slow)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} does not hold the times of a run's ranks", hint=f"remove it: rm {file}") from error
    return times if len(seconds) > 1 and times.median > 0 else None


def table(times: RankTimes) -> list[tuple[str, str, str, str]]:
    """Return rank, seconds of a step, times the median, and since when it is slow, of the slowest ranks."""
    return [
        (
            f"{rank:,}",
            f"{times.seconds[rank]:.3g}",
            f"{times.seconds[rank] / times.median:.2f}",
            f"step {times.slow[rank]:,}" if rank in times.slow else "",
        )
        for rank in times.slowest()[:ROWS]
    ]


def words(times: RankTimes) -> str:
    """Return the slowest rank in a sentence."""
    rank, seconds, ratio, since = table(times)[0]
    slow = f"; slower than the others since {since}" if since else ""
    return f"the slowest of {len(times.seconds):,} is rank {rank}: {seconds} s a step, {ratio} times the median{slow}"
