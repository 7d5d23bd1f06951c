"""Cases of a campaign: a seed gives a stage, a fault and its moment, always the same."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass

from stages import STAGES, Stage


@dataclass(frozen=True)
class Fault:
    """What happens to a run, and when.

    Attributes:
        kind: a method of `injector.Injector`, or damage to the newest checkpoint (`torn`, `flipped`); `none`.
        ranks: on which; None is all.
        part, step: of the run: "begin" or "end" of a step, "save" of a checkpoint.
        delay: seconds after that.
        file: in place of those, the number of the file under `folder` that is being opened, renamed or removed.
        amount: seconds, bytes or a share, as the kind says.
        folder, disk, mark: paths, of the case.
    """

    kind: str
    ranks: tuple[int, ...] | None = None
    part: str = ""
    step: int = 0
    delay: float = 0.0
    file: int = 0
    amount: float = 0.0
    folder: str = ""
    disk: str = ""
    mark: str = ""

    def moment(self) -> str:
        """Return when, for a reader."""
        where = "" if self.ranks is None else f" on rank {', '.join(map(str, self.ranks))}"
        late = f" + {self.delay:.3f} s" if self.delay else ""
        if self.file:
            return f"file {self.file}{where}"
        return f"{self.part} of step {self.step}{late}{where}" if self.part else ""

    def json(self) -> dict:
        """Return it as the injector reads it."""
        return asdict(self)


#: kind -> what a table calls it
DAMAGE = {"torn": "torn checkpoint file", "flipped": "bit flip in a checkpoint"}
KINDS = {
    "kill": "kill -9",
    "term": "SIGTERM",
    "interrupt": "SIGINT",
    "interrupt_group": "SIGINT, whole group",
    "stop": "SIGSTOP, SIGCONT",
    "bug": "exception in a step",
    "full": "disk full",
    "file_limit": "file size limit",
    **DAMAGE,
    "nan_weight": "NaN in a weight",
    "nan_batch": "NaN in a batch",
    "clock": "clock jump",
}
#: preparation runs no step and has no checkpoint
OF_PREPARATION = {"kill": "kill", "kill_group": "kill -9, whole group", "term": "", "interrupt_group": "", "full": ""}
KINDS["kill_group"] = OF_PREPARATION["kill_group"]
PAIRS = [
    (kind, stage)
    for kind in KINDS
    for stage in STAGES
    if (kind in OF_PREPARATION if stage == "prepare" else kind != "kill_group")
]
random.Random(0).shuffle(PAIRS)  # so that a short campaign has some of all


def pair(seed: int) -> tuple[str, Stage]:
    """Return the kind of fault and the stage of a seed; seeds in a row go through all pairs."""
    kind, stage = PAIRS[seed % len(PAIRS)]
    return kind, STAGES[stage]


def fault(seed: int, files: list[int]) -> Fault:
    """Return the fault of a seed.

    Args:
        files: that each rank of the undisturbed command opens, renames and removes.
    """
    kind, stage = pair(seed)
    rng = random.Random(seed)
    ranks = None if kind == "interrupt_group" else (rng.randrange(stage.ranks),)
    last = files[ranks[0]] if ranks else min(files)
    if kind in DAMAGE:
        return Fault(kind, amount=rng.random())
    amounts = {
        "stop": rng.uniform(0.3, 2),
        "full": rng.choice((0, 4096, rng.randrange(100_000), rng.randrange(4_000_000))),
        "file_limit": rng.randrange(20_000, 800_000),
        "nan_weight": rng.random(),
        "clock": rng.choice((-1, 1)) * rng.choice((5, 3_600, 400 * 86_400)),
    }
    amount = amounts.get(kind, 0.0)
    if stage.name == "prepare":
        return Fault(kind, ranks, file=rng.randint(1, last), amount=amount)
    if kind in ("bug", "nan_weight", "nan_batch"):
        part = "end" if kind != "nan_batch" and rng.random() < 0.3 else "begin"
        return Fault(kind, ranks, part, rng.randint(1, stage.steps), amount=amount)
    if rng.random() < 0.35:
        return Fault(kind, ranks, file=rng.randint(1, last), amount=amount)
    if rng.random() < 0.4:
        saved = rng.choice([*range(stage.every, stage.steps, stage.every), stage.steps])
        return Fault(kind, ranks, "save", saved, rng.choice((0.0, rng.uniform(0, 0.15))), amount=amount)
    return Fault(kind, ranks, "begin", rng.randint(1, stage.steps), rng.uniform(0, 0.2), amount=amount)
