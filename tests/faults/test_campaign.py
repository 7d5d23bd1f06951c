"""Some cases of the campaign pass, and its verdict tells each kind of failure from a good end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import verdict
from cases import DAMAGE, KINDS, PAIRS, Fault, fault, next_cases
from injector import BUG
from ledger import PAGE, Ledger
from small_run import Small
from stages import STAGES
from trial import Ground, Result
from verdict import End

PRETRAIN = STAGES["pretrain"]
GOOD = End(0, "", "", 1.0, False)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground(tmp_path_factory.mktemp("faults"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kill", "flipped", "torn_data"])
def test_a_disturbed_run_ends_as_an_undisturbed_one(ground: Ground, kind: str) -> None:
    result = ground.trial(f"pretrain/{kind}/2026")
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


def test_a_case_is_always_the_same_and_those_that_follow_are_of_the_pairs_with_the_fewest() -> None:
    cases = next_cases(5 * len(PAIRS), {}) + next_cases(5 * len(PAIRS), {}, outside=True)
    assert len({*cases}) == len(cases)
    assert {tuple(case.split("/")[:2]) for case in cases} == {*PAIRS}
    assert next_cases(2, {pair: 7 for pair in PAIRS if pair != ("sft", "kill")}) == ["sft/kill/0", "sft/kill/1"]
    chosen = [fault(case, [100, 80]) for case in cases]
    assert chosen == [fault(case, [100, 80]) for case in cases]
    moments = {each.part for each in chosen if each.kind not in DAMAGE and not each.file}
    assert moments == {"begin", "end", "save", "start"}
    assert {rank for each in chosen for rank in each.ranks or ()} == {0, 1}
    assert {each.run for each in chosen} == {0, 1, 2, 3}


def test_a_poor_message_is_told_from_a_clear_one() -> None:
    poor, two = verdict.of_end, STAGES["pretrain_2_ranks"]
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
    gone = poor(replace(GOOD, code=2, err="error: x\nfix: y"), Fault("stop_for_good", (1,)), two)
    assert "not named" in gone
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

    def way(code: int, err: str) -> tuple[list[str], str]:
        return verdict.fix(replace(GOOD, code=code, err=err), flipped, tmp_path)

    assert way(2, "fix: to continue from it add resume.resume_from_path=a/step-000008\n")[0][0].endswith("step-000008")
    assert way(2, "fix: remove the run's folder to start anew") == (["rm", "-r", str(tmp_path)], "")
    again = "nemotron-h data prepare --blend words --root data"
    assert way(2, f"fix: Run: {again}\n") == (again.split(), "")
    assert "no way out" in way(2, "error: damaged")[1]
    assert "exit code 0" in way(0, "")[1]


def test_the_ledger_counts_cases_and_the_page_has_its_tables(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.json")
    ledger.begin("abc", 1)
    for number, outcome in enumerate(("PASS", "PASS", "LOST WORK", "SKIPPED", "NOT REACHED")):
        ledger.add(Result(f"sft/kill/{number}", "", outcome, {outcome: "why"}), 60.0)
    again = Ledger(tmp_path / "ledger.json")
    assert again.tried() == {("sft", "kill"): 5}
    assert next_cases(len(PAIRS), again.tried()).count("sft/kill/5") == 0
    page = again.page()
    assert f"| {KINDS['kill']} | - | - | 3/4 |" in page
    assert "| abc | 5 | 1 | 1 | 1 |" in page
    assert "| sft/kill/2 | lost work | abc | - |" in page
    again.again(Result("sft/kill/2", "", "PASS"), "def")
    assert "| sft/kill/2 | lost work | abc | def |" in Ledger(tmp_path / "ledger.json").page()
    assert Ledger().page() in PAGE.read_text(), "python tests/faults/ledger.py writes it"


def test_a_record_of_a_run_from_outside_has_a_step_once(tmp_path: Path) -> None:
    outside = STAGES["nemo_pretrain"]
    folder = outside.folder(Small(tmp_path), "run")
    folder.mkdir(parents=True)
    lines = [f'{{"step": {step}, "began": {began}.5}}\n' for step, began in ((1, 0), (2, 0), (2, 0), (3, 0), (3, 1))]
    (folder / "progress.jsonl").write_text("".join([*lines, '{"step": 4, "lo']))
    assert verdict.recorded(Small(tmp_path), outside, "run") == [1, 2, 3, 3, 4]


def test_a_validation_is_of_the_step_that_measured_it(tmp_path: Path) -> None:
    """The first lines after a start show none; another loss of a validation is a difference."""
    small, outside = Small(tmp_path), STAGES["nemo_pretrain"]

    def write(name: str, shown: tuple[tuple[int, float | None], ...]) -> str:
        outside.folder(small, name).mkdir(parents=True)
        lines = [
            {"step": step, "loss": 5.0, "lr": 1e-3, "metrics": {"grad_norm": 1.0}}
            | {"validation_loss": loss, "validation_step": None if loss is None else 2}
            for step, loss in shown
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (outside.folder(small, name) / "progress.jsonl").write_text(text)
        return name

    straight = write("straight", ((1, None), (2, None), (2, 4.0), (3, 4.0)))
    resumed = write("resumed", ((1, None), (2, None), (2, 4.0), (3, None)))
    other = write("other", ((1, None), (2, None), (2, 4.1), (3, 4.1)))
    assert verdict._steps(small, outside, resumed) == verdict._steps(small, outside, straight)
    assert verdict.of_result(small, outside, other, straight) == "steps 2 differ, the first in validation_loss"
