"""The rooms of the library: their floors, and what the files of each import."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

LIBRARY = Path(__file__).parents[1] / "collections/nemotron_h"
#: from the ground up; a file imports rooms of lower floors alone, and its own
FLOORS = (
    ("core", "ops"),
    ("schema",),
    ("architecture",),
    ("data", "precision"),
    ("platform",),
    ("checkpoint", "model"),
    ("inference",),
    ("export", "recipe"),
    ("evaluation", "planning", "report"),
    ("laws", "training"),
    ("launch",),
    ("comparison", "compression", "reasoning", "sweep"),
    ("cli",),
)
FRAMEWORKS = frozenset({"lightning", "megatron", "nemo", "nemo_run", "transformer_engine"})
#: these know neither PyTorch nor a framework: a plan or an error in a recipe takes a second
WITHOUT_TORCH = frozenset({"core", "schema", "architecture", "planning", "recipe", "report", "laws"})
#: what follows NeMo and Megatron when they move; of `data`, the modules that feed NeMo's trainer
KNOW_FRAMEWORKS = frozenset({"model", "platform", "precision", "training", "launch"})


@functools.cache
def modules() -> dict[str, Path]:
    """Return module name (without `nemotron_h.`) -> file."""
    files = sorted(LIBRARY.rglob("*.py"))
    return {".".join(file.relative_to(LIBRARY).with_suffix("").parts): file for file in files}


def room(module: str) -> str:
    """Return the room of a module, its first folder."""
    return module.split(".")[0]


def imports(file: Path) -> Iterator[str]:
    """Yield what a file imports, in functions too: modules, and names of modules as `module.name`."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def edges() -> dict[tuple[str, str], set[str]]:
    """Return (room, room that it imports) -> the files that do."""
    found: dict[tuple[str, str], set[str]] = {}
    for module, file in modules().items():
        for name in imports(file):
            if name.startswith("nemotron_h.") and room(name.removeprefix("nemotron_h.")) != room(module):
                pair = (room(module), room(name.removeprefix("nemotron_h.")))
                found.setdefault(pair, set()).add(module)
    return found


@functools.cache
def imported(module: str) -> set[str]:
    """Return the modules that the import of a module imports itself, whatever functions import later."""
    files = modules()
    names = {
        f"{node.module}.{alias.name}" if each else node.module
        for node in ast.parse(files[module].read_text()).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        for each in (False, True)
    }
    return {name.removeprefix("nemotron_h.") for name in names}.intersection(files) - {module}


def loads(module: str) -> set[str]:
    """Return a module and those that its import loads."""
    loaded, left = set(), {module}
    while left:
        name = left.pop()
        loaded.add(name)
        left |= imported(name) - loaded
    return loaded
