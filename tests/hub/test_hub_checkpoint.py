"""Checkpoints of the Hub: fetched once, compared with its hashes, imported as a folder is, and every refusal."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hub_server import Fault, Hub, Repo
from small_folder import model_files
from typer.testing import CliRunner

from nemotron_h.checkpoint.definition import read_definition
from nemotron_h.checkpoint.hub_cache import path_of
from nemotron_h.checkpoint.reader import WeightFile, find_checkpoint, read_record
from nemotron_h.cli.main import app
from nemotron_h.core.errors import UserError
from nemotron_h.export import hub_import
from nemotron_h.planning.layouts import teacher_of
from nemotron_h.recipe import check
from nemotron_h.recipe.checks import definition_of
from nemotron_h.recipe.compose import compose


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    recipe = compose("nemotron_h_tiny/pretrain")
    changes = {"hidden_size": 64, "ffn_hidden_size": 96, "vocab_size": 512}
    import dataclasses

    definition = dataclasses.replace(definition_of(recipe, "test"), pattern="M*-", **changes)
    return model_files(definition)


@pytest.fixture
def model(hub: Hub, files: dict[str, bytes]) -> Repo:
    repo = hub.repos["models/org/Small-1B"] = Repo(dict(files), tags=["v1.0"])
    return repo


def name_of(repo: Repo, revision: str = "") -> str:
    return f"hub:org/Small-1B@{revision or repo.commit()}"


def refusal(checkpoint: str) -> str:
    with pytest.raises(UserError) as error:
        hub_import.obtain(checkpoint, "init.checkpoint", say=lambda text: None)
    assert not path_of(checkpoint).exists()
    return str(error.value)


def test_as_an_import_of_the_folder(hub: Hub, model: Repo, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    folder = tmp_path / "small_1b"
    folder.mkdir()
    for path, content in model.files.items():
        if "/" not in path:
            (folder / path).write_bytes(content)
    result = CliRunner().invoke(app, ["import", "hf", str(folder), str(tmp_path / "plain")])
    assert result.exit_code == 0, result.output
    checkpoint = name_of(model)
    with pytest.raises(UserError, match=rf"is not on this machine yet\nRun: nemotron-h import hf {checkpoint}"):
        find_checkpoint(Path(checkpoint))
    result = CliRunner().invoke(app, ["import", "hf", checkpoint])
    assert result.exit_code == 0, result.output
    found = find_checkpoint(Path(checkpoint))
    one, two = WeightFile(tmp_path / "plain"), WeightFile(found)
    read = [{name: torch.empty(shape) for name, shape in each.shapes.items()} for each in (one, two)]
    for each, targets in zip((one, two), read, strict=True):
        each.read(targets)
    assert read[0].keys() == read[1].keys()
    assert all(torch.equal(read[0][name], read[1][name]) for name in read[0])
    record = read_record(found)
    assert record["imported"]["hub"] == f"org/Small-1B@{model.commit()}"
    assert read_definition(record, "it").name == "small_1b"
    loaded = {path.rpartition("/")[2] for method, path, *_ in hub.log if method == "GET" and "/resolve/" in path}
    assert loaded == {path for path in model.files if not path.startswith(("nemo", "modeling"))}
    assert {authorization for *_, authorization in hub.log} == {"Bearer hf_secret"}
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and b"hf_secret" in p.read_bytes()]
    hub.log.clear()
    hub_import.obtain(checkpoint, "init.checkpoint")
    assert not hub.log, "the second start takes the cache"
    hub_import.obtain(checkpoint, "init.checkpoint", rank=1)


def test_to_a_folder_with_a_name(hub: Hub, model: Repo, tmp_path: Path, monkeypatch) -> None:
    hub.faults += [Fault("*/resolve/*safetensors", 503, 2), Fault("*/auth-check", 502, 1)]
    out = str(tmp_path / "out")
    result = CliRunner().invoke(app, ["import", "hf", name_of(model, "v1.0"), out, "--name", "mine"])
    assert result.exit_code == 0, result.output
    record = read_record(tmp_path / "out")
    assert record["imported"]["hub"] == f"org/Small-1B@{model.commit()}", "of a tag, the commit"
    assert read_definition(record, "it").name == "mine"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.log.clear()
    hub_import.obtain(name_of(model), "init.checkpoint")
    assert not hub.log, "offline, Hugging Face's cache is taken"
    assert "not in Hugging Face's cache" in refusal(name_of(model, "0" * 40))
    assert "HF_HUB_OFFLINE is set" in refusal(name_of(model, "v1.0"))


def test_an_output_that_cannot_be_is_refused_before_the_download(hub: Hub, model: Repo, tmp_path: Path) -> None:
    for out, words in ((tmp_path, "exists already"), (tmp_path / "no" / "out", "there is no folder")):
        result = CliRunner().invoke(app, ["import", "hf", name_of(model), str(out)])
        assert words in str(result.exception)
    assert not hub.log


def test_refusals(hub: Hub, model: Repo, monkeypatch) -> None:
    text = refusal(name_of(model, "main"))
    assert "init.checkpoint: org/Small-1B@main: main is a branch, which moves" in text
    assert model.commit() in text
    assert "there is no such revision" in refusal(name_of(model, "0" * 40))
    assert "there is no such model" in refusal("hub:org/none@v1")
    model.needs, model.gated = "hf_right", True
    assert "HF_TOKEN is not set\nAccept its terms on" in refusal(name_of(model))
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    hub.faults.append(Fault("*/resolve/*safetensors", 500, 999))
    assert "the Hub fails (HTTP 500)" in refusal(name_of(model))
    hub.faults.clear()
    hub.repos["models/org/data"] = Repo({"README.md": b"no model"})
    assert "it has no config.json" in refusal(f"hub:org/data@{hub.repos['models/org/data'].commit()}")


def test_a_file_that_is_not_what_the_hub_says(hub: Hub, model: Repo, tmp_path: Path) -> None:
    hub_import.download(hub_import.hub.parse(name_of(model), "it"))
    [cached] = (tmp_path / "hf").rglob("model-1-of-2.safetensors")
    whole = cached.read_bytes()
    blob = Path(os.path.realpath(cached))
    blob.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "model-1-of-2.safetensors is not the file that the Hub describes" in refusal(name_of(model))
    hub_import.obtain(name_of(model), "init.checkpoint")
    assert find_checkpoint(Path(name_of(model)))


@pytest.mark.parametrize(
    "written", ["hub:org/name", "hub:org/name@", "hub:name@v1", "hub:../x@v1", "hub:org/name@../x"]
)
def test_a_name_that_is_none(written: str) -> None:
    with pytest.raises(
        UserError, match=r"nemotron_h_tiny/sft: init.checkpoint: .*\nwrite hub:organisation/name@revision"
    ):
        compose("nemotron_h_tiny/sft", [f"init.checkpoint={written}"])


def test_checks_and_plans_ask_no_hub(hub: Hub) -> None:
    checkpoint = "hub:nvidia/Nemotron-H-8B-Base-8K@v1"
    checked = check.examine("nemotron_h_tiny/sft", [f"init.checkpoint={checkpoint}"])
    assert f"init.checkpoint, which a run fetches: {checkpoint}" in checked.line()
    recipe = compose("nemotron_h_tiny/distill", [f"distill.teacher={checkpoint}"])
    assert teacher_of(recipe).name == "nemotron_h_8b"
    recipe = compose("nemotron_h_tiny/distill", ["distill.teacher=hub:org/Other@v1"])
    with pytest.raises(UserError, match="no shipped model is called"):
        teacher_of(recipe)
    assert not hub.log
