"""Paper against recipe, value by value: `python -m nemotron_h.recipe.fidelity` prints `docs/results/fidelity.md`."""

from __future__ import annotations

import dataclasses
import functools
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nemotron_h.core.strict import leaves
from nemotron_h.core.strict_yaml import read_yaml
from nemotron_h.core.units import count_of, parse_count
from nemotron_h.data.blend import load_blend
from nemotron_h.data.phases import Horizon, phase_spans
from nemotron_h.recipe.checks import definition_of
from nemotron_h.recipe.compose import compose, configs_dir, known_recipes
from nemotron_h.schema.recipe import RecipeConfig

NOT_PUBLISHED = "not published"
COUNTS = ("tokens", "optim.warmup_tokens", "optim.decay_tokens")
#: the recipe's key whose source explains a derived value
EXPLAINS = {
    "derived.layers": "model.pattern",
    "derived.num_layers": "model.pattern",
    "derived.ranks": "parallel.nodes",
    "derived.data_parallel": "parallel.nodes",
    "derived.steps": "tokens",
    "derived.warmup_steps": "optim.warmup_tokens",
    "derived.phase_switches": "data.blend",
    "derived.phase_fractions": "data.blend",
}
GROUPS = ("tokens", "data", "optim", "precision", "precision_options", "parallel", "experts", "model", "derived")
HEADER = """# Paper against recipe

Written by `python -m nemotron_h.recipe.fidelity > docs/results/fidelity.md` from `configs/paper.yaml` (what the papers
publish) and `recipes/`; a test keeps it current and fails on a departure without a reason. `paper` is Nemotron-H
(arXiv 2504.03624). `derived` values are arithmetic over others. The reason of a departure, and of a value that is not
published, is the source that the recipe states for it."""


@dataclass(frozen=True)
class Row:
    """A value as published (None where it is not) and where, as in the recipe, and what the recipe says of it."""

    key: str
    published: Any
    citation: str
    ours: Any
    source: str

    @property
    def agrees(self) -> bool:
        """Tell whether both are the same number, token count or word."""
        if self.published is None:
            return False
        if self.key in COUNTS:
            return parse_count(self.published) == parse_count(self.ours)
        return self.published == self.ours

    @property
    def verdict(self) -> str:
        """Return `agrees`, `departs` or `not published`, with the reason."""
        if self.agrees:
            return "agrees"
        kind = "not published" if self.published is None else "**departs**"
        return f"{kind} ({self.source or 'no reason stated'})"

    @property
    def explained(self) -> bool:
        """Tell whether the value agrees, or has a reason that does not claim the paper itself."""
        return self.agrees or (bool(self.source) and not self.source.startswith(("paper", "arXiv")))


@functools.cache
def published() -> dict[str, Any]:
    """Read `configs/paper.yaml`: model -> `about` and `values`."""
    content = read_yaml(configs_dir() / "paper.yaml")
    return {name: entry for name, entry in content.items() if not name.startswith(".")}


def derived(recipe: RecipeConfig) -> dict[str, Any]:
    """Return what follows from the recipe by arithmetic, by key `derived.*`."""
    data, parallel, origin = recipe.data, recipe.parallel, recipe.name
    definition = definition_of(recipe, origin)
    horizon = Horizon(count_of(recipe.tokens, "tokens", origin), data.seq_length * data.global_batch_size)
    phases = load_blend(data.blend).phases
    ranks = parallel.nodes * parallel.devices
    ends = [phase.until for phase in phases if phase.until is not None]
    return {
        "derived.layers": ", ".join(f"{definition.count(kind.letter)} {kind.title}" for kind in definition.kinds),
        "derived.num_layers": definition.num_layers,
        "derived.ranks": ranks,
        "derived.data_parallel": ranks // (parallel.tensor * parallel.pipeline * parallel.context),
        "derived.steps": horizon.steps,
        "derived.warmup_steps": horizon.step_at(count_of(recipe.optim.warmup_tokens, "optim.warmup_tokens", origin)),
        "derived.phase_switches": ", ".join(str(span.end_step) for span in phase_spans(phases, horizon)[:-1]),
        "derived.phase_fractions": ", ".join(f"{end.end(horizon.tokens) / horizon.tokens:.4g}" for end in ends),
    }


def rows(name: str) -> Iterator[Row]:
    """Yield every published value of a recipe's model, then what else the recipe sets.

    Args:
        name: of the recipe, `<model>/<stage>`.
    """
    recipe = compose(name)
    ours = {**dict(leaves(dataclasses.asdict(recipe))), **derived(recipe)}
    sources = {**recipe.sources, **{f"model.{key}": text for key, text in recipe.model.sources.items()}}
    values = published().get(recipe.name, {}).get("values", {})
    keys = [*values, *(key for key in ours if key in sources and key not in values)]
    for key in sorted(keys, key=_group):
        value, citation = (None, "") if values.get(key, NOT_PUBLISHED) == NOT_PUBLISHED else values[key]
        yield Row(key, value, citation, ours[key], sources.get(EXPLAINS.get(key, key), ""))


def _group(key: str) -> int:
    part = key.split(".")[0]
    return GROUPS.index(part) if part in GROUPS else len(GROUPS)


def shown(value: Any) -> str:
    """Return a value as a table's cell."""
    if isinstance(value, bool):
        value = str(value).lower()
    return f"`{value:,}`" if isinstance(value, int) and value > 9999 else f"`{value}`"


def document() -> str:
    """Return the whole of `docs/results/fidelity.md`."""
    papers, parts = published(), [HEADER]
    # a variant, such as a correction of the teacher, is another run than the published one
    names = [name for name in known_recipes("pretrain") if name.endswith("/pretrain")]
    order = [*papers, *sorted({name.split("/")[0] for name in names} - set(papers))]
    for name in sorted(names, key=lambda name: order.index(name.split("/")[0])):
        model = name.split("/")[0]
        if model not in papers:
            parts.append(
                f"\n## {model}\n\nA size of this project, in no paper.\n\n| key | recipe | source |\n|---|---|---|"
            )
            parts += [f"| `{row.key}` | {shown(row.ours)} | {row.source} |" for row in rows(name)]
            continue
        about = textwrap.fill(papers[model]["about"], 120)
        parts.append(f"\n## {model}\n\n{about}\n\n| key | paper | recipe | |\n|---|---|---|---|")
        for row in rows(name):
            cited = f"{shown(row.published)} ({row.citation})" if row.published is not None else "-"
            parts.append(f"| `{row.key}` | {cited} | {shown(row.ours)} | {row.verdict} |")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    print(document(), end="")
