"""Cost of checkpoints in `nemotron-h plan`. Files, index and shards of real ones: tests/training."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nemotron_h.cli.main import app
from nemotron_h.core.errors import UserError
from nemotron_h.planning import saves
from nemotron_h.planning.gpus import gpu, known_gpus
from nemotron_h.planning.plan import make_plan
from nemotron_h.planning.saves import save_cost
from nemotron_h.recipe.compose import compose

PAGE = Path(__file__).parents[2] / "docs" / "storage.md"
LIBRARY = Path(saves.__file__).parents[1]


def cost(name: str, *overrides: str, gpu_name: str = "h100", storage: float | None = None) -> saves.SaveCost:
    return make_plan(compose(name, list(overrides)), gpu_name, storage=storage).saves


def test_the_56b_on_6144_gpus() -> None:
    """2 bytes of a weight and 12 of its states, over as many ranks; Llama 3's failures, scaled to the GPUs."""
    found = cost("nemotron_h_56b")
    share = 56.32e9 * 14 / 6144
    assert found.rank_bytes == pytest.approx(share, rel=0.01)
    assert found.node_bytes == 8 * found.rank_bytes
    assert found.nodes * found.node_bytes == pytest.approx(found.bytes, rel=0.01)
    assert (found.nodes, found.files) == (768, 6144)
    assert found.copy_seconds == pytest.approx(share / 50e9, rel=1e-3)
    assert found.stopped_seconds == 0.2, "the copy ends beside a step"
    assert replace(found, copy_seconds=found.step_seconds + 1).stopped_seconds == pytest.approx(1.2)
    assert found.write_seconds == pytest.approx(8 * share / 1e9, rel=0.01)
    # 419 in 54 days of 16,384 GPUs are one in 3.09 hours, and of 6,144 GPUs one in 8.25
    assert found.failure_seconds / 3600 == pytest.approx(8.25, abs=0.01)
    young = math.sqrt(2 * found.stopped_seconds * found.failure_seconds)
    assert found.young_steps == math.ceil(young / found.step_seconds)
    assert found.index_bytes < 100 * 2**20, "the index does not grow with parameters times ranks"


def test_the_index_grows_with_ranks_and_not_with_ranks_times_tensors() -> None:
    few, many = (cost("nemotron_h_56b", f"parallel.nodes={nodes}") for nodes in (96, 768))
    assert few.index_bytes < many.index_bytes < 8 * few.index_bytes


def test_the_interval_under_one_percent_is_the_shortest() -> None:
    for name in ("nemotron_h_56b", "nemotron_h_8b", "nemotron_h_8b/sft_lora"):
        found = cost(name)
        assert replace(found, every_steps=found.least_steps).share <= saves.SHARE
        assert replace(found, every_steps=found.least_steps - 1).share > saves.SHARE, name


def test_one_gpu_writes_the_whole_checkpoint() -> None:
    found = cost("nemotron_h_100m", "parallel.devices=1")
    assert found.rank_bytes == pytest.approx(found.bytes, rel=0.01)
    assert (found.nodes, found.files) == (1, math.ceil(found.rank_bytes / 2**28))
    assert cost("nemotron_h_8b", "parallel.nodes=1", "parallel.tensor=8").files == 8 * 8


def test_files_are_as_large_as_the_writer_makes_them() -> None:
    stated = f"\nFILE_BYTES, MOST_FILES = 1 << {saves.FILE_BYTES.bit_length() - 1}, {saves.MOST_FILES}\n"
    assert stated in LIBRARY.joinpath("platform", "checkpoint_writer.py").read_text()  # its import is Megatron's


def test_the_storage_s_bandwidth_decides_the_write() -> None:
    slow, fast = (cost("nemotron_h_8b", storage=storage) for storage in (0.5, 4.0))
    assert slow.write_seconds == pytest.approx(8 * fast.write_seconds)
    assert slow.stopped_seconds == fast.stopped_seconds
    assert slow.lost_seconds - fast.lost_seconds == pytest.approx(slow.write_seconds - fast.write_seconds)
    assert slow.needed_gb_s == pytest.approx(slow.bytes / 1e9 / (500 * slow.step_seconds))
    with pytest.raises(UserError, match="--storage = 0"):
        cost("nemotron_h_8b", storage=0.0)


def test_what_is_too_short_or_too_small_is_a_warning() -> None:
    fits = cost("nemotron_h_8b")
    assert fits.warnings == []
    (slow,) = cost("nemotron_h_8b", "checkpoint.every_steps=3", storage=0.01).warnings
    assert "checkpoint.every_steps = 3 is 0.37 s, and a write takes 15 s" in slow
    plan = make_plan(compose("nemotron_h_8b"))
    small = replace(gpu("h100"), node_memory_gb=0.1)
    arguments = plan.definition, plan.layout, small, fits.bytes, fits.step_seconds, fits.every_steps
    (memory,) = save_cost(*arguments).warnings
    assert memory == "a node stages 0.14 GiB and has 95.4 MiB of memory: take more GPUs"
    assert save_cost(*arguments[:2], replace(small, node_memory_gb=None), *arguments[3:]).warnings == []


def test_blocks_count_their_tensors() -> None:
    kinds = {}
    for name in ("nemotron_h_8b", "nemotron_t_8b", "mamba2_8b"):
        kinds |= {block.letter: block for block in make_plan(compose(name)).definition.blocks}
    assert sorted(kinds) == ["*", "-", "M"]
    for block in kinds.values():
        norm, *inside = [len(row.ours) for row in block.tensors("", "")]
        assert (norm, sum(inside)) == (1, block.tensor_count()), block


def test_every_gpu_has_a_link_and_the_rates_their_sources() -> None:
    assert all(gpu(name).to_host_gb_s > 0 for name in known_gpus())
    text = (Path(__file__).parents[2] / "configs" / "gpus.yaml").read_text()
    assert "\n  to_host_gb_s:\n" in text
    assert "\n  node_memory_gb:\n" in text


def test_the_page_shows_what_the_command_prints() -> None:
    printed = CliRunner().invoke(app, ["plan", "nemotron_h_56b"]).output.splitlines()
    begin = printed.index("A checkpoint")
    section = printed[begin : printed.index("", begin)]
    assert len(section) == 10
    page = " ".join(PAGE.read_text().split())
    for line in section:
        assert " ".join(line.split()) in page, line
