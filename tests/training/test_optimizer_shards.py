"""Each rank saves the optimizer's state that it holds, and whichever ranks load it take what they need of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from small_run import Small, without_last

from nemotron_h.checkpoint.folders import INDEX
from nemotron_h.checkpoint.index import read_index
from nemotron_h.planning import saves
from nemotron_h.planning.layouts import layout_of
from nemotron_h.recipe.checks import definition_of
from nemotron_h.recipe.compose import compose

pytestmark = pytest.mark.slow

#: tensor-, pipeline- and data-parallel sizes, each continued from the one before: every size goes up and down
CHAIN = ((1, 1, 1), (2, 1, 2), (1, 2, 1), (1, 1, 2), (2, 1, 1))
#: a vocabulary that has more padding on two tensor-parallel ranks, 768 rows in place of 640, and a linear layer, which
#: each of them holds whole
CHANGES = (
    ("vocab_size: 512", "vocab_size: 640"),
    ("pattern: M-M*-", "pattern: M-ML*-"),
    ("family: nemotron_h", "family: pruned"),
    ("parameters: 163376", "linear: 1, parameters: 183920"),
)


def test_states_are_the_same_after_a_change_of_the_layout(small: Small) -> None:
    """Write what each layout has loaded, before a step, and compare it with what the layout before has written."""
    run, recipe = small.run_dir("chain"), small.variant("chain", *CHANGES)
    pairs = []
    for number, (tensor, pipeline, data) in enumerate(CHAIN):
        last = 3 + number
        options = [
            f"trainer.strategy.tensor_model_parallel_size={tensor}",
            f"trainer.strategy.pipeline_model_parallel_size={pipeline}",
            f"trainer.devices={tensor * pipeline * data}",
            f"trainer.max_steps={last}",
            "log.ckpt.keep=-1",
        ]
        if number:
            copy = run / f"copy-{number}"
            options.append(f"copy={copy}")
            pairs.append((copy, run / f"checkpoints/step-{last - 1:06d}"))
        small.train("chain", *options, ranks=tensor * pipeline * data, recipe=recipe)
    assert small.same_checkpoints(*pairs)
    for number, sizes in enumerate(CHAIN):
        check_plan(recipe, run / f"checkpoints/step-{3 + number:06d}/weights", *sizes)


def check_plan(recipe: Path, weights: Path, tensor: int, pipeline: int, data: int) -> None:
    """Compare what a layout has written with what `nemotron-h plan` says of it."""
    composed = compose(recipe)
    definition = definition_of(composed, "the test")
    layout = replace(layout_of(composed), tensor=tensor, pipeline=pipeline, data=data, backend="cpu")
    files, places = list(weights.glob("*.distcp")), read_index(weights).storage_data.values()
    assert len(files) == layout.ranks
    pieces = saves.pieces(definition, layout)
    assert len(places) <= pieces <= 1.02 * len(places)  # a range may end where a tensor does
    assert (weights / INDEX).stat().st_size == pytest.approx(pieces * saves.INDEX_BYTES, rel=0.05)
    written = [sum(f.stat().st_size for f in files if f.name.startswith(f"__{rank}_")) for rank in range(layout.ranks)]
    planned = max(saves.rank_bytes(definition, layout, stage) for stage in range(pipeline))
    # torch.save writes 1 to 3 KiB beside the numbers of a tensor, however small
    assert planned < max(written) < planned + 3 * 1024 * len(places)


def test_an_optimizer_that_is_not_sharded_is_refused(small: Small, straight: dict[int, dict]) -> None:
    without_last(small, "straight", "unsharded")
    recipe = small.variant(
        "unsharded", ("precision: bf16", "precision: fp32\nparallel: {distributed_optimizer: false}")
    )
    done = small.train("unsharded", recipe=recipe, check=False)
    assert done.returncode == 2
    assert "step-000008 was written with parallel.distributed_optimizer = true, which is false now" in done.stderr
