"""Let ckpt-chaos judge: it kills a small run at every file that the run opens, renames or removes, or leaves that file
torn, gives the same command again, and compares where it resumed and what its last weights are.

The command is the installed `nemo llm pretrain`; with `--forks` it is the same code as a fork of a process that has
imported NeMo, which makes all points affordable. Prints ckpt-chaos's table; exit code 1 where a point is no PASS.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "training")]

#: 6 steps, 3 checkpoints, the first removed when the third is there
STEPS = 6
RESUMED = r"(?:resumed at|is complete:) step (\d+)"
FAILURES = "HARD_FAIL,SILENT_DIVERGENCE,LOST_WORK,CONTROL_FAIL"


def command_of(folder: Path) -> list[str]:
    """Prepare texts, write a recipe; return the command that trains it, whose folder is `{out}`."""
    from small_run import FORKS, prepared

    recipe = prepared(folder).variant(
        "chaos",
        ("tokens: 6144 # 12 steps", f"tokens: {STEPS * 512}"),
        ("micro_batch_size: 2", "micro_batch_size: 4"),
        ("every_steps: 4", "every_steps: 2"),
    )
    FORKS.close()
    FORKS.process = None
    nemo = str(Path(sys.executable).with_name("nemo"))
    return [nemo, "llm", "pretrain", "--factory", f"nemotron_h_recipe(path={recipe})", "--yes", "log.dir={out}"]


def result(out: Path) -> str:
    """Return the sha256 of a run's last weights and optimizer."""
    from nemotron_h.checkpoint import folders
    from nemotron_h.launch.stages import content_digest

    newest = folders.newest(out / "small")
    return f"{newest.name} {content_digest(newest)}"


def note(work: Path, command: str) -> None:
    """Add the verdicts to the ledger and the page."""
    from ckpt_chaos.runner import rejudge
    from ledger import Ledger, commit, write_page

    rows, ledger = rejudge(work), Ledger()
    verdicts = dict(collections.Counter(row.verdict for row in rows))
    day = time.strftime("%Y-%m-%d")
    ledger.chaos.append(
        {"command": command, "day": day, "commit": commit(), "points": len(rows) - 1, "verdicts": verdicts}
    )
    ledger.save()
    write_page(ledger)


def serve(place: socket.socket, folder: Path) -> None:
    """Run each command that `ask` sends as a fork."""
    from small_run import FORKS

    while True:
        with place.accept()[0] as asked, asked.makefile("rw") as stream:
            order = stream.readline()
            code = FORKS.run(__file__, "--fork", order, folder=folder, name="fork", seconds=300)
            said = [(folder / f"fork.{end}").read_text(errors="replace") for end in ("out", "err")]
            stream.write(json.dumps({"code": code if code >= 0 else 128 - code, "said": said}) + "\n")


def ask(place: str, command: list[str]) -> int:
    """Have a command run as a fork, with ckpt-chaos's variables; return its exit code."""
    chaos = {key: value for key, value in os.environ.items() if key.startswith("CKPT_CHAOS_") and "ARMED" not in key}
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(place)
        with asking.makefile("rw") as stream:
            stream.write(json.dumps({"environment": chaos, "command": command}) + "\n")
            stream.flush()
            answer = json.loads(stream.readline())
    print(*answer["said"], sep="\n")
    return answer["code"]


def fork(order: str) -> None:
    """Run a command in this process, armed as ckpt-chaos arms one that starts."""
    from ckpt_chaos.targets.common import arm_from_env

    from nemotron_h.launch.command import main as nemo

    asked = json.loads(order)
    os.environ.update(asked["environment"])
    arm_from_env(0, lazy=True)
    sys.argv = asked["command"]
    nemo()


def main() -> int:
    """Run ckpt-chaos."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--points", type=int, default=40, help="at most, evenly spaced over the run's files")
    parser.add_argument("--forks", action="store_true", help="forks in place of processes that import NeMo each")
    parser.add_argument("--out", type=Path, help="folder of what ckpt-chaos keeps; a temporary one where left out")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    command, here = command_of(folder), [sys.executable, str(Path(__file__).resolve())]
    if given.forks:
        place = socket.socket(socket.AF_UNIX)
        place.bind(str(folder / "asked"))
        place.listen()
        threading.Thread(target=serve, args=(place, folder), daemon=True).start()
        command = [*here, "--ask", str(folder / "asked"), *command]
    judge = [sys.executable, "-m", "ckpt_chaos", "run", "--step-regex", RESUMED, "--max-points", str(given.points)]
    judge += ["--result-cmd", f"{here[0]} {here[1]} --result {{out}}", "--fail-on", FAILURES]
    judge += ["--checkpoint-glob", "{out}/small/checkpoints/step-*", "--ckpt-ignore-size"]  # run.json names the folder
    work = (given.out or folder / "points").resolve()
    judge += ["--work", str(work), "--", *command]
    try:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        code = subprocess.run(judge, env=environment, cwd=folder, check=False).returncode
        note(work, f"make chaos N={given.points}{' FORKS=1' * given.forks}")
        return code
    finally:
        with contextlib.suppress(ImportError):
            from small_run import FORKS

            FORKS.close()
        print(f"folders: {work}")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--result", out]:
            print(result(Path(out)))
        case ["--ask", place, *command]:
            sys.exit(ask(place, command))
        case ["--fork", order]:
            fork(order)
        case _:
            sys.exit(main())
