"""The `nemotron-h` command in this process."""

from __future__ import annotations

from typer.testing import CliRunner

from nemotron_h.cli.main import app


def invoke(*arguments: object) -> str:
    """Run the command; its errors are raised."""
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False).stdout
