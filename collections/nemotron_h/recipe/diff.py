"""Differences between two recipes, and where each side was written."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from nemotron_h.core.strict import leaves
from nemotron_h.recipe.compose import DEFAULT, Composed
from nemotron_h.recipe.text import origin_text, scalar

ABSENT = object()


@dataclass(frozen=True)
class Side:
    """A value of one recipe; `value` is `ABSENT` where the recipe has no such key."""

    value: Any
    origin: str
    source: str

    def text(self) -> str:
        """Return the value as YAML."""
        return "(absent)" if self.value is ABSENT else scalar(self.value)


def _values(composed: Composed) -> dict[str, Any]:
    recipe = dataclasses.asdict(composed.recipe)
    recipe.pop("sources")
    recipe["model"].pop("sources")
    return dict(leaves(recipe))


def differences(a: Composed, b: Composed) -> dict[str, tuple[Side, Side]]:
    """Return dotted key -> both sides of every value that differs, in the schema's order. Sources are not compared."""
    values = _values(a), _values(b)

    def side(number: int, key: str) -> Side:
        composed = (a, b)[number]
        value = values[number].get(key, ABSENT)
        origin = "" if value is ABSENT else origin_text(composed.origins.get(key, DEFAULT))
        return Side(value, origin, composed.sources.get(key, ""))

    keys = list(dict.fromkeys([*values[0], *values[1]]))
    return {
        key: (side(0, key), side(1, key)) for key in keys if values[0].get(key, ABSENT) != values[1].get(key, ABSENT)
    }


def show(found: dict[str, tuple[Side, Side]], console: Console) -> None:
    """Print three lines a key: its name, the first recipe's value, the second's."""
    for key, sides in found.items():
        console.print(Text(key, "bold"), soft_wrap=True)
        width = max(len(side.text()) for side in sides)
        for mark, style, side in zip("-+", ("red", "green"), sides, strict=True):
            where = "; ".join(text for text in (side.origin, side.source) if text)
            line = Text.assemble((f"  {mark} {side.text():<{min(width, 60)}}", style), (f"  {where}", "dim"))
            console.print(line, soft_wrap=True)
    plural = "key differs" if len(found) == 1 else "keys differ"
    console.print(f"{len(found)} {plural}" if found else "the recipes are the same")
