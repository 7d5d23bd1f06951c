"""`docs/results/fidelity.md` is current, and no departure from a paper goes without a reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemotron_h.recipe import fidelity
from nemotron_h.recipe.compose import known_recipes

DOCUMENT = Path(__file__).parents[2] / "docs" / "results" / "fidelity.md"
OURS = {
    "nemotron_h_tiny",
    "nemotron_h_100m",
    "nemotron_h_400m",
    "nemotron_h_1b",
    "falcon_h1_tiny",
    "nemotron_h_moe_tiny",
    "nemotron_h_tiny_heads",
    "nemotron_t_tiny",
    "llama_tiny",
}
#: others' models, which are fine-tuned by recipes of this project alone
IMPORTED = {"smollm2_135m"}


def test_every_model_is_in_a_paper_or_ours() -> None:
    models = {name.split("/")[0] for name in known_recipes()}
    assert set(fidelity.published()) == models - OURS - IMPORTED


@pytest.mark.parametrize(
    "name", [n for n in known_recipes("pretrain") if n.endswith("/pretrain") and n.split("/")[0] not in OURS]
)
def test_departures_and_gaps_have_a_reason(name: str) -> None:
    unexplained = [row for row in fidelity.rows(name) if not row.explained]
    assert not unexplained


@pytest.mark.parametrize(
    ("published", "ours", "source", "agrees", "explained"),
    [
        (8e-4, 0.0008, "paper 2.4", True, True),
        ("15T", "15_000_000_000_000", "paper 2.4", True, True),
        ("15T", "20T", "paper 2.4", False, False),
        ("15T", "20T", "", False, False),
        ("15T", "20T", "ours: longer", False, True),
        (None, "15T", "paper 2.4", False, False),
        (None, "15T", "ours: not published; a guess", False, True),
    ],
)
def test_a_row_says_what_it_is(published, ours, source: str, agrees: bool, explained: bool) -> None:
    row = fidelity.Row("tokens" if isinstance(ours, str) else "optim.peak_lr", published, "paper 2.4", ours, source)
    assert (row.agrees, row.explained) == (agrees, explained)


def test_the_document_is_current() -> None:
    assert DOCUMENT.read_text() == fidelity.document(), "python -m nemotron_h.recipe.fidelity > " + str(DOCUMENT)
