"""Reading training checkpoints: every layout gives the same weights, and damage is told."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import FORKS
from save_checkpoint import finish, save
from small_model import small_config, small_model

from nemotron_h.checkpoint import folders
from nemotron_h.checkpoint.reader import find_checkpoint
from nemotron_h.core.errors import UserError
from nemotron_h.inference.model import GenerationModel, load_model
from nemotron_h.platform import checkpoint_writer

pytestmark = pytest.mark.usefixtures("megatron")


def tensors(model: GenerationModel) -> list[torch.Tensor]:
    """All weights, in order."""
    layers = [value for layer in model.layers for value in vars(layer).values()]
    return [model.embedding, *layers, model.final_norm, model.output]


@pytest.fixture(scope="module")
def run(megatron: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with checkpoints of steps 1 and 2, of different weights, and an unfinished one of step 3."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    for step in (1, 2):
        save(small_model(small_config(), seed=step), folder / f"step-{step:06d}")
    shutil.copytree(folder / "step-000001", folder / "step-000003")
    (folder / "step-000003-unfinished").touch()
    (folder / "step-000003" / folders.INTEGRITY).unlink()
    return folder.parent


@pytest.fixture
def checkpoint(run: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(run / "checkpoints" / "step-000001", tmp_path / "step-000001"))


def test_run_folder_means_its_newest_finished_checkpoint(run: Path) -> None:
    assert find_checkpoint(run).name == "step-000002"
    newest, named = load_model(run), load_model(run / "checkpoints" / "step-000002")
    assert all(torch.equal(a, b) for a, b in zip(tensors(newest), tensors(named), strict=True))
    other = load_model(run / "checkpoints" / "step-000001")
    assert not torch.equal(newest.embedding, other.embedding)


def test_padding_of_the_vocabulary_is_left_out(run: Path) -> None:
    model = load_model(run)
    assert model.embedding.shape == model.output.shape == (model.definition.vocab_size, model.definition.hidden_size)


def test_index_needs_no_megatron(run: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from nemotron_h.inference.model import load_model; "
        f"load_model(Path({str(run)!r})); "
        "sys.exit(any(name.split('.')[0] in ('megatron', 'nemo', 'lightning') for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.slow
def test_layouts(tmp_path: Path) -> None:
    """Initial weights do not depend on the layout, so whole and sharded checkpoints must be equal bit for bit."""
    worker = Path(__file__).with_name("save_checkpoint.py")
    FORKS.launch(worker, str(tmp_path), "tp2", "pp2", folder=tmp_path, ranks=2)
    whole = tensors(load_model(save(small_config().configure_model(None), tmp_path / "one")))
    for layout in ("tp2", "pp2"):
        sharded = tensors(load_model(tmp_path / layout))
        assert all(torch.equal(a, b) for a, b in zip(sharded, whole, strict=True)), layout


def test_transformer_engines_norms_are_found(run: Path, tmp_path: Path) -> None:
    """Its layers hold the norm inside the projection after it; the same weights under those names."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.utils import apply_prefix_mapping

    model = small_model(small_config(), seed=1)
    folder = save(model, tmp_path / "step-000001")
    shutil.rmtree(folder / "weights")
    (folder / "weights").mkdir()
    state = model.sharded_state_dict(prefix="module.")
    for index, symbol in enumerate(model.config.hybrid_override_pattern):
        layer = f"module.decoder.layers.{index}."
        names = {
            "M": ("norm.weight", "mixer.in_proj.layer_norm_weight"),
            "*": ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
            "-": ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
        }
        own, fused = names[symbol]
        apply_prefix_mapping(state, {layer + own: layer + fused})
    dist_checkpointing.save(state, str(folder / "weights"))
    finish(folder)
    plain = load_model(run / "checkpoints" / "step-000001")
    assert all(torch.equal(a, b) for a, b in zip(tensors(load_model(folder)), tensors(plain), strict=True))


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no checkpoint folder"):
        load_model(tmp_path / "absent")
    with pytest.raises(UserError, match="neither a checkpoint nor a run"):
        load_model(tmp_path)


def test_unfinished(checkpoint: Path) -> None:
    (checkpoint / folders.INTEGRITY).unlink()
    with pytest.raises(UserError, match="not a finished checkpoint"):
        load_model(checkpoint)


def test_missing_file(checkpoint: Path) -> None:
    next((checkpoint / "weights").glob("*.distcp")).unlink()
    with pytest.raises(UserError, match=r"damaged: weights/.*\.distcp is missing"):
        load_model(checkpoint)


def test_truncated_file(checkpoint: Path) -> None:
    file = next((checkpoint / "weights").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"damaged: weights/.*\.distcp has .* bytes, .* were written"):
        load_model(checkpoint)


def _overwrite(checkpoint: Path) -> None:
    file = max((checkpoint / "weights").glob("*.distcp"), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 4096] = bytes(4096)
    file.write_bytes(content)


def test_overwritten_bytes(checkpoint: Path) -> None:
    _overwrite(checkpoint)
    with pytest.raises(UserError, match=r"damaged: weights/.*\.distcp \(module\..*\) does not match its checksum"):
        load_model(checkpoint)


def test_tensors_without_checksums(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training with PyTorch 2.11 has written such checkpoints; their files have checksums."""
    write = checkpoint_writer._write

    def without(*arguments: Any) -> Any:
        torch.serialization.set_crc32_options(False)
        try:
            return write(*arguments)
        finally:
            torch.serialization.set_crc32_options(True)

    monkeypatch.setattr(checkpoint_writer, "_write", without)
    checkpoint = tmp_path / "step-000001"
    save(small_model(small_config(), seed=1), checkpoint)
    same, model = load_model(run / "checkpoints" / "step-000001"), load_model(checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(tensors(same), tensors(model), strict=True))
    _overwrite(checkpoint)
    with pytest.raises(UserError, match=r"damaged: weights/[^ ]*\.distcp does not match its checksum"):
        load_model(checkpoint)


def test_damaged_index(checkpoint: Path) -> None:
    file = checkpoint / "weights" / ".metadata"
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(UserError, match=r"damaged: weights/\.metadata"):
        load_model(checkpoint)


def test_state_that_transformer_engine_would_unpickle_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "decoder.layers.0.mixer.in_proj"
    model = small_model(small_config(), seed=1)
    loaded = []
    monkeypatch.setattr(type(model.get_submodule(name)), "set_extra_state", lambda _, state: loaded.append(state))
    model.load_state_dict({**model.state_dict(), f"{name}._extra_state": torch.zeros(9, dtype=torch.uint8)})
    assert loaded
    assert all(state is None for state in loaded)


def test_record_of_another_model(checkpoint: Path) -> None:
    record = checkpoint / folders.RECORD
    record.write_text(record.read_text().replace('"hidden_size": 48', '"hidden_size": 56'))
    finish(checkpoint)
    with pytest.raises(UserError, match=r"is \(384, 48\), its run.json asks for \(384, 56\)"):
        load_model(checkpoint)
