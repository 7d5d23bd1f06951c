"""`nemotron-h generate`: the text, the summary, and errors before any work."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import typer
from save_checkpoint import save
from small_model import VOCABULARY, small_config, small_model
from typer.testing import CliRunner

from nemotron_h.data.tokenizer import load_tokenizer, train_bpe
from nemotron_h.errors import UserError
from nemotron_h.inference.cli import generate as command
from nemotron_h.inference.generate import generate
from nemotron_h.inference.model import load_model
from nemotron_h.inference.sampling import Sampling

pytestmark = pytest.mark.usefixtures("megatron")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghöß日本🙂", k=4)) for _ in range(50)]
    train_bpe([" ".join(draw.choices(words, k=500))], VOCABULARY, folder)
    return folder


@pytest.fixture(scope="module")
def run(megatron: None, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save(small_model(small_config()), folder / "checkpoints" / "step-000001", data={"tokenizer": str(tokenizer)})
    return folder


def invoke(*arguments: object):
    """Run the command; its errors are raised."""
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def test_prints_the_continuation(run: Path, tokenizer: Path) -> None:
    result = invoke(run, "wort größe", "--max-tokens", 30, "--seed", 5)
    assert result.exit_code == 0
    text = load_tokenizer(tokenizer)
    model, ids = load_model(run), text.text_to_ids("wort größe")
    sampling = Sampling(temperature=0.8, top_p=0.95, seed=5)
    expected = generate(model, [ids], max_tokens=30, sampling=sampling, stop_id=text.eod_id)[0]
    assert result.stdout == text.ids_to_text(expected) + "\n"
    for word in (f"{len(ids)} tokens read", f"{len(expected)} generated", "tokens/s", "step-000001"):
        assert word in result.stderr


def test_empty_prompt_begins_a_document(run: Path) -> None:
    assert invoke(run, "", "--max-tokens", 1).exit_code == 0


def test_wrong_tokenizer(run: Path, tmp_path: Path) -> None:
    train_bpe(["abc abd abe " * 50, "xyz xyw " * 50], 265, tmp_path)
    with pytest.raises(UserError, match=r"has 265 tokens, the model of .* has a vocabulary of 300"):
        invoke(run, "x", "--tokenizer", tmp_path)


def test_no_tokenizer(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no prepared tokenizer"):
        invoke(run, "x", "--tokenizer", tmp_path)
    folder = save(small_model(small_config()), tmp_path / "step-000001")
    with pytest.raises(UserError, match="does not tell the tokenizer") as error:
        invoke(folder, "x")
    assert "--tokenizer" in error.value.hint


def test_unknown_dtype(run: Path) -> None:
    with pytest.raises(UserError, match="float31"):
        invoke(run, "x", "--dtype", "float31")
