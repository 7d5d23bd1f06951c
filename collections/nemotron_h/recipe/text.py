"""A recipe as YAML text: complete and plain, or value by value with origin and source."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nemotron_h.recipe.compose import DEFAULT, OVERRIDE, SCHEMA_DEFAULT, Composed, Origin, configs_dir, recipes_dir


def scalar(value: Any) -> str:
    """Return a value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=float("inf"))
    return text.removesuffix("\n").removesuffix("\n...")


def origin_text(origin: Origin) -> str:
    """Return `file:line`, `schema default` or `override`. Shipped files are named `recipes/...` and `configs/...`."""
    if origin.file is None:
        return SCHEMA_DEFAULT if origin.rank < 0 else OVERRIDE
    for root, shown in ((recipes_dir(), "recipes"), (configs_dir(), "configs"), (Path.cwd(), "")):
        if origin.file.is_relative_to(root):
            return f"{Path(shown, origin.file.relative_to(root))}:{origin.line}"
    return f"{origin.file}:{origin.line}"


@dataclass(frozen=True)
class Line:
    """A line of a recipe: a part's name (no origin), or a value."""

    text: str
    origin: str = ""
    source: str = ""


def lines(composed: Composed) -> list[Line]:
    """Return the recipe in the schema's order, `sources` taken apart to stand beside the values."""
    return list(_lines(composed, dataclasses.asdict(composed.recipe), "", 0))


def _lines(composed: Composed, values: Mapping[str, Any], prefix: str, depth: int) -> Any:
    for key, value in values.items():
        dotted = f"{prefix}.{key}" if prefix else str(key)
        if dotted in ("sources", "model.sources"):
            continue
        if isinstance(value, Mapping) and value:
            yield Line(f"{'  ' * depth}{key}:")
            yield from _lines(composed, value, dotted, depth + 1)
        else:
            origin = origin_text(composed.origins.get(dotted, DEFAULT))
            yield Line(f"{'  ' * depth}{key}: {scalar(value)}", origin, composed.sources.get(dotted, ""))
