"""Whatever is wrong with an input ends in one error that names key or file: no traceback, nothing without end."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from bad_inputs import DOORS, Bad, bad_inputs

from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import ranges
from nemotron_h.schema.recipe import RecipeConfig

SEED = 2026
#: of one input, in this process
LIMIT_S = 10


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Interrupt what takes longer."""

    def interrupt(*_: object) -> None:
        raise TimeoutError(f"no end within {seconds} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fault(bad: Bad) -> str:
    """Return what is wrong with the answer to an input; an empty text where it is one clear error."""
    try:
        with limited(LIMIT_S):
            bad.read()
    except UserError as error:
        if not any(name in error.message for name in bad.names):
            return f"names none of {bad.names}: {error.message[:300]}"
        return "" if len(error.message) < 2_000 else f"{len(error.message):,} letters"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return "accepted"


def test_every_bad_input_is_one_error_that_names_key_or_file(tmp_path: Path) -> None:
    faults = [f"{bad.what}: {problem}" for bad in bad_inputs(SEED, tmp_path) if (problem := fault(bad))]
    assert sum(DOORS.values()) >= 300
    assert not faults, "\n".join(faults)


def test_commands_end_with_one_error_and_code_2(tmp_path: Path) -> None:
    chosen = [bad for bad in bad_inputs(SEED + 1, tmp_path) if bad.command]
    for bad in random.Random(SEED).sample(chosen, 9):
        started = time.monotonic()
        command = [sys.executable, "-m", "nemotron_h", *bad.command]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
        assert done.returncode == 2, f"{bad.what}: {done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr
        assert done.stderr.count("error: ") == 1, f"{bad.what}: {done.stderr}"
        assert any(name in done.stderr.replace("\n", "") for name in bad.names), f"{bad.what}: {done.stderr}"
        assert time.monotonic() - started < 60


@pytest.mark.slow
def test_nemo_ends_with_one_error_and_code_2(tmp_path: Path) -> None:
    bad = next(bad for bad in bad_inputs(SEED, tmp_path) if "aliases" in bad.what)
    nemo = str(Path(sys.executable).with_name("nemo"))
    factory = f"nemotron_h_recipe(path={bad.command[-1]})"
    done = subprocess.run(
        [nemo, "llm", "pretrain", "--factory", factory, "--yes"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert Path(bad.command[-1]).name in done.stderr.replace("\n", ""), done.stderr


def test_every_number_of_a_recipe_has_a_range() -> None:
    stated, numbers = ranges(RecipeConfig), []

    def walk(schema: type, prefix: str) -> None:
        for each in fields(schema):
            annotation = get_type_hints(schema)[each.name]
            nested = [part for part in (annotation, *get_args(annotation)) if is_dataclass(part)]
            if nested:
                walk(nested[0], f"{prefix}{each.name}.")
            elif "int" in str(annotation) or "float" in str(annotation):
                numbers.append(f"{prefix}{each.name}")

    walk(RecipeConfig, "")
    assert len(numbers) > 60
    assert sorted(stated) == sorted(numbers)
