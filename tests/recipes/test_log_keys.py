"""Trackers in a recipe, by their key of today and by former ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemotron_h.core.errors import UserError
from nemotron_h.recipe import former_keys
from nemotron_h.recipe.compose import compose, trace
from nemotron_h.recipe.overrides import split


@pytest.mark.parametrize(
    ("settings", "trackers"),
    [
        ((), ["tensorboard"]),
        (("log.trackers=[]",), []),
        (("log.trackers=[wandb,mlflow]", "log.wandb.project=p"), ["wandb", "mlflow"]),
        (("log.tensorboard=null",), []),
        (("log.tensorboard=true",), ["tensorboard"]),
    ],
)
def test_trackers_by_their_names(settings: tuple[str, ...], trackers: list[str]) -> None:
    values, others = split(settings)
    recipe = compose("nemotron_h_tiny", values)
    assert (recipe.log.trackers, others) == (trackers, [])
    assert recipe.log.project == ("p" if len(settings) > 1 else None)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (("log.trackers=[wanbd]",), "log.trackers = 'wanbd'\nDid you mean wandb? Known: tensorboard, wandb, mlflow."),
        (("log.trackers=[wandb,wandb]",), "names one twice"),
        (("log.trackers=wandb",), "log.trackers is not a list\nwrite it in brackets"),
        (("log.project=p",), "log.project is unused"),
        (("log.tensorboard=perhaps",), "log.tensorboard: 'perhaps' is not a boolean"),
        (("log.tensorboard=false", "log.trackers=[wandb]"), "log.tensorboard=false and log.trackers=[wandb] set one"),
        (("log.wandb=null", "log.trackers=[wandb]"), "log.wandb=null and log.trackers=[wandb] set one value"),
        (("log.wandb.name=mine",), "log.wandb.name=mine: trackers are made of log.trackers and log.project"),
    ],
)
def test_trackers_that_cannot_be(settings: tuple[str, ...], problem: str) -> None:
    with pytest.raises(UserError) as caught:
        compose("nemotron_h_tiny", split(settings)[0])
    assert problem in str(caught.value)


def test_the_former_name_of_trackers_in_files(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """A later file wins, whichever name each has; the origin is the line of the former one."""
    parent, child = tmp_path / "parent.yaml", tmp_path / "child.yaml"
    parent.write_text("defaults: [/nemotron_h_tiny/pretrain, _self_]\nlog: {trackers: [wandb]}\n")
    child.write_text(
        'defaults: [parent, _self_]\nlog:\n  tensorboard: false\nsources: {log.tensorboard: "ours: none"}\n'
    )
    former_keys._say.cache_clear()
    traced = trace(str(child))
    assert traced.recipe.log.trackers == []
    assert (traced.origins["log.trackers"].file, traced.origins["log.trackers"].line) == (child, 3)
    assert traced.sources["log.trackers"] == "ours: none"
    note = "note: log.tensorboard is now log.trackers; false is read as []\n"
    assert trace(str(child)) == traced
    assert capfd.readouterr().err == note, "once"
    child.write_text("defaults: [parent, _self_]\nlog: {tensorboard: false, trackers: [mlflow]}\n")
    with pytest.raises(UserError, match="set one value"):
        trace(str(child))
