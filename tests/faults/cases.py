"""Cases of a campaign: stage, fault and a number give the fault's moment, always the same."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from stages import STAGES, Stage


@dataclass(frozen=True)
class Fault:
    """What happens to a run, and when.

    Attributes:
        kind: a method of `injector.Injector`, or of `DAMAGE`; `none`.
        ranks: on which; None is all.
        run: of those that a pipeline starts, from 1; 0 is the command's own process.
        part, step: of the run: "begin" or "end" of a step, "save" of a checkpoint; "start" of the process.
        delay: seconds after that.
        file: in place of those, the number of the file under `folder` that is being opened, renamed or removed.
        amount: seconds, bytes or a share, as the kind says.
        folder, disk, mark: paths, of the case.
    """

    kind: str
    ranks: tuple[int, ...] | None = None
    run: int = 0
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
        where += f" of run {self.run}" if self.run else ""
        late = f" + {self.delay:.3f} s" if self.delay else ""
        if self.file:
            return f"file {self.file}{where}"
        return f"{self.part} of step {self.step}{late}{where}" if self.part else ""

    def json(self) -> dict:
        """Return it as the injector reads it."""
        return asdict(self)


#: kind -> what a table calls it
DAMAGE = {
    "torn": "torn checkpoint file",
    "flipped": "bit flip in a checkpoint",
    "torn_data": "torn data file",
    "flipped_data": "bit flip in data",
    "torn_record": "torn record",
    "flipped_record": "bit flip in a record",
}
KINDS = {
    "kill": "kill -9",
    "kill_group": "kill -9, whole group",
    "term": "SIGTERM",
    "interrupt": "SIGINT",
    "interrupt_group": "SIGINT, whole group",
    "stop": "SIGSTOP, SIGCONT",
    "stop_for_good": "SIGSTOP",
    "bug": "exception",
    "full": "disk full",
    "file_limit": "file size limit",
    **DAMAGE,
    "nan_weight": "NaN in a weight",
    "nan_batch": "NaN in a batch",
    "clock": "clock jump",
}
#: a preparation runs no step and has no checkpoint
OF_PREPARATION = (
    *("kill", "kill_group", "term", "interrupt_group", "stop", "bug", "full", "file_limit"),
    *("torn_data", "flipped_data", "clock"),
)
#: what reaches a process from outside
FROM_OUTSIDE = ("kill", "term", "interrupt_group", "stop", "full", "file_limit", "torn", "flipped")


def _has(stage: Stage, kind: str) -> bool:
    if stage.recipe is None:
        return kind in OF_PREPARATION
    if stage.outside:
        return kind in FROM_OUTSIDE
    return kind not in ("kill_group", "stop_for_good") or (kind == "stop_for_good" and stage.ranks > 1)


#: (stage, kind), in a fixed order that mixes them
PAIRS = [(name, kind) for name, stage in STAGES.items() for kind in KINDS if _has(stage, kind)]
PAIRS.sort(key=lambda pair: random.Random("/".join(pair)).random())


def case_of(text: str) -> tuple[Stage, str, int]:
    """Return stage, kind and number of a case by its name, `pretrain/kill/17`."""
    stage, kind, number = text.split("/")
    if (stage, kind) not in PAIRS:
        raise SystemExit(f"there is no {stage}/{kind}; known: {', '.join(sorted(map('/'.join, PAIRS)))}")
    return STAGES[stage], kind, int(number)


def next_cases(number: int, tried: Mapping[tuple[str, str], int], outside: bool = False) -> list[str]:
    """Return the names of so many cases that were never tried, of the pairs with the fewest first.

    Args:
        tried: (stage, kind) -> how many cases were, whose numbers are those below.
        outside: of the stages that are disturbed from outside, and of no others.
    """
    counts = {pair: tried.get(pair, 0) for pair in PAIRS if STAGES[pair[0]].outside == outside}
    names = []
    for _ in range(number):
        pair = min(counts, key=counts.get)
        names.append(f"{pair[0]}/{pair[1]}/{counts[pair]}")
        counts[pair] += 1
    return names


def fault(case: str, files: list[int]) -> Fault:
    """Return the fault of a case.

    Args:
        files: that each rank of the undisturbed command opens, renames and removes.
    """
    stage, kind, _ = case_of(case)
    rng = random.Random(case)
    ranks = None if kind == "interrupt_group" else (rng.randrange(stage.ranks),)
    last = files[ranks[0]] if ranks else min(files)
    amounts = {
        "stop": rng.uniform(0.3, 2),
        "full": rng.choice((0, 4096, rng.randrange(100_000), rng.randrange(4_000_000))),
        "file_limit": rng.randrange(20_000, 800_000) if stage.recipe else rng.randrange(100, 60_000),
        "nan_weight": rng.random(),
        "clock": rng.choice((-1, 1)) * rng.choice((5, 3_600, 400 * 86_400)),
    }
    amount = amounts.get(kind, 0.0)
    if kind in DAMAGE:
        return Fault(kind, amount=rng.random())
    if stage.recipe is None:
        return Fault(kind, ranks, file=rng.randint(1, last), amount=amount)
    in_a_run = kind in ("nan_weight", "nan_batch") or rng.random() < 0.5
    run = rng.randint(1, 3) if not stage.trains and in_a_run else 0
    in_a_step = kind in ("nan_weight", "nan_batch") or (kind == "bug" and (stage.trains or run))
    if stage.outside:
        if rng.random() < 0.25:
            return Fault(kind, ranks, part="start", delay=rng.uniform(0, 12), amount=amount)
        step = rng.randint(1, stage.steps - 1)
        return Fault(kind, ranks, part="end", step=step, delay=rng.uniform(0, 0.3), amount=amount)
    if in_a_step:
        part = "end" if kind != "nan_batch" and rng.random() < 0.3 else "begin"
        return Fault(kind, ranks, run, part, rng.randint(1, stage.steps), amount=amount)
    if not run and (not stage.trains or rng.random() < 0.35):
        return Fault(kind, ranks, file=rng.randint(1, last), amount=amount)
    if rng.random() < 0.4:
        saved = rng.choice([*range(stage.every, stage.steps, stage.every), stage.steps])
        return Fault(kind, ranks, run, "save", saved, rng.choice((0.0, rng.uniform(0, 0.15))), amount=amount)
    return Fault(kind, ranks, run, "begin", rng.randint(1, stage.steps), rng.uniform(0, 0.2), amount=amount)
