"""Out to a Hugging Face folder and back: every tensor bit for bit, whatever wrote the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from forks import FORKS
from safetensors.torch import load_file
from save_checkpoint import save
from small_model import VOCABULARY, pure_config, small_config, small_model, tokens

from nemotron_h.checkpoint.definition import read_definition
from nemotron_h.checkpoint.names import weights
from nemotron_h.checkpoint.reader import WeightFile, read_record
from nemotron_h.export import gguf_writer, hf_reader, hf_writer
from nemotron_h.inference.model import load_model

pytestmark = pytest.mark.usefixtures("megatron")

NANO_4B = "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-"
CONFIGS = {
    "groups_1": lambda **changes: small_config(1, **changes),
    "groups_8": lambda **changes: small_config(8, **changes),
    "pruned": lambda **changes: small_config(pattern="MM*-M--", ffn_hidden_size=56, **changes),
    "nano_4b": lambda **changes: small_config(pattern=NANO_4B, mamba_head_dim=80, **changes),
    "mamba2": lambda **changes: pure_config("M", **changes),
    "experts": lambda **changes: pure_config("E", **changes),
}


def export(checkpoint: Path, out: Path, dtype: torch.dtype | None = None, shard_size: int = 10**9) -> Path:
    """As `nemotron-h export hf --no-tokenizer` does."""
    hf_writer.write(hf_writer.plan(checkpoint, None, dtype, shard_size), out, None)
    return out


def read_all(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every weight of a checkpoint in its stored dtype, by our names, without padding."""
    file = WeightFile(checkpoint)
    tensors = {name: torch.empty(shape, dtype=file.dtypes[name]) for name, shape in file.shapes.items()}
    file.read(tensors)
    padded = ("embedding.word_embeddings.weight", "output_layer.weight")
    return {name: tensor[:VOCABULARY] if name in padded else tensor for name, tensor in tensors.items()}


def theirs(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a Hugging Face folder."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_tensor_comes_back(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = small_model(CONFIGS[kind](dtype=dtype))
    first = save(model, tmp_path / "first")
    folder = export(first, tmp_path / "hf", shard_size=20_000)
    assert len(list(folder.glob("*.safetensors"))) > 1
    if kind == "nano_4b":
        assert len(theirs(folder)) == 263  # as the released checkpoint, by its card
    hf_reader.write(hf_reader.examine(folder), tmp_path / "second")
    before, after = read_all(first), read_all(tmp_path / "second")
    assert before.keys() <= after.keys()
    assert all(after[name].dtype == tensor.dtype for name, tensor in before.items())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    again = export(tmp_path / "second", tmp_path / "again")
    a, b = theirs(folder), theirs(again)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert json.loads((folder / "config.json").read_text()) == json.loads((again / "config.json").read_text())


@pytest.mark.parametrize("make", [small_config, lambda: pure_config("E")], ids=["hybrid", "experts"])
def test_table_has_every_weight_of_a_checkpoint(make, tmp_path: Path) -> None:
    checkpoint = save(small_model(make()), tmp_path / "c")
    definition = read_definition(read_record(checkpoint), "test")
    assert {name for row in weights(definition) for name in row.ours} == set(WeightFile(checkpoint).shapes)
    stated = sum(torch.Size(shape).numel() for row in weights(definition) for shape in row.theirs.values())
    assert stated == definition.parameters


def test_files_are_as_large_as_asked(tmp_path: Path) -> None:
    checkpoint = save(small_model(small_config()), tmp_path / "c")
    limit = 40_000
    sharded = export(checkpoint, tmp_path / "sharded", shard_size=limit)
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    sizes = {}
    for file in sorted(sharded.glob("*.safetensors")):
        tensors = load_file(file)
        assert {name for name, place in index["weight_map"].items() if place == file.name} == set(tensors)
        sizes[file.name] = sum(tensor.nbytes for tensor in tensors.values())
        assert sizes[file.name] <= limit or len(tensors) == 1
    assert sum(sizes.values()) == index["metadata"]["total_size"]
    single = export(checkpoint, tmp_path / "single")
    assert [file.name for file in single.glob("*.safetensors")] == ["model.safetensors"]
    assert not (single / "model.safetensors.index.json").exists()
    a, b = theirs(sharded), theirs(single)
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_other_dtype(tmp_path: Path) -> None:
    """Rounded once; what the scan's decays come from stays exact."""
    checkpoint = save(small_model(small_config()), tmp_path / "c")
    exact, rounded = (theirs(export(checkpoint, tmp_path / str(d), d)) for d in (torch.float32, torch.bfloat16))
    for name, tensor in rounded.items():
        keeps = name.rpartition(".")[2] in ("A_log", "D", "dt_bias")
        assert tensor.dtype == (torch.float32 if keeps else torch.bfloat16)
        assert torch.equal(tensor, exact[name].to(tensor.dtype))
    assert json.loads((tmp_path / "torch.bfloat16" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("make", [small_config, lambda: pure_config("E")], ids=["hybrid", "experts"])
def test_imported_checkpoint_trains_and_generates(make, tmp_path: Path) -> None:
    """megatron-core loads it into the training model; generation reads it; both compute what the first model did."""
    from megatron.core import dist_checkpointing

    config = make()
    model = small_model(config).eval()
    folder = export(save(model, tmp_path / "first"), tmp_path / "hf")
    hf_reader.write(hf_reader.examine(folder), tmp_path / "second")
    other = config.configure_model(None).eval()
    state = dist_checkpointing.load(other.sharded_state_dict(prefix="module."), str(tmp_path / "second" / "weights"))
    other.load_state_dict({name.removeprefix("module."): tensor for name, tensor in state.items()})
    ids = tokens(2, 40)
    with torch.no_grad():
        expected = model(input_ids=ids)[..., :VOCABULARY]
        assert torch.equal(other(input_ids=ids)[..., :VOCABULARY], expected)
    generation = load_model(tmp_path / "second")
    actual = generation.logits(generation.extend(ids, generation.new_states(2, 40)))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_definition_file_loads(tmp_path: Path) -> None:
    import yaml

    from nemotron_h.architecture.definition import definition_from_dict

    folder = export(save(small_model(CONFIGS["pruned"]()), tmp_path / "first"), tmp_path / "My Model-8B")
    hf_reader.write(hf_reader.examine(folder), tmp_path / "second")
    values = yaml.safe_load((tmp_path / "second" / "model.yaml").read_text())
    definition = definition_from_dict(values, "model.yaml")
    assert (definition.name, definition.pattern, definition.ffn_hidden_size) == ("my_model_8b", "MM*-M--", 56)
    assert values["expect"]["parameters"] == definition.parameters


@pytest.fixture(scope="module")
def layouts(megatron: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of one rank and of two of each kind; initial weights do not depend on the layout."""
    folder = tmp_path_factory.mktemp("layouts")
    worker = Path(__file__).parents[1] / "inference" / "save_checkpoint.py"
    FORKS.launch(worker, str(folder), "tp2", "pp2", folder=folder, ranks=2)
    save(small_config().configure_model(None), folder / "one")
    return {name: folder / name for name in ("one", "tp2", "pp2")}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_exports_do_not_depend_on_the_layout(layouts: dict[str, Path], tmp_path: Path, layout: str) -> None:
    """Every file, byte for byte."""
    written = []
    for name in ("one", layout):
        folder = export(layouts[name], tmp_path / name)
        gguf_writer.write(gguf_writer.plan(layouts[name], None, "q8_0"), folder / "model.gguf")
        written.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert written[0].keys() == written[1].keys() > {"model.safetensors", "model.gguf", "config.json"}
    assert [name for name, content in written[0].items() if written[1][name] != content] == []
