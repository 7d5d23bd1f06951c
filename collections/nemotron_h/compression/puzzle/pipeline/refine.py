"""Stage `refine`: the chosen variants, trained further in pairs of layers that follow each other (2411.19146, 3.2).

    nemotron-h puzzle RECIPE --stage refine

A variant was trained on what its parent's neighbours do; here two of the child's layers learn what the parent's two do
together. Reads compared.json and the library. Writes refined.json, and the weights into the library. Without
`puzzle.refine_tokens` it changes nothing.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from nemotron_h.compression.forward import Forward
from nemotron_h.compression.pipeline.text import CHOICE
from nemotron_h.compression.puzzle.context import Context, Picks
from nemotron_h.compression.puzzle.library import Entry, hash_of
from nemotron_h.compression.puzzle.local import Chain, Training, child_changes, imitate
from nemotron_h.compression.puzzle.pipeline.compare import COMPARED
from nemotron_h.compression.workers import bound, over_layers
from nemotron_h.core.files import write_json
from nemotron_h.core.progress import StageProgress
from nemotron_h.core.units import count_of
from nemotron_h.launch.stages import Stage

REFINED = "refined.json"


def stage(c: Context) -> Stage:
    """Return the stage."""
    title = "the chosen variants, trained in pairs of layers"
    return Stage("refine", title, ("library", "compare"), (REFINED,), partial(inputs, c), partial(run, c))


def inputs(c: Context) -> dict[str, Any]:
    """Return what the result depends on, beside library and choice."""
    local = c.part.local
    return {**c.parent.score_inputs(CHOICE), **c.keys("refine_tokens"), "puzzle.local": [local.batch, local.lr]}


def run(c: Context, folder: Path) -> str:
    """Train the pairs that the library lacks."""
    picks = c.read("compare", COMPARED)["chosen"]["picks"]
    pairs = _pairs(c, picks) if c.part.refine_tokens else []
    if not pairs:
        write_json(folder / REFINED, {"pairs": [], "stored": {}})
        return "nothing to refine" if c.part.refine_tokens else "left out: puzzle.refine_tokens is not set"
    names = {first: _names(c, first, picks) for first in pairs}
    missing = [first for first in pairs if any(c.library.entry(name) is None for name in names[first].values())]
    with StageProgress(c.console, "pairs of layers", len(missing)) as bar:
        for _ in over_layers(c, bound(refine_pair, picks), sorted(missing, reverse=True)):
            bar.advance()
    stored = {layer: name for of_pair in names.values() for layer, name in of_pair.items()}
    entries = [c.library.entry(name) for name in stored.values()]
    text, batch = c.text.held_out[CHOICE], c.recipe.data.micro_batch_size
    children = {"before": c.realised(picks), "after": c.realised(picks, stored)}
    kl = {name: each.kl for name, each in child_changes(c.parent.model, children, text, batch).items()}
    told = [{"layer": each.layer, "made": each.made, "trained": each.trained} for each in entries]
    # pairs that do better what their layers do may still miss more together, as single layers do
    worse = not kl["after"] <= kl["before"]
    write_json(folder / REFINED, {"pairs": told, "stored": {} if worse else stored, "kl": kl})
    result = f"{len(pairs)} pairs of layers, {len(missing)} trained now; KL {kl['before']:.4f} -> {kl['after']:.4f}"
    return f"{result}: the variants stay as they were" if worse else result


def read_refined(c: Context) -> dict[int, str]:
    """Return layer -> name in the library of its weights after the refinement."""
    return {int(layer): name for layer, name in c.read("refine", REFINED)["stored"].items()}


def _pairs(c: Context, picks: Picks) -> list[int]:
    """Return the first layers of pairs in which a variant with weights of its own is beside another layer."""
    firsts = range(0, len(picks) - 1, 2)
    return [n for n in firsts if any(c.variants[n + k][picks[n + k]].trained for k in (0, 1))]


def _names(c: Context, first: int, picks: Picks) -> dict[int, str]:
    """Return layer -> name in the library, of the refined variants of a pair."""
    pair = (first, first + 1)
    made = [c.hash(layer, c.variants[layer][picks[layer]]) for layer in pair]
    return {
        layer: hash_of({"pair": made, "place": layer - first, "tokens": c.part.refine_tokens})
        for layer in pair
        if c.variants[layer][picks[layer]].trained
    }


def refine_pair(c: Context, first: int, picks: Picks) -> None:
    """Train the variants of two layers together and store them; the parent's own layers stay as they are."""
    forward, local, layers = Forward(c.parent.model), c.part.local, range(first, first + 2)
    parts = {layer: part for layer in layers if (part := c.part_of(layer, picks[layer], forward))}
    tokens = count_of(c.part.refine_tokens, "puzzle.refine_tokens", c.origin)
    made, trained = imitate(
        forward,
        layers,
        {"pair": Chain(list(parts.values()))},
        {"pair": Training(tokens, local.batch, local.lr)},
        c.batches(tokens),
        c.text.held_out[CHOICE][:, :-1],
    )["pair"]
    for layer, name in _names(c, first, picks).items():
        c.library.save(Entry(layer, picks[layer], name, tokens, made, trained), parts[layer].tensors)
