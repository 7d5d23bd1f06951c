"""A command of one function, run for what it prints, and two small runs that it compares."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import typer
from save_checkpoint import save
from small_model import pure_config, small_config, small_model
from typer.testing import CliRunner


def output_of(command: Callable[..., None], *arguments: object) -> str:
    """Run the command; its errors are raised."""
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def save_two(folder: Path, tokenizer: Path) -> list[Path]:
    """Write runs of a hybrid and a Transformer of one vocabulary; Megatron is set up."""
    found = []
    for name, config in (("hybrid", small_config()), ("transformer", pure_config("*-"))):
        found.append(folder / name)
        save(small_model(config), found[-1] / "checkpoints" / "step-000001", data={"tokenizer": str(tokenizer)})
    return found
