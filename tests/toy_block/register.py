"""Add the toy block to the registries, as its two lines there would."""

from __future__ import annotations

from gated import Gated
from running_gated import RunningGated

from nemotron_h.architecture.blocks.registry import KINDS
from nemotron_h.model.blocks.registry import RUNNING


def register() -> None:
    """Add it."""
    KINDS[Gated.letter] = Gated
    RUNNING[Gated.letter] = RunningGated


def unregister() -> None:
    """Take it out again."""
    del KINDS[Gated.letter], RUNNING[Gated.letter]
