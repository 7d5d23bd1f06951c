"""Some cases of the campaign pass, and its verdict tells each kind of failure from a good end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import verdict
from campaign import table
from cases import DAMAGE, PAIRS, Fault, fault, pair
from injector import BUG
from rich.console import Console
from small_run import Small
from stages import STAGES
from trial import Ground, Result
from verdict import End

SEED = 2026
PRETRAIN = STAGES["pretrain"]
GOOD = End(0, "", "", 1.0, False)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground(tmp_path_factory.mktemp("faults"))


def seed_of(kind: str, stage: str = "pretrain") -> int:
    """Return the first seed from `SEED` on with this fault in this stage."""
    return next(seed for seed in range(SEED, SEED + len(PAIRS)) if (pair(seed)[0], pair(seed)[1].name) == (kind, stage))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kill", "flipped"])
def test_a_disturbed_run_ends_as_an_undisturbed_one(ground: Ground, kind: str) -> None:
    result = ground.trial(seed_of(kind))
    assert result.outcome == verdict.PASS, result


@pytest.mark.slow
def test_a_run_that_is_not_the_undisturbed_one_has_diverged(ground: Ground) -> None:
    """The last bit of one loss, then one of the record."""
    straight, folder = ground.straight(PRETRAIN), ground.small.folder
    assert verdict.of_result(ground.small, PRETRAIN, straight, straight) == ""
    (folder / "other").mkdir()
    (folder / "other/small").symlink_to(ground.small.run_dir(straight))
    lines = (folder / straight / "steps.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    (folder / "other/steps.jsonl").write_text("\n".join([*lines[:-1], json.dumps({**last, "loss": (1.0).hex()})]))
    assert verdict.of_result(ground.small, PRETRAIN, "other", straight) == "steps 12 differ, the first in loss"


def test_a_seed_gives_one_case_and_seeds_in_a_row_all_pairs() -> None:
    assert len({pair(seed)[0] + pair(seed)[1].name for seed in range(7, 7 + len(PAIRS))}) == len(PAIRS)
    chosen = [fault(seed, [100, 80]) for seed in range(SEED, SEED + 5 * len(PAIRS))]
    assert chosen == [fault(seed, [100, 80]) for seed in range(SEED, SEED + 5 * len(PAIRS))]
    assert {each.part for each in chosen if each.kind not in DAMAGE and not each.file} == {"begin", "end", "save"}
    assert {rank for each in chosen for rank in each.ranks or ()} == {0, 1}


def test_a_poor_message_is_told_from_a_clear_one() -> None:
    poor, two = verdict.of_end, STAGES["pretrain, 2 ranks"]
    kill, full = Fault("kill", (1,)), Fault("full")
    clear = replace(GOOD, code=2, err="error: checkpoint x cannot be written\nfix: free space\n")
    assert [poor(end, full, PRETRAIN) for end in (GOOD, clear)] == ["", ""]
    assert poor(clear, replace(full, folder="runs/small"), PRETRAIN) == "the error names no file of the run"
    assert "without error and fix" in poor(replace(clear, err="error: x\n"), full, PRETRAIN)
    trace = "Traceback (most recent call last):\n  File\nOSError: [Errno 28] No space left on device\n"
    assert poor(replace(clear, code=1, err=trace), full, PRETRAIN).endswith("No space left on device")
    assert poor(replace(GOOD, code=-9), kill, PRETRAIN) == ""
    assert "not named" in poor(replace(GOOD, code=-9), kill, two)
    assert "how to go on" in poor(replace(GOOD, code=75), Fault("term"), PRETRAIN)
    told = replace(GOOD, code=130, out="ctrl-c: the same command continues; finished shards are kept")
    assert [bool(poor(end, Fault("interrupt"), STAGES["prepare"])) for end in (told, replace(told, out=""))] == [0, 1]
    assert poor(replace(GOOD, code=1, err=f"Traceback\nRuntimeError: {BUG}"), Fault("bug"), PRETRAIN) == ""
    assert "own words" in poor(replace(GOOD, code=1), Fault("bug"), PRETRAIN)


def test_lost_work_is_what_lies_beyond_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    def lost(steps: list[int], before: int, whole: int, left: bool = False) -> str:
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run/steps.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in steps))
        checkpoint = tmp_path / f"step-{whole:06d}" if whole else None
        return verdict.of_resume(Small(tmp_path), PRETRAIN, "run", steps[:before], checkpoint, left)

    assert lost([*range(1, 7), 5, 6], 6, 4) == ""
    assert lost([*range(1, 5), 1, 2], 4, 0) == "", "killed while the first was written"
    assert "resumed at step 0" in lost([*range(1, 7), 1, 2], 6, 4)
    assert lost([*range(1, 7), 1], 6, 0) == "", "killed while the first was written and training went on"
    assert "newest whole checkpoint is of step 0" in lost([*range(1, 11), 1], 10, 0)
    assert "left at step 6" in lost([*range(1, 7), 5], 6, 4, left=True)


def test_the_way_out_is_the_one_that_the_error_names(tmp_path: Path) -> None:
    flipped = Fault("flipped")

    def way(code: int, err: str) -> tuple[str, str]:
        return verdict.fix(replace(GOOD, code=code, err=err), flipped, tmp_path)

    assert way(2, "fix: to continue from it add resume.resume_from_path=a/step-000008\n")[0].endswith("step-000008")
    assert way(2, "fix: remove the run's folder to start anew") == (f"rm -r {tmp_path}", "")
    assert "no way out" in way(2, "error: damaged")[1]
    assert "exit code 0" in way(0, "")[1]


def test_the_table_counts_what_passed_and_names_the_rest() -> None:
    console = Console(width=200, record=True)
    results = [Result(n, "kill -9", "sft", "", o) for n, o in enumerate(("PASS", "PASS", "LOST WORK", "SKIPPED"))]
    with console.capture() as shown:
        console.print(table(results))
    assert "2/4, 1 lost work, 1 skipped" in shown.get()
    assert [result.failed() for result in results] == [False, False, True, False]
