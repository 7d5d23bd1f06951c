"""A run that starts from a checkpoint of the Hub: rank 0 fetches it, the others wait, and a resume asks for nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_run import Small

sys.path.insert(0, str(Path(__file__).parents[1] / "hub"))
from hub_server import Hub, Repo
from small_folder import model_files

from nemotron_h.recipe.checks import definition_of
from nemotron_h.recipe.compose import compose

WORKER = Path(__file__).with_name("hub_worker.py")


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.stop()


@pytest.mark.slow
def test_two_ranks_start_from_the_hub(small: Small, hub: Hub, tmp_path: Path) -> None:
    definition = definition_of(compose(f"{small.recipe('hub')}"), "test")
    repo = hub.repos["models/org/Small-163K"] = Repo(model_files(definition))
    named = f"init: {{checkpoint: hub:org/Small-163K@{repo.commit()}}}"
    recipe = small.variant(
        "hub",
        ("tokens: 6144 # 12 steps", f"tokens: 1024\n{named}"),
        ("warmup_tokens: 1024", "warmup_tokens: 512"),
        ("every_steps: 4", "every_steps: 1"),
    )
    options = (f"hub={hub.url}", f"cache={tmp_path}", "trainer.devices=2")
    done = small.train("hub", *options, recipe=recipe, program=WORKER, ranks=2)
    assert f"weights from {tmp_path}/hub/checkpoints/org--Small-163K@{repo.commit()}" in done.stdout
    loaded = [path.rpartition("/")[2] for method, path, *_ in hub.log if method == "GET" and "/resolve/" in path]
    assert sorted(loaded) == sorted(path for path in repo.files if not path.startswith(("nemo/", "modeling")))
    hub.log.clear()
    done = small.train("hub", *options, recipe=recipe, program=WORKER, ranks=2)
    assert "is complete" in done.stdout
    assert not hub.log
