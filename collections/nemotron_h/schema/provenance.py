"""Origins of a composed recipe's values: the file and line that won, and the source stated for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_h.core.strict_yaml import flat_lines, read_bounded
from nemotron_h.schema.former_names import FORMER

SCHEMA_DEFAULT = "schema default"
OVERRIDE = "override"


@dataclass(frozen=True)
class Layer:
    """A file of the merge, in Hydra's order (later ones win).

    Attributes:
        file: the YAML file.
        package: the dotted key that its content is put under; empty at the top.
    """

    file: Path
    package: str


@dataclass(frozen=True)
class Origin:
    """Place in which a value was written: the layer's number in the merge, and the line.

    Attributes:
        rank: larger wins; -1 is the schema's default.
        file, line: None for the schema's default and for overrides. Lines count from 1.
    """

    rank: int
    file: Path | None = None
    line: int | None = None


DEFAULT = Origin(-1)


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value that is not a mapping with content, as dotted key and value, in order."""
    for key, value in values.items():
        dotted = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping) and value:
            yield from leaves(value, dotted)
        else:
            yield dotted, value


def origins(layers: Sequence[Layer], overridden: Sequence[str]) -> dict[str, Origin]:
    """Return dotted key -> place in which the winning value was written; keys that no file writes are absent.

    Args:
        layers: the files in the order of the merge.
        overridden: dotted keys that the command line set.
    """
    found: dict[str, Origin] = {}
    for rank, layer in enumerate(layers):
        prefix = f"{layer.package}." if layer.package else ""
        for key, line in flat_lines(read_bounded(layer.file), str(layer.file)):
            if prefix or key.split(".")[0] not in ("defaults", "hydra"):
                found[FORMER.get(prefix + key, prefix + key)] = Origin(rank, layer.file, line)
    return found | {key: Origin(len(layers)) for key in overridden}


def current_sources(values: Mapping[str, Any], found: Mapping[str, Origin]) -> dict[str, str]:
    """Return dotted key of a value -> the source stated for it, without the stale ones.

    A source speaks of the value that its own file, or a file merged before it, gave: `paper 2.4` in a base says nothing
    about the value that a recipe puts in its place. One stated for a whole part (`optim`) speaks of that part's values
    in its own file that have no source of their own.

    Args:
        values: the recipe as nested containers; `sources` at its top and in its `model` are read.
        found: of `origins`.
    """
    stated = {key: (text, found.get(f"sources.{key}", DEFAULT).rank) for key, text in values["sources"].items()}
    for key, text in values["model"]["sources"].items():
        stated[f"model.{key}"] = (text, found.get(f"model.sources.{key}", DEFAULT).rank)
    current = {}
    for key, _ in leaves(values):
        rank = found.get(key, DEFAULT).rank
        if key in stated and stated[key][1] >= rank:
            current[key] = stated[key][0]
            continue
        parts = key.split(".")
        parents = (".".join(parts[:depth]) for depth in range(len(parts) - 1, 0, -1))
        of_part = next((stated[p][0] for p in parents if p in stated and stated[p][1] == rank), None)
        if of_part:
            current[key] = of_part
    return current
