"""Write `docs/results/cards.md`, the table of the verification cards: `python docs/write_cards.py`. A test compares."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from nemotron_h.core.strict_yaml import read_config

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "results" / "cards.md"
HEADER = """# Verification cards

A card is a claim with all that it takes to check it: recipe, settings, machine, versions, and what was measured there.
One command runs it again, in a folder of its own, and prints what it states beside what comes out now:

    make card CARD=docs/cards/nemotron_h_tiny-cpu.yaml

Losses are compared on every machine, within the card's tolerance; seconds, MFU and memory on the card's own hardware
alone. `resume_after` stops a second run there and resumes it: its losses and weights must be equal. `conversion` wants
the weights back from `nemotron-h export hf` and `import hf`, every tensor equal. The exit code is 1 where something
differs. A card of your own is a YAML file with claim, hardware, recipe and changes;
`python demos/card.py FILE --write` puts what it measures into it."""


Cards = dict[str, dict[str, Any]]


def cards() -> Cards:
    """Return name -> content of the cards of `docs/cards`."""
    return {file.stem: dict(read_config(file)) for file in sorted((DOCS / "cards").glob("*.yaml"))}


def table(chosen: Cards, page: str = "") -> list[str]:
    """Return the table of what cards state, with links to their sections of `page`."""
    rows = ["| card | where | loss by step | s a step | peak GiB | exact |", "|---|---|---|---|---|---|"]
    for name, card in chosen.items():
        losses = ", ".join(f"{step}: {loss:.4g}" for step, loss in card["losses"].items())
        seconds = f"{card['seconds_per_step']:.2f}" if card["seconds_per_step"] else ""
        memory = f"{card['memory_gib']:.1f}" if card["memory_gib"] else ""
        exact = [word for word, key in (("resumed", "resume_after"), ("converted", "conversion")) if card[key]]
        link = f"[{name}]({page}#{name.lower()})"
        rows.append(f"| {link} | {card['hardware']} | {losses} | {seconds} | {memory} | {', '.join(exact)} |")
    return rows


def page() -> str:
    """Return the page."""
    parts = [HEADER, "\n".join(table(cards()))]
    for name, card in cards().items():
        wrapped = textwrap.fill(card["claim"].strip(), 118, break_on_hyphens=False)
        run = f"    make card CARD=docs/cards/{name}.yaml"
        measured = card["measured"]
        parts += [f"## {name}", wrapped, run, f"Measured on {measured['date']} at commit `{measured['commit'][:12]}`."]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
