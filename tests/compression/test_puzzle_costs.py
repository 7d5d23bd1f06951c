"""Puzzle's table of blocks: a row for each, measured once and kept; other machines and scenarios are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from nemotron_h.architecture.blocks.block import Block
from nemotron_h.compression.puzzle import costs as puzzle_costs
from nemotron_h.compression.puzzle.costs import BlockCost, measure_blocks, model_blocks, scaled_to, total
from nemotron_h.compression.puzzle.pipeline import costs as stage_of_costs
from nemotron_h.core.errors import UserError
from nemotron_h.inference import layer_costs
from nemotron_h.inference.model import GenerationModel
from nemotron_h.laws.shapes import model_named
from nemotron_h.planning.gpus import gpu
from nemotron_h.planning.latency import Latency, check_costs, read_layer_costs, roofline, write_layer_costs
from nemotron_h.schema.layer_costs import Scenario
from nemotron_h.schema.puzzle import CostSchema

PARENT = model_named("nemotron_h_tiny_heads")
SCENARIO = Scenario(batch=2, context=32, output=16)


def block(letter: str, **widths: int) -> Block:
    return PARENT.block(letter, widths)


BLOCKS = {
    "mamba": block("M"),
    "mamba of 8 heads": block("M", mamba_num_heads=8),
    "attention": block("*"),
    "attention of 2 heads": block("*", num_query_groups=2),
    "ffn": block("-"),
    "ffn of 256": block("-", ffn_hidden_size=256),
    "ffn again": block("-"),
}


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[GenerationModel]:
    """Stand in for timed turns: a nanosecond for each parameter of a layer, a millisecond for the ends; the models."""
    models: list[GenerationModel] = []

    def turn(model: GenerationModel, prompts: torch.Tensor, scenario: Scenario) -> tuple[float, float]:
        models.append(model)
        layers = sum(each.parameters for each in model.definition.blocks)
        return 1e-3 + 1e-9 * layers * scenario.context, 1e-3 + 1e-9 * layers

    monkeypatch.setattr(layer_costs, "_turn", turn)
    return models


def measure(path: Path, blocks: dict[str, Block] = BLOCKS, scenario: Scenario = SCENARIO, **options):
    return measure_blocks(blocks, options.pop("like", PARENT), scenario, path, turns=1, **options)


def test_costs_of_blocks_are_those_of_their_layers(timed: list[GenerationModel], tmp_path: Path) -> None:
    told: list[str] = []
    costs = measure(tmp_path / "costs.yaml", advance=told.append)
    assert told == list(BLOCKS)
    assert list(costs) == [*BLOCKS, "ends"]
    for name, each in BLOCKS.items():
        assert costs[name].decode == pytest.approx(1e-9 * each.parameters, rel=0.01)
        assert costs[name].prefill == pytest.approx(32e-9 * each.parameters, rel=0.01)
        assert costs[name].parameters == each.parameters
    assert costs["ends"] == BlockCost(1e-3, 1e-3, 2 * 8192 * 128 + 128, 0, 0)
    # two sequences of 48 tokens in float32: keys and values of 8 and 2 heads of 16; states of 16 heads of 16 x 32, and
    # three columns of 16 x 16 + 2 x 2 x 32 channels
    assert [each.kv_bytes for each in costs.values()] == [
        0,
        0,
        2 * 48 * 2 * 8 * 16 * 4,
        2 * 48 * 2 * 2 * 16 * 4,
        *[0] * 4,
    ]
    assert costs["mamba"].state_bytes == 2 * 4 * (16 * 16 * 32 + 3 * (256 + 128))
    assert costs["mamba of 8 heads"].state_bytes == 2 * 4 * (8 * 16 * 32 + 3 * (128 + 128))
    assert costs["attention"].state_bytes == costs["ffn"].kv_bytes == 0
    stacks = {model.definition.pattern for model in timed}
    assert stacks == {"M", "M" * 7, "*", "*" * 7, "-", "-" * 7}
    whole = total([*(costs[name] for name in ("mamba", "attention", "ffn")), costs["ends"]])
    assert whole.parameters == replace(PARENT, family="pruned", pattern="M*-").parameters


def test_a_table_grows_row_by_row_and_rows_are_not_measured_again(
    timed: list[GenerationModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "costs.yaml"

    def stop(name: str) -> None:
        if name == "attention":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(path, advance=stop)
    assert {kind: len(rows) for kind, rows in read_layer_costs(path).layers.items()} == {
        "mamba": 2,
        "attention": 1,
        "ends": 3,
    }
    timed.clear()
    costs = measure(path)
    assert {model.definition.pattern[0] for model in timed} == {"*", "-"}
    assert {model.definition.num_query_groups for model in timed if "*" in model.definition.pattern} == {2}
    before = path.read_text()
    monkeypatch.setattr(puzzle_costs, "time_layer", None)
    assert measure(path) == costs, "and nothing is measured"
    assert path.read_text() == before


def test_ends_are_those_of_the_vocabulary(timed: list[GenerationModel], tmp_path: Path) -> None:
    path, ffn = tmp_path / "costs.yaml", {"ffn": BLOCKS["ffn"]}
    measure(path, ffn)
    other = replace(PARENT, vocab_size=4096)
    assert measure(path, ffn, like=other)["ends"].parameters == other.other_parameters
    layers = read_layer_costs(path).layers
    assert [row.widths["vocab_size"] for row in layers["ends"]] == [8192, 4096]
    assert len(layers["ffn"]) == 1


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("machine", "name", "cuda"),
        ("machine", "processor", "another"),
        ("machine", "threads", 64),
        ("machine", "dtype", "bfloat16"),
        ("machine", "torch", "1.0"),
        ("machine", "engine", "vllm"),
        ("scenario", "batch", 1),
        ("scenario", "context", 31),
        ("scenario", "output", 0),
    ],
)
def test_other_machines_and_scenarios_are_refused(
    timed: list[GenerationModel], tmp_path: Path, part: str, key: str, value: object
) -> None:
    path = tmp_path / "costs.yaml"
    ffn = {"ffn": BLOCKS["ffn"]}
    measure(path, ffn)
    content = yaml.safe_load(path.read_text())
    here, content[part][key] = content[part][key], value
    if part == "machine":
        content["scenario"]["batch"] = 99  # the first difference is named
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError) as error:
        measure(path, ffn)
    assert f"{path}: {part}.{key} is {value} there and {here} here" in error.value.message
    assert "another file" in error.value.hint


def test_notes_may_differ(timed: list[GenerationModel], tmp_path: Path) -> None:
    path = tmp_path / "costs.yaml"
    costs = measure(path, command="nemotron-h puzzle")
    assert read_layer_costs(path).machine.command == "nemotron-h puzzle"
    assert measure(path, command="another") == costs


def test_tables_and_files_of_shapes_are_not_taken_for_each_other(timed: list[GenerationModel], tmp_path: Path) -> None:
    table, shapes = tmp_path / "table.yaml", tmp_path / "shapes.yaml"
    measure(table)
    with pytest.raises(UserError, match="is a table of blocks"):
        check_costs(read_layer_costs(table), PARENT, SCENARIO, str(table))
    write_layer_costs(shapes, layer_costs.measure(PARENT, [128], SCENARIO, "cpu", turns=1))
    assert "widths: {}" not in shapes.read_text()
    with pytest.raises(UserError, match="has layers of a model's widths"):
        measure(shapes)


def test_impossible_blocks_are_refused(timed: list[GenerationModel], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a block is called ends"):
        measure(tmp_path / "costs.yaml", {"ends": BLOCKS["ffn"]})
    rotary = model_named("nemotron_t_tiny").blocks[0]
    with pytest.raises(UserError, match=r"block turned has rotary_dim = 16; with all else as .* it would have 0"):
        measure(tmp_path / "costs.yaml", {"turned": rotary})
    assert not timed
    assert measure(tmp_path / "costs.yaml", {"turned": rotary}, like=model_named("nemotron_t_tiny"))["turned"]


def test_a_step_is_timed_at_the_middle_of_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    class Spy(layer_costs.Stepper):
        def step(self, tokens: torch.Tensor) -> torch.Tensor:
            lengths.append(int(self.states.lengths[0]))
            return super().step(tokens)

    monkeypatch.setattr(layer_costs, "Stepper", Spy)
    one = layer_costs.stack_of(BLOCKS["attention"], PARENT)
    (times,) = layer_costs.seconds([layer_costs.random_model(one, torch.float32, "cpu")], Scenario(1, 20, 10), turns=1)
    assert lengths[0] == 25
    assert min(times) > 0


def test_modelled_blocks_add_up_to_the_model() -> None:
    h100 = gpu("h100")
    names = {each: name for name, each in BLOCKS.items()}
    costs = model_blocks(BLOCKS, PARENT, SCENARIO, h100)
    whole = total([*(costs[names[each]] for each in PARENT.blocks), costs["ends"]])
    least = roofline(PARENT, h100, SCENARIO)
    assert whole.decode == pytest.approx(least.decode, rel=1e-12)
    # the last FFN reads the last token alone: no state comes after it
    last = costs["ffn"]
    assert whole.prefill - last.prefill + last.decode == pytest.approx(least.prefill, rel=1e-12)
    assert whole.parameters == PARENT.parameters
    assert costs["attention"].kv_bytes == 2 * 48 * 2 * 8 * 16 * 2, "in BF16"


def test_scaled_costs_make_the_model_s() -> None:
    costs, names = model_blocks(BLOCKS, PARENT, SCENARIO, gpu("h100")), {each: name for name, each in BLOCKS.items()}
    layers = [names[each] for each in PARENT.blocks]
    parts = total([*(costs[name] for name in layers), costs["ends"]])
    scaled = scaled_to(costs, parts, Latency(2.0, 0.5))
    whole = total([*(scaled[name] for name in layers), scaled["ends"]])
    assert (whole.prefill, whole.decode) == (pytest.approx(2.0, rel=1e-12), pytest.approx(0.5, rel=1e-12))
    for key in ("prefill", "decode"):
        ratios = [getattr(scaled[name], key) / getattr(costs[name], key) for name in costs]
        assert ratios == pytest.approx([ratios[0]] * len(ratios), rel=1e-12)
    assert whole.parameters == PARENT.parameters


def test_layers_that_do_not_add_up_to_the_model_are_told(tmp_path: Path) -> None:
    """Times of a busy machine: an error where a limit needs them, else a sentence."""

    def agreement(whole: float, **limits: float) -> str:
        part = SimpleNamespace(costs=CostSchema(**limits))
        return stage_of_costs._agreement(SimpleNamespace(origin="recipe x", part=part), whole, 2.0, tmp_path / "t.yaml")

    assert agreement(1.8, speedup=2.0) == "; the parent takes 1.8 s, 0.90 times what its layers took by themselves"
    assert "other work hid what layers cost; remove" in agreement(0.3, parameters="3M")
    with pytest.raises(UserError, match=r"recipe x: puzzle.costs.speedup needs times, and the parent takes 0.3 s") as e:
        agreement(0.3, parameters="3M", speedup=2.0)
    assert "t.yaml and run it again when the machine has no other work" in e.value.hint


def test_a_child_takes_about_what_its_blocks_take(tmp_path: Path, record_property) -> None:
    """Measured both: the ratio is reported, other work on the machine moves it."""
    narrow = {
        0: {"mamba_num_heads": 8},
        2: {"mamba_num_heads": 8},
        3: {"num_query_groups": 2},
        4: {"ffn_hidden_size": 256},
    }
    child = replace(PARENT, family="pruned", overrides=narrow)
    names = {each: name for name, each in BLOCKS.items()}
    costs = measure_blocks(BLOCKS, PARENT, SCENARIO, tmp_path / "costs.yaml", turns=2)
    predicted = total([*(costs[names[each]] for each in child.blocks), costs["ends"]])
    ((prefill, decode),) = layer_costs.seconds([layer_costs.random_model(child, torch.float32, "cpu")], SCENARIO, 2)
    for key, ratio in (("prefill", prefill / predicted.prefill), ("decode", decode / predicted.decode)):
        record_property(f"{key}, measured by predicted", round(ratio, 3))
        print(f"{key}: measured {ratio:.2f} times what its blocks take")
        assert 0.1 < ratio < 10
    assert predicted.parameters == child.parameters
