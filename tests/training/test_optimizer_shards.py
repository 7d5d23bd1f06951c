"""Each rank saves the optimizer's state that it holds, and whichever ranks load it take what they need of it."""

from __future__ import annotations

import pytest
from small_run import Small, without_last

pytestmark = pytest.mark.slow

#: tensor-, pipeline- and data-parallel sizes, each continued from the one before: every size goes up and down
CHAIN = ((1, 1, 1), (2, 1, 2), (1, 2, 1), (1, 1, 2), (2, 1, 1))
#: a vocabulary that has more padding on two tensor-parallel ranks: 768 rows in place of 640
PADDED = (("vocab_size: 512", "vocab_size: 640"), ("parameters: 163376", "parameters: 179760"))


def test_states_are_the_same_after_a_change_of_the_layout(small: Small) -> None:
    """Write what each layout has loaded, before a step, and compare it with what the layout before has written."""
    run, recipe = small.run_dir("chain"), small.variant("chain", *PADDED)
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


def test_an_optimizer_that_is_not_sharded_is_refused(small: Small, straight: dict[int, dict]) -> None:
    without_last(small, "straight", "unsharded")
    recipe = small.variant(
        "unsharded", ("precision: bf16", "precision: fp32\nparallel: {distributed_optimizer: false}")
    )
    done = small.train("unsharded", recipe=recipe, check=False)
    assert done.returncode == 2
    assert "step-000008 was written with parallel.distributed_optimizer = true, which is false now" in done.stderr
