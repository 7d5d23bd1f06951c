"""The house is what docs/architecture.md says: rooms on floors, imports that go down, walls that stay."""

from __future__ import annotations

import ast
import graphlib
import re
import runpy

import house
import pytest

from nemotron_h.architecture.blocks.registry import KINDS

YAML = {"configs", "data_blends", "recipes"}  # folders beside the library


def test_imports_go_down() -> None:
    floor = {name: number for number, names in enumerate(house.FLOORS) for name in names}
    assert {house.room(module) for module in house.modules()} == {*floor, "__init__", "__main__"}
    upward = {
        f"{above} imports {below}": sorted(files)
        for (above, below), files in house.edges().items()
        if above != "__main__" and below not in YAML and floor[above] <= floor[below]
    }
    assert not upward


def test_any_module_can_be_imported_first() -> None:
    """A job imports those first that its task names, in an order of their own."""
    graphlib.TopologicalSorter({module: house.imported(module) for module in house.modules()}).prepare()


def test_rooms_know_what_they_may() -> None:
    wrong = []
    for module, file in house.modules().items():
        packages = {name.split(".")[0] for name in house.imports(file)}
        if house.room(module) in house.WITHOUT_TORCH and "torch" in packages:
            wrong.append(f"{module} imports torch")
        if packages & house.FRAMEWORKS and house.room(module) not in house.KNOW_FRAMEWORKS:
            wrong.append(f"{module} imports {', '.join(sorted(packages & house.FRAMEWORKS))}")
    assert wrong == ALLOWED


#: data modules and tokenizers are NeMo's own kinds; ops hands squared ReLU to Transformer Engine
ALLOWED = [
    "data.feed.datamodule imports nemo",
    "data.feed.prepared_module imports lightning, megatron, nemo",
    "data.tokenizer imports nemo",
    "ops.activation imports transformer_engine",
]


def test_kinds_are_compared_in_the_block_folders_alone() -> None:
    """A new kind of layer is two files: nothing else asks which kind a layer is, or knows a kind by its class."""
    letters_and_names = {*KINDS, *(kind.name for kind in KINDS.values())}
    classes = {f"nemotron_h.{room}.blocks.{kind.name}" for room in ("architecture", "model") for kind in KINDS.values()}
    wrong = []
    for module, file in house.modules().items():
        if ".blocks." in module:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            values = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
            constants = {value.value for value in values if isinstance(value, ast.Constant)}
            if constants & letters_and_names:
                wrong.append(f"{module}: {ast.unparse(node)}")
            if isinstance(node, ast.ImportFrom) and node.module in classes:
                wrong.append(f"{module}: imports {node.module}")
    assert wrong == OTHER_MEANINGS


#: what looks like a letter of a pattern and is something else
OTHER_MEANINGS = ["cli.generate: file == '-'"]


#: stage -> its builder, and where the modules are that are this stage's own
STAGES = {
    "pretrain": ("training.stages.pretrain", ()),
    "sft": ("training.stages.sft", ("training.stages.sft", "data.feed.sft_module", "recipe.stages.sft")),
    "preference": (
        "training.stages.preference.stage",
        ("training.stages.preference", "training.callbacks.preference", "data.feed.preference", "recipe.stages.pref"),
    ),
    "distill": ("training.stages.distillation.stage", ("training.stages.distillation", "recipe.stages.distill")),
}
#: preferences are learnt of conversations, as sft learns them
BUILT_ON = {"preference": {"sft"}}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_loads_none_of_the_others(stage: str) -> None:
    """Through `nemo`, too, which knows `llm distill` by its function alone."""
    loaded = house.loads(STAGES[stage][0]) | house.loads("launch.factories")
    assert len(loaded) > 50
    others = {other: own for other, (_, own) in STAGES.items() if other != stage}
    for other in others.keys() - BUILT_ON.get(stage, set()):
        assert {m for m in loaded if m.startswith(others[other])} <= {"training.stages.distillation.command"}, other


def test_files_are_short() -> None:
    lengths = {module: len(file.read_text().splitlines()) for module, file in house.modules().items()}
    assert not {module for module, length in lengths.items() if length > 500}


def test_the_document_shows_this_house() -> None:
    docs = house.LIBRARY.parents[1] / "docs"
    script = runpy.run_path(str(docs / "draw_house.py"))
    assert script["PICTURE"].read_text() == script["svg"](), "run: python docs/draw_house.py"
    rows = re.findall(r"^\| `(\w+)` \|", (docs / "architecture.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(room for floor in house.FLOORS for room in floor)
