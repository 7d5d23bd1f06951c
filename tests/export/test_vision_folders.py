"""Image encoders of others in front of a language model, and a model that reads images as a folder of others' types."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from export_command import invoke
from safetensors.torch import load_file, save_file
from small_model import relative_error
from vision_model import ENCODERS, TILE, internvit, tiles, vision_config, vision_model, vision_schema

from nemotron_h.checkpoint.definition import read_definition
from nemotron_h.checkpoint.reader import WeightFile, find_checkpoint, read_record
from nemotron_h.core.errors import UserError
from nemotron_h.export.vision_config import from_config
from nemotron_h.ops.tiles import MEAN, STD, pixel_shuffle
from nemotron_h.recipe.compose import read_encoder

#: from transformers' names to those of the released folders, written as these are documented
RELEASED = {
    r"^embeddings.cls_token": "embeddings.class_embedding",
    r"^embeddings.position_embeddings": "embeddings.position_embedding",
    r"^embeddings.patch_embeddings.projection": "embeddings.patch_embedding",
    r"^encoder.layer.(\d).attention.projection_layer": r"encoder.layers.\1.attn.proj",
    r"^encoder.layer.(\d).attention.([qk])_norm": r"encoder.layers.\1.attn.\2_norm",
    r"^encoder.layer.(\d).mlp": r"encoder.layers.\1.mlp",
    r"^encoder.layer.(\d).layernorm_before": r"encoder.layers.\1.norm1",
    r"^encoder.layer.(\d).layernorm_after": r"encoder.layers.\1.norm2",
    r"^encoder.layer.(\d).lambda_": r"encoder.layers.\1.ls",
}


def read(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors, in their stored dtypes."""
    file = WeightFile(find_checkpoint(checkpoint))
    tensors = {name: torch.empty(shape, dtype=file.dtypes[name]) for name, shape in file.shapes.items()}
    file.read(tensors)
    return tensors


@pytest.fixture(scope="module", params=ENCODERS)
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder as transformers saves it, beside the same as it is released."""
    widths = vision_schema(request.param)
    torch.manual_seed(0)
    model = internvit(widths)
    for parameter in model.parameters():
        parameter.data.normal_()
    root = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(root / "saved")
    state, released = model.state_dict(), {}
    for name, tensor in state.items():
        if match := re.match(r"encoder\.layer\.(\d)\.attention\.q_proj\.(weight|bias)", name):
            parts = [state[name.replace("q_proj", f"{each}_proj")] for each in "qkv"]
            released[f"encoder.layers.{match[1]}.attn.qkv.{match[2]}"] = torch.cat(parts)
        elif not re.search("[kv]_proj", name):
            own = next((re.sub(a, b, name) for a, b in RELEASED.items() if re.search(a, name)))
            released[own] = tensor
    (root / "released").mkdir()
    save_file({name: tensor.contiguous() for name, tensor in released.items()}, root / "released/model.safetensors")
    config = {
        "architectures": ["InternVisionModel"],
        "auto_map": {"AutoConfig": "configuration_intern_vit.InternVisionConfig"},
        "model_type": "intern_vit_6b",
        "attention_dropout": 0.0,
        "drop_path_rate": 0.0,
        "dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": widths.hidden_size,
        "image_size": TILE,
        "initializer_factor": 0.1,
        "initializer_range": 1e-10,
        "intermediate_size": widths.ffn_hidden_size,
        "layer_norm_eps": 1e-6,
        "norm_type": {"layernorm": "layer_norm", "rmsnorm": "rms_norm"}[widths.norm],
        "num_attention_heads": widths.num_attention_heads,
        "num_channels": 3,
        "num_hidden_layers": widths.num_layers,
        "patch_size": widths.patch_size,
        "qk_normalization": widths.qk_norm,
        "qkv_bias": widths.qkv_bias,
        "torch_dtype": "float32",
        "transformers_version": "4.37.2",
        "use_flash_attn": True,
    }
    (root / "released/config.json").write_text(json.dumps(config))
    return root


def test_an_encoder_of_both_types_stands_before_a_language_model(run: Path, encoder: Path, tmp_path: Path) -> None:
    """It computes what transformers does; the language model is the one that it was, and the tokenizer comes along."""
    from transformers import AutoModel

    for name in ("saved", "released"):
        told = invoke("import", "vision", run, encoder / name, tmp_path / name)
        assert re.search(r"small_vlm, [\d,]+ parameters of .*, [\d,]+ of the encoder \w+, [\d,]+ of a new proj", told)
    saved, released = (read(tmp_path / name) for name in ("saved", "released"))
    assert saved.keys() == released.keys()
    assert all(torch.equal(tensor, released[name]) for name, tensor in saved.items())
    record = read_record(tmp_path / "saved")
    definition = read_definition(record, "")
    assert record["composed"] == {"language": str(find_checkpoint(run)), "vision": str(encoder / "saved"), "seed": 1234}
    assert record["data"] == {**dict.fromkeys(record["data"]), **read_record(find_checkpoint(run))["data"]}
    before = read(run)
    # norms are written under both of their names
    assert all(
        name.startswith(("vision.", "projector.")) or "layer_norm_weight" in name for name in saved.keys() - before
    )
    assert all(torch.equal(saved[name], tensor[: len(saved[name])]) for name, tensor in before.items())

    model = vision_config(vision=definition.vision).configure_model(None)
    for name, parameter in model.named_parameters():
        if name.startswith(("vision.", "projector.")):
            parameter.data.copy_(saved[name])
    oracle = AutoModel.from_pretrained(encoder / "saved").double()
    pixels = tiles(2)
    mean, std = (torch.tensor(each, dtype=torch.float64).view(3, 1, 1) for each in (MEAN, STD))
    with torch.no_grad():
        expected = oracle((pixels.double() / 255 - mean) / std).last_hidden_state[:, 1:]
        assert relative_error(model.vision(pixels), pixel_shuffle(expected)) < 1e-5


def test_an_encoder_that_begins_anew_begins_as_in_training(run: Path, tmp_path: Path) -> None:
    invoke("import", "vision", run, "internvit_tiny", tmp_path / "new", "--seed", 7, "--projector", 40)
    written = read(tmp_path / "new")
    definition = read_definition(read_record(tmp_path / "new"), "")
    assert (definition.name, definition.vision, definition.projector.ffn_hidden_size) == (
        *("small_vlm", read_encoder("internvit_tiny"), 40),
    )
    config = vision_config(vision=definition.vision, projector=definition.projector, init_seed=7)
    begun = {n: p for n, p in config.configure_model(None).named_parameters() if n.startswith(("vision.", "proj"))}
    assert len(begun) == 4 + 4 * 14 + 3
    assert all(torch.equal(written[name], parameter) for name, parameter in begun.items())


@pytest.mark.parametrize("like", ENCODERS)
def test_the_whole_goes_out_and_comes_back(like: str, megatron: None, tmp_path: Path) -> None:
    """In parts: transformers reads the encoder and computes the same, our loader all of it bit for bit."""
    from save_checkpoint import save
    from transformers import AutoModel

    model = vision_model(vision_config(like))
    save(model, tmp_path / "checkpoint")
    invoke("export", "hf", tmp_path / "checkpoint", tmp_path / "out", "--no-tokenizer", "--shard-size", "20KB")
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == [
        *("config.json", "language", "projector", "vision"),
    ]
    assert (tmp_path / "out/vision/model.safetensors.index.json").is_file()
    assert json.loads((tmp_path / "out/language/config.json").read_text())["model_type"] == "nemotron_h"
    assert sum(len(load_file(file)) for file in (tmp_path / "out/projector").glob("*.safetensors")) == 3
    oracle, left = AutoModel.from_pretrained(tmp_path / "out/vision", output_loading_info=True)
    assert not any(left.values())
    pixels = tiles(2)
    mean, std = (torch.tensor(each, dtype=torch.float64).view(3, 1, 1) for each in (MEAN, STD))
    with torch.no_grad():
        expected = oracle.double()((pixels.double() / 255 - mean) / std).last_hidden_state[:, 1:]
        assert relative_error(model.vision(pixels), pixel_shuffle(expected)) < 1e-5
    with pytest.raises(UserError, match=r"GGUF: model small has model\.vision \(small\), and only language models"):
        invoke("export", "gguf", tmp_path / "checkpoint", tmp_path / "out.gguf", "--no-tokenizer")
    invoke("import", "hf", tmp_path / "out", tmp_path / "back", "--name", "small")
    definitions = [read_definition(read_record(tmp_path / name), "") for name in ("checkpoint", "back")]
    assert not definitions[0].differences(definitions[1], "before", "after")
    before, after = read(tmp_path / "checkpoint"), read(tmp_path / "back")
    assert all(torch.equal(after[name], tensor[: len(after[name])]) for name, tensor in before.items())


def test_what_cannot_be_is_refused(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    folder.mkdir()
    for config, words in (
        ({"model_type": "clip"}, "model_type is clip; of image encoders internvl_vision and intern_vit_6b are read"),
        ({"model_type": "internvl_vision", "hidden_siz": 8}, "Did you mean hidden_size?"),
        ({"model_type": "internvl_vision", "use_mean_pooling": False}, "use_mean_pooling = False, which is not"),
        ({"model_type": "internvl_vision", "image_size": [448, 224]}, "tiles and patches are squares"),
        ({"model_type": "internvl_vision", "use_qk_norm": True, "layer_norm_eps": 1e-5}, "the epsilon 1e-05"),
        ({"model_type": "internvl_vision", "image_size": 450}, "image_size = 450 is not a multiple of twice"),
        ({"model_type": "internvl_vision"}, "has neither model.safetensors"),
    ):
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError) as error:
            invoke("import", "vision", run, folder, tmp_path / "out")
        assert words in str(error.value)
    with pytest.raises(UserError, match=r"(?s)it is an image encoder .*nemotron-h import vision CHECKPOINT DIR OUT"):
        invoke("import", "hf", folder, tmp_path / "out")
    with pytest.raises(UserError, match=r"(?s)no encoder of that name.*Did you mean internvit_tiny"):
        invoke("import", "vision", run, "internvit_tin", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert from_config({"model_type": "internvl_vision"}, "x", "x").hidden_size == 1024
