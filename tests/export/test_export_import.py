"""`nemotron-h export hf` and `nemotron-h import hf`: what they write, and every refusal before any work."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from export_command import invoke
from safetensors.torch import load_file, save_file
from save_checkpoint import finish, save
from small_model import VOCABULARY, pure_config, small_model
from small_tokenizer import train_small
from typer.testing import CliRunner

from nemotron_h.checkpoint.reader import WeightFile
from nemotron_h.cli.main import app
from nemotron_h.core.errors import UserError
from nemotron_h.export import hf_writer

pytestmark = pytest.mark.usefixtures("megatron")


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "small"
    invoke("export", "hf", run, out, "--shard-size", "50KB")
    return out


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(exported, tmp_path / "folder"))


def refused(folder: Path, message: str) -> UserError:
    """Import must fail with this message and leave nothing."""
    out = folder.with_name("out")
    before = sorted(folder.parent.iterdir())
    with pytest.raises(UserError, match=message) as error:
        invoke("import", "hf", folder, out)
    assert sorted(folder.parent.iterdir()) == before
    return error.value


def test_what_an_export_holds(exported: Path) -> None:
    files = {file.name for file in exported.iterdir() if file.suffix != ".safetensors"}
    assert files == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((exported / "config.json").read_text())
    assert (config["max_position_embeddings"], config["torch_dtype"]) == (128, "float32")
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (0, 0, 1)


def test_imported_model_generates_and_is_exported_again(run: Path, exported: Path, tmp_path: Path) -> None:
    said = invoke("import", "hf", exported, tmp_path / "in")
    assert "small" in said
    options = ("--max-tokens", 12, "--seed", 3)
    assert invoke("generate", tmp_path / "in", "wort", *options) == invoke("generate", run, "wort", *options)
    moved = (tmp_path / "in").rename(tmp_path / "moved")
    assert invoke("generate", moved, "wort", *options)
    invoke("export", "hf", moved, tmp_path / "again", "--shard-size", "50KB")
    names = sorted(file.name for file in exported.iterdir())
    assert sorted(file.name for file in (tmp_path / "again").iterdir()) == names
    assert all((tmp_path / "again" / name).read_bytes() == (exported / name).read_bytes() for name in names)


def test_without_a_tokenizer(run: Path, tmp_path: Path) -> None:
    invoke("export", "hf", run, tmp_path / "out", "--no-tokenizer", "--dtype", "bf16")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eos_token_id"] is None
    invoke("import", "hf", tmp_path / "out", tmp_path / "in")
    with pytest.raises(UserError, match="does not tell the tokenizer"):
        invoke("generate", tmp_path / "in", "x")


def test_export_refuses(run: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="exists already"):
        invoke("export", "hf", run, exported)
    with pytest.raises(UserError, match="there is no folder"):
        invoke("export", "hf", run, tmp_path / "absent" / "out")
    with pytest.raises(UserError, match="--dtype fp8 is unknown"):
        invoke("export", "hf", run, tmp_path / "out", "--dtype", "fp8")
    for size in ("5", "0GB", "fiveGB", "5XB"):
        with pytest.raises(UserError, match="is not a size"):
            invoke("export", "hf", run, tmp_path / "out", "--shard-size", size)
    with pytest.raises(UserError, match="neither a checkpoint nor a run"):
        invoke("export", "hf", tmp_path, tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(1 << 20))
    with pytest.raises(UserError, match=r"has 0\.0 GB free, 0\.1 GB are needed"):
        invoke("export", "hf", run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_another_tokenizer(run: Path, tokenizer: Path, tmp_path: Path, form: str) -> None:
    """Of another size, or of the same size with other tokens; a copy under other file names is the same one."""
    train_small(tmp_path / "large", VOCABULARY + 20)
    train_small(tmp_path / "small", VOCABULARY - 20)
    train_small(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"large has 320 tokens, the model of .*step-000001 has a vocabulary of 300"):
        invoke("export", form, run, tmp_path / "out", "--tokenizer", tmp_path / "large")
    with pytest.raises(UserError, match="small gives tokens other ids than"):
        invoke("export", form, run, tmp_path / "out", "--tokenizer", tmp_path / "small")
    with pytest.raises(UserError, match=rf"other gives tokens other ids than {tokenizer}") as error:
        invoke("export", form, run, tmp_path / "out", "--tokenizer", tmp_path / "other")
    assert "leave --tokenizer out" in error.value.hint
    assert not (tmp_path / "out").exists()
    copy = Path(shutil.copytree(tokenizer, tmp_path / "copy"))
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    invoke("export", form, run, tmp_path / "out", "--tokenizer", copy)


def test_a_tokenizer_that_changed_since_the_training(run: Path, tokenizer: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(run, tmp_path / "run"))
    record = next(moved.rglob("run.json"))
    content = json.loads(record.read_text())
    content["data"]["tokenizer_sha256"] = "0" * 64
    record.write_text(json.dumps(content))
    finish(record.parent)
    with pytest.raises(UserError, match=rf"files of {tokenizer} have changed") as error:
        invoke("export", "hf", moved, tmp_path / "out")
    assert "--tokenizer DIR" in error.value.hint
    invoke("export", "hf", moved, tmp_path / "out", "--tokenizer", tokenizer)
    content["data"]["tokenizer"] = str(tmp_path / "gone")
    record.write_text(json.dumps(content))
    finish(record.parent)
    with pytest.raises(UserError, match=r"is not at .*gone any more"):
        invoke("export", "hf", moved, tmp_path / "again")


def test_rotary_model_is_refused(tmp_path: Path) -> None:
    checkpoint = save(small_model(pure_config("*-")), tmp_path / "c")
    with pytest.raises(UserError, match="has rope positions"):
        invoke("export", "hf", checkpoint, tmp_path / "out", "--no-tokenizer")


def test_nothing_is_left_of_a_failed_export(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def full(tensors: dict, path: Path, **_: object) -> None:
        path.write_bytes(b"x")
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_writer, "save_file", full)
    with pytest.raises(UserError, match=r"cannot write .*No space left"):
        invoke("export", "hf", run, tmp_path / "out", "--shard-size", "50KB")
    assert len(written) == 2
    assert not list(tmp_path.iterdir())


def test_damaged_checkpoint(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    file = max(tmp_path.rglob("*.distcp"), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 4096] = bytes(4096)
    file.write_bytes(content)
    with pytest.raises(UserError, match="does not match its checksum"):
        invoke("export", "hf", tmp_path / "run", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_import_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        invoke("import", "hf", tmp_path / "absent", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"config\.json: .*No such file")


def test_import_over_something(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        invoke("import", "hf", exported, tmp_path)


def test_other_architecture(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"nemotron_h"', '"mistral"'))
    refused(folder, r"config\.json: model_type is mistral; only nemotron_h, falcon_h1, llama, qwen2 and qwen3 can")


def test_missing_file(folder: Path) -> None:
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    refused(folder, rf"1 of \d+ weight files are missing: {lost.name}")


def test_other_weight_format(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    assert "safetensors" in refused(folder, "has neither model.safetensors nor").hint


def test_damaged_file(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])
    refused(folder, f"{file.name} is damaged")


def rewrite(folder: Path, name: str, change) -> None:
    """Change one tensor (None removes it) where it lies."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            changed = change(tensors.pop(name))
            if changed is not None:
                tensors[name] = changed
            save_file(tensors, file)


def test_wrong_tensors(folder: Path) -> None:
    name = "backbone.layers.0.mixer.in_proj.weight"
    pristine = {file: file.read_bytes() for file in folder.glob("*.safetensors")}
    rewrite(folder, name, lambda tensor: tensor[:-1].clone())
    refused(folder, rf"1 tensors have a wrong shape: {name} is \[\d+, 48\], config.json asks for \[\d+, 48\]")
    rewrite(folder, name, lambda tensor: None)
    refused(folder, f"1 tensors are missing: {name}")
    for file, content in pristine.items():
        file.write_bytes(content)
    rewrite(folder, name, lambda tensor: tensor.double())
    assert "transformers" in refused(folder, "weights of dtype F64; F32, BF16, F16 are read").hint
    rewrite(folder, name, lambda tensor: tensor.float().fill_(float("nan")))
    other = "backbone.layers.0.mixer.conv1d.bias"
    rewrite(folder, other, lambda tensor: tensor.index_fill(0, torch.tensor([3]), float("inf")))
    refused(folder, f"folder: NaN or infinite weights in {name}")
    rewrite(folder, name, lambda tensor: tensor.fill_(0))
    refused(folder, f"folder: NaN or infinite weights in {other}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes_are_read_exactly_into_float32(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """Whole in float16; or bfloat16 with the norms in float32."""
    expected = {}
    for file in folder.glob("*.safetensors"):
        mixed = dtype == torch.bfloat16
        tensors = {n: t if mixed and "norm" in n else t.to(dtype) for n, t in load_file(file).items()}
        save_file(tensors, file)
        expected |= tensors
    assert "in float32" in invoke("import", "hf", folder, tmp_path / "in")
    invoke("export", "hf", tmp_path / "in", tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == expected.keys()
    assert all(
        again[name].dtype == torch.float32 and torch.equal(again[name], t.float()) for name, t in expected.items()
    )


@pytest.fixture(scope="module")
def padded(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imported model with 84 rows of padding, whose scores are far above those of every token."""
    folder = Path(shutil.copytree(exported, tmp_path_factory.mktemp("padded") / "hf"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": VOCABULARY + 84}))
    hidden = config["hidden_size"]
    rewrite(folder, "backbone.embeddings.weight", lambda tensor: torch.cat([tensor, torch.zeros(84, hidden)]))
    high = torch.cat([torch.full((42, hidden), 9.0), torch.full((42, hidden), -9.0)])
    rewrite(folder, "lm_head.weight", lambda tensor: torch.cat([tensor, high]))
    invoke("import", "hf", folder, folder.with_name("in"))
    return folder.with_name("in")


def test_padding_of_the_vocabulary_is_never_written(run: Path, padded: Path, tmp_path: Path) -> None:
    options = ("--max-tokens", 12, "--seed", 3)
    assert invoke("generate", padded, "wort", *options) == invoke("generate", run, "wort", *options)
    invoke("export", "hf", padded, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert config["suppress_tokens"] == list(range(VOCABULARY, VOCABULARY + 84))
    invoke("export", "gguf", padded, tmp_path / "x.gguf")


def test_an_imported_model_knows_its_tokenizer(padded: Path, run: Path, tokenizer: Path, tmp_path: Path) -> None:
    """By the ids of tokens: the run's own files are others."""
    invoke("generate", padded, "wort", "--max-tokens", 1, "--tokenizer", tokenizer)
    with pytest.raises(UserError, match="other gives tokens other ids than tokenizer"):
        invoke("generate", padded, "wort", "--tokenizer", train_small(tmp_path / "other", seed=1))


def test_files_that_do_not_belong_together(folder: Path, tmp_path: Path) -> None:
    """Each is refused by name before any work."""
    index, config = folder / "model.safetensors.index.json", folder / "config.json"
    tokenizer = folder / "tokenizer.json"
    weights, width, library = index.read_text(), config.read_text(), tokenizer.read_text()
    outside = json.loads(weights)
    outside["weight_map"]["lm_head.weight"] = "../folder/model.safetensors"
    for file, content, words in (
        (index, json.dumps(outside), r"names a file outside of its folder: \.\./folder/model"),
        (index, '{"weight_map": ["a"]}', r"index\.json: weight_map does not map"),
        (index, "[]", r"index\.json does not hold a JSON object"),
        (config, "[" * 100_000, r"config\.json: .*nested too deep"),
        (config, "\ufeff" + width.replace("300", '"many"'), r"config\.json: vocab_size is 'many'; a positive whole"),
        (config, width.replace('"n_groups": ', '"n_groups": -'), r"config\.json: n_groups is -\d; a positive whole"),
        (tokenizer, library[:500], "folder: cannot load the huggingface tokenizer"),
        (tokenizer, library.replace('"id": 0', '"id": "zero"'), "folder: cannot load the huggingface tokenizer"),
        (folder / "tokenizer_config.json", '{"eos_token": 3}', "eos_token is 3; the name of a token is needed"),
    ):
        before = file.read_text()
        file.write_text(content)
        refused(folder, words)
        file.write_text(before)
    train_small(tmp_path / "large", VOCABULARY + 20)
    shutil.copy(tmp_path / "large" / "tokenizer.json", tokenizer)
    refused(folder, "the tokenizer has 320 tokens, the model a vocabulary of 300")


def test_tensors_of_another_model(folder: Path) -> None:
    save_file({"backbone.layers.9.norm.weight": torch.ones(48)}, folder / "more.safetensors")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["backbone.layers.9.norm.weight"] = "more.safetensors"
    index.write_text(json.dumps(content))
    refused(folder, r"1 tensors have no place in the model of its config\.json: backbone\.layers\.9\.norm\.weight")


def test_outlying_embedding_rows(folder: Path, tmp_path: Path) -> None:
    """They are named in any case, and replaced on request."""
    name = "backbone.embeddings.weight"
    file = next(file for file in folder.glob("*.safetensors") if name in load_file(file))
    tensors = load_file(file)
    tensors[name][[7, 9]] = 0
    save_file(tensors, file, {"format": "pt"})
    said = CliRunner().invoke(app, ["import", "hf", str(folder), str(tmp_path / "kept")], catch_exceptions=False)
    assert "outlying embedding rows, kept; --repair-embeddings replaces them: 7 " in said.output
    invoke("import", "hf", folder, tmp_path / "repaired", "--repair-embeddings")
    record = json.loads((tmp_path / "repaired" / "run.json").read_text())["embedding_rows"]
    assert record["repaired"] is True
    assert list(record["outliers"]) == ["7", "9"]
    norms = {}
    for out in ("kept", "repaired"):
        file = WeightFile(tmp_path / out)
        weight = torch.empty(file.shapes["embedding.word_embeddings.weight"])
        file.read({"embedding.word_embeddings.weight": weight})
        norms[out] = weight.norm(dim=1)
    assert norms["kept"][[7, 9]].tolist() == [0, 0]
    assert torch.allclose(norms["repaired"][[7, 9]], norms["repaired"].median().expand(2), rtol=1e-2)
