"""Every shipped model file: its counts, and the real Megatron module built from it without memory for its weights."""

from __future__ import annotations

import re

import pytest
import torch
from omegaconf import OmegaConf

from nemotron_h.architecture.definition import ModelDefinition, definition_from_dict
from nemotron_h.architecture.rank import padded_vocabulary
from nemotron_h.checkpoint.names import weights
from nemotron_h.core.errors import UserError
from nemotron_h.core.strict import typed
from nemotron_h.recipe.compose import configs_dir
from nemotron_h.schema.recipe import ModelSchema

#: billions of parameters that the family has to come out at
PUBLISHED = {
    "nemotron_h_4b": "4.489",
    "nemotron_h_8b": "8.101",
    "nemotron_h_47b": "46.79",  # as released
    "nemotron_h_47b_paper": "46.86",  # paper 3.5
    "nemotron_h_56b": "56.32",
    "falcon_h1_0.5b": "0.521411104",  # the checkpoints', and of the 1.5B, 3B and 34B their configurations'
    "falcon_h1_1.5b": "1.554859392",
    "falcon_h1_1.5b_deep": "1.554872208",
    "falcon_h1_3b": "3.149387264",
    "falcon_h1_7b": "7.585648736",
    "falcon_h1_34b": "33.642516224",
    "nano_30b_a3b": "31.577940288",  # the checkpoint's, its correction biases included; so the next
    "super_120b_a12b": "120.668707840",
    "ultra_550b_a55b": "549.3",
    "llama32_1b": "1.235814400",  # the checkpoints', and of the next two
    "qwen25_1.5b": "1.543714304",
    "smollm2_135m": "0.134515008",
}
#: billions of parameters that a token passes, embedding and output included, and of all with those of further tokens
PUBLISHED_ACTIVE = {
    "nano_30b_a3b": ("3.6", "31.577940288"),
    "lightning_30b_a3b": ("3.6", "32.913266240"),
    "super_120b_a12b": ("12.8", "123.611033088"),  # published as 12.7 and 120.6: truncated
    "ultra_550b_a55b": ("56.1", "560.5"),
}
NAMES = sorted(path.stem for path in (configs_dir() / "model").glob("*.yaml"))


def read(name: str) -> tuple[ModelSchema, ModelDefinition]:
    """A model file, typed and validated as a recipe's `model` is."""
    path = configs_dir() / "model" / f"{name}.yaml"
    model = typed(ModelSchema, OmegaConf.load(path), str(path))
    return model, definition_from_dict(OmegaConf.to_container(OmegaConf.structured(model)), str(path))


@pytest.mark.parametrize("name", NAMES)
def test_file(name: str) -> None:
    """The name is the file's, and every value but the name, the family and the counts says where it is from."""
    model, definition = read(name)
    assert definition.name == name
    written = OmegaConf.load(configs_dir() / "model" / f"{name}.yaml")
    if name != "nemotron_h_tiny":  # all ours, as its head says
        assert set(model.sources) == set(written) - {"name", "family", "expect", "sources"}


@pytest.mark.parametrize(("name", "billions"), PUBLISHED.items())
def test_published_counts(name: str, billions: str) -> None:
    digits = len(billions.partition(".")[2])
    assert f"{read(name)[1].parameters / 1e9:.{digits}f}" == billions


@pytest.mark.parametrize(("name", "active", "together"), [(name, *both) for name, both in PUBLISHED_ACTIVE.items()])
def test_published_counts_of_experts(name: str, active: str, together: str) -> None:
    made = read(name)[1]
    for text, count in ((active, made.active_parameters), (together, made.parameters + made.mtp_parameters)):
        assert f"{count / 1e9:.{len(text.partition('.')[2])}f}" == text


def test_tensors_of_the_checkpoints() -> None:
    """3.5 Lightning's index has 6,513 tensors: those of Nano 30B, of two layers more, and four between these."""
    layers = [weights(read(name)[1]) for name in ("nano_30b_a3b", "lightning_30b_a3b")]
    names = [[name for row in rows for name in row.theirs] for rows in layers]
    assert names[0] == names[1]
    assert len(set(names[0])) == len(names[0]) == 6243
    for name in ("gate.weight", "gate.e_score_correction_bias", "experts.127.up_proj.weight"):
        assert f"backbone.layers.1.mixer.{name}" in names[0]
    further = [
        name
        for block in read("lightning_30b_a3b")[1].mtp_blocks
        for row in block.tensors("", "")
        for name in row.theirs
    ]
    assert len(names[1]) + len(further) + len(("eh_proj", "enorm", "hnorm", "final_layernorm")) == 6513


@pytest.mark.parametrize(
    ("name", "layers", "attention"),
    [
        ("nemotron_h_8b", (52, 24, 4, 24), [7, 18, 29, 40]),
        ("nemotron_h_4b", (52, 24, 4, 24), [7, 18, 29, 40]),
        ("nemotron_h_56b", (118, 54, 10, 54), list(range(7, 107, 11))),
        ("nemotron_h_47b", (98, 45, 5, 48), [17, 38, 49, 60, 86]),
        ("nemotron_h_47b_paper", (98, 44, 5, 49), [17, 38, 49, 60, 86]),
        ("nemotron_t_8b", (64, 0, 32, 32), list(range(0, 64, 2))),
        ("nano_12b_v2", (62, 28, 6, 28), [7, 16, 25, 34, 43, 52]),
        ("mamba2_hybrid_8b", (56, 24, 4, 28), [10, 22, 33, 45]),
        ("mamba2_8b", (56, 56, 0, 0), []),
        ("nano_30b_a3b", (52, 23, 6, 0), [5, 12, 19, 26, 33, 42]),
        ("super_120b_a12b", (88, 40, 8, 0), [7, 16, 25, 36, 47, 58, 69, 78]),
    ],
)
def test_published_layers(name: str, layers: tuple[int, ...], attention: list[int]) -> None:
    """Counts of paper table 1 and 3.5 (and of 2508.14444 and 2406.07887), and where attention is."""
    made = read(name)[1]
    assert (made.num_layers, *(made.count(symbol) for symbol in "M*-")) == layers
    assert [index for index, symbol in enumerate(made.pattern) if symbol == "*"] == attention


def test_paper_47b_is_the_56b_without_the_dropped_layers() -> None:
    """Candidate 2 of paper 3.5, figure 11."""
    dropped = {7, 29, 73, 77, 79, 81, 83, 84, 86, 87, 88, 89, 90, 91, 93, 95, 96, 97, 99, 101}
    parent, child, released = (read(f"nemotron_h_{size}")[1].pattern for size in ("56b", "47b_paper", "47b"))
    assert child == "".join(symbol for index, symbol in enumerate(parent) if index not in dropped)
    assert [index for index, pair in enumerate(zip(child, released, strict=True)) if pair[0] != pair[1]] == [74]


def numbers_of(module: torch.nn.Module) -> int:
    """Parameters of a module, with correction biases of routers, which no gradient changes: buffers, for Megatron."""
    biases = [buffer for name, buffer in module.named_buffers() if name.endswith("expert_bias")]
    return sum(tensor.numel() for tensor in (*module.parameters(), *biases))


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("name", NAMES)
def test_megatron_module(name: str) -> None:
    """The module that training builds has the definition's parameters, layer by layer, and describes itself as it."""
    import fiddle

    from nemotron_h.training.stages.pretrain import model_config

    model, definition = read(name)
    if definition.planned_only():
        pytest.skip("can be planned and not trained")
    if definition.has_experts and definition.parameters > 1e8:
        pytest.skip("routers have memory from the start; the tiny model is built with all of it")
    config = fiddle.build(model_config(model, seq_length=8192, init_seed=1))
    with torch.device("cpu" if definition.has_experts else "meta"):
        module = config.configure_model(None)
    assert sum(p.numel() for p in module.parameters() if not p.is_meta) < 1e7, "weights were given memory"
    matrices = 1 if definition.tied_embeddings else 2
    padding = matrices * (padded_vocabulary(definition, 1) - definition.vocab_size) * definition.hidden_size
    assert numbers_of(module) == definition.parameters + padding
    by_layer = [numbers_of(layer) for layer in module.decoder.layers]
    assert by_layer == [definition.block(symbol).parameters for symbol in definition.pattern]
    described = config.definition()
    described.validate_structure(name)
    numbers = ("expect", "sources")
    assert {k: v for k, v in vars(described).items() if k not in numbers} == {
        k: v for k, v in vars(definition).items() if k not in numbers
    }


@pytest.mark.parametrize("name", NAMES)
def test_layout_of_the_paper(name: str) -> None:
    """Tensor parallelism over 8 (paper 2.4) fits all but the tiny models; 16 fits none, and 8 is what is proposed."""
    definition = read(name)[1]
    if name.endswith(("_h_tiny", "_tiny_heads", "_4m")) or definition.family in ("falcon_h1", "llama"):
        pytest.skip("one to three groups: made for two cores, or for others, or Falcon-H1's (`test_multipliers.py`)")
    if definition.has_experts:
        assert min(definition.num_query_groups, definition.mamba_num_groups) == 2
        pytest.skip("two key-value heads, which tensor parallelism splits over two ranks; experts are split otherwise")
    definition.validate_tensor_parallel(8, name)
    with pytest.raises(UserError) as error:
        definition.validate_tensor_parallel(16, name)
    assert re.match("nearest: 8; ", error.value.hint)
