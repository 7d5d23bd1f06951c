"""Training from a checkpoint of somebody else's runs none of its code, through any file and any way in."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import fiddle as fdl
import pytest
import torch
from fiddle.experimental import serialization
from small_run import Small, distill_recipe, sft_recipe
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "inference"))
from save_checkpoint import finish

from nemotron_h.checkpoint import folders
from nemotron_h.cli.main import app
from nemotron_h.core.errors import UserError

pytestmark = pytest.mark.slow


class Attack:
    """A pickle that makes a file when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def object_beside_tensors(weights: Path, attack: Attack) -> None:
    """Replace a tensor by an object in a file of its own."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

    from nemotron_h.checkpoint.index import read_index

    index = read_index(weights)
    key = next(k for k in index.state_dict_metadata if k.endswith("word_embeddings.weight") and "optim" not in k)
    entry = BytesStorageMetadata()
    entry.size = index.state_dict_metadata[key].size  # all that megatron-core compares
    index.state_dict_metadata[key] = entry
    torch.save(attack, weights / "__9_9.distcp")
    index.storage_data = {i: place for i, place in index.storage_data.items() if i.fqn != key}
    size = (weights / "__9_9.distcp").stat().st_size
    index.storage_data[MetadataIndex(key)] = _StorageInfo("__9_9.distcp", 0, size)
    (weights / ".metadata").write_bytes(pickle.dumps(index))


def state_of_modelopt(weights: Path, attack: Attack) -> None:
    (weights / "modelopt_state").mkdir()
    torch.save(attack, weights / "modelopt_state" / "common.pt")


def context_of_nemo(weights: Path, attack: Attack) -> None:
    """Name a class that NeMo's `load_context` builds."""
    (weights.parent / "context").mkdir(exist_ok=True)
    call = fdl.Config(subprocess.getoutput, f"touch {attack.marker}")
    (weights.parent / "context" / "io.json").write_text(serialization.dump_json(call))


def other_format(weights: Path, attack: Attack) -> None:
    written = json.loads((weights / "metadata.json").read_text())
    (weights / "metadata.json").write_text(json.dumps({**written, "sharded_backend": "zarr"}))


PLANTS = {
    "index": lambda weights, attack: (weights / ".metadata").write_bytes(pickle.dumps(attack)),
    "common": lambda weights, attack: torch.save(attack, weights / "common.pt"),
    "object": object_beside_tensors,
    "modelopt": state_of_modelopt,
    "format": other_format,
}
CASES = [
    *(("resume", plant) for plant in PLANTS),
    ("init.checkpoint", "index"),
    ("init.checkpoint", "object"),
    ("adapter", "index"),
    ("teacher", "index"),
    ("teacher", "object"),
]
SAID = {
    "index": "weights/.metadata: UnpicklingError('it names posix.system",
    "common": "weights/common.pt: Trying to load unsupported GLOBAL posix.system",
    "object": "embedding.word_embeddings.weight' is no tensor",
    "modelopt": "weights/modelopt_state is no file that training writes",
    "format": "weights/metadata.json: its format is zarr",
}


def test_what_nemo_would_build_is_not_read(small: Small, straight: dict, tmp_path: Path) -> None:
    target = small.run_dir("unsafe_context") / "checkpoints" / "step-000008"
    shutil.copytree(small.run_dir("straight") / "checkpoints" / "step-000008", target)
    context_of_nemo(target / "weights", Attack(tmp_path / "ran"))
    finish(target)
    small.train("unsafe_context")
    assert not (tmp_path / "ran").exists()


def test_no_folder_that_a_checkpoint_names_is_removed(small: Small, straight: dict, tmp_path: Path) -> None:
    """Lightning keeps a list of the checkpoints to remove in each checkpoint."""
    folder = small.run_dir("unsafe_callbacks") / "checkpoints"
    shutil.copytree(small.run_dir("straight") / "checkpoints" / "step-000008", folder / "step-000008")
    (tmp_path / "victim").mkdir()
    victim = f"{folder}/{os.path.relpath(tmp_path / 'victim', folder)}"
    common = folder / "step-000008" / "weights" / "common.pt"
    content = torch.load(common, weights_only=False)
    (state,) = (state for name, state in content["callbacks"].items() if name.startswith("StepCheckpoint"))
    state["best_k_models"] = {victim: torch.tensor(-1.0), f"{folder}/step-000008": torch.tensor(8.0)}
    state |= {"kth_best_model_path": victim, "kth_value": torch.tensor(-1.0), "best_model_path": victim}
    del state["dirpath"]
    torch.save(content, common)
    finish(folder / "step-000008")
    small.train("unsafe_callbacks")
    assert (tmp_path / "victim").is_dir()
    assert {path.name for path in folder.glob("step-*")} == {"step-000008", "step-000012"}


@pytest.mark.parametrize(("way", "plant"), CASES)
def test_no_way_in_runs_a_checkpoint_s_code(small: Small, talk: Small, tmp_path: Path, way: str, plant: str) -> None:
    name = f"unsafe_{way}_{plant}"
    source = small.run_dir("straight") / "checkpoints" / "step-000008"
    target = small.run_dir(name) / "checkpoints" / "step-000008" if way == "resume" else tmp_path / "step-000008"
    shutil.copytree(source, target)
    PLANTS[plant](target / "weights", Attack(tmp_path / "ran"))
    finish(target)  # the sizes and hashes of a checkpoint are as little secret as the rest of it
    assert not folders.damage(target) or plant == "modelopt"
    straight = str(small.run_dir("straight"))
    if way == "resume":
        recipe = small.recipe(name)
    elif way == "init.checkpoint":
        recipe = small.variant(name, ("precision: bf16", f"precision: bf16\ninit: {{checkpoint: {target}}}"))
    else:
        recipe = sft_recipe(small, name) if way == "adapter" else distill_recipe(small, name)
        text = recipe.read_text().replace(straight, str(target))
        recipe.write_text(
            text + ("adapter: {kind: lora, rank: 4, alpha: 8, targets: [in_proj]}\n" if way == "adapter" else "")
        )
    done = small.train(name, recipe=recipe, check=False)
    assert not (tmp_path / "ran").exists(), done.stderr[-3000:]
    assert done.returncode == 2, done.stderr[-3000:]
    assert SAID[plant] in done.stderr
    assert "Traceback" not in done.stderr


FEW = ("--layer-samples", "1", "--neuron-samples", "1")
COMMANDS = {
    "generate": ("generate", "CHECKPOINT", "a"),
    "chat": ("chat", "CHECKPOINT"),
    "export hf": ("export", "hf", "CHECKPOINT", "OUT"),
    "export gguf": ("export", "gguf", "CHECKPOINT", "OUT.gguf"),
    "importance": ("importance", "CHECKPOINT", "OUT", "--blend", "BLEND", "--root", "ROOT", *FEW),
    "prune": ("prune", "CHECKPOINT", "OUT", "--ffn-hidden-size", "64", "--importance", "MEASURED"),
    "eval": ("eval", "CHECKPOINT", "--blend", "BLEND", "--root", "ROOT"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_a_checkpoint_s_code(small: Small, straight: dict, tmp_path: Path, command: str) -> None:
    target = tmp_path / "step-000008"
    shutil.copytree(small.run_dir("straight") / "checkpoints" / "step-000008", target)
    places = {
        "CHECKPOINT": str(target),
        "MEASURED": str(tmp_path / "measured"),
        "OUT": str(tmp_path / "out"),
        "OUT.gguf": str(tmp_path / "out.gguf"),
        "BLEND": str(small.folder / "words.yaml"),
        "ROOT": str(small.folder / "data"),
    }
    if command == "prune":  # after what it needs of the checkpoint as it was
        importance = ["MEASURED" if word == "OUT" else word for word in COMMANDS["importance"]]
        assert not CliRunner().invoke(app, [places.get(word, word) for word in importance]).exit_code
    PLANTS["index"](target / "weights", Attack(tmp_path / "ran"))
    finish(target)
    found = CliRunner().invoke(app, [places.get(word, word) for word in COMMANDS[command]])
    assert isinstance(found.exception, UserError), found.output
    assert SAID["index"] in found.exception.message
    assert not (tmp_path / "ran").exists()
    assert not list(tmp_path.glob("out*"))
