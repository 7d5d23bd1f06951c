"""Held-out loss by category: against the training model's uncached forward, and its bookkeeping."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from local_corpus import Corpus
from rich.console import Console
from save_checkpoint import finish, save
from small_model import small_config, small_model
from typer.testing import CliRunner

from nemotron_h.cli.main import app
from nemotron_h.core.errors import UserError
from nemotron_h.data.blend import load_blend
from nemotron_h.data.indexed import TokenStream, read_lengths
from nemotron_h.data.manifest import Manifest, load_manifest
from nemotron_h.data.prepare.pipeline import prepare
from nemotron_h.data.tokenizer import load_tokenizer, write_meta
from nemotron_h.evaluation import heldout, record
from nemotron_h.inference.model import load_model

pytestmark = pytest.mark.usefixtures("megatron")
LENGTH = 48


def invoke(*arguments: object) -> str:
    """Run the command; its errors are raised."""
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False).stdout


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    made = Corpus(tmp_path_factory.mktemp("corpus"))
    made.prepare()
    return made


@pytest.fixture(scope="module")
def manifest(corpus: Corpus) -> Manifest:
    return load_manifest(corpus.root, "local")


@pytest.fixture(scope="module")
def run(megatron: None, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the small model on the corpus, with one checkpoint."""
    folder = tmp_path_factory.mktemp("evaluated")
    checkpoint = folder / "checkpoints" / "step-000007"
    data = {"seq_length": LENGTH, "root": str(corpus.root), "tokenizer": str(corpus.prepared / "tokenizer")}
    save(small_model(small_config(vocab_size=400)), checkpoint, data=data)
    content = json.loads((checkpoint / "run.json").read_text())
    content["recipe"] = {"data": {"blend": str(corpus.write())}}
    (checkpoint / "run.json").write_text(json.dumps(content))
    finish(checkpoint)
    return folder


@torch.no_grad()
def uncached(manifest: Manifest, sources: list[str]) -> tuple[float, int]:
    """Sum of losses and number of tokens, of the training model over every whole window."""
    model = small_model(small_config(vocab_size=400)).eval()
    nats, count = 0.0, 0
    for source in sources:
        stream = TokenStream(manifest.prefix(source, "validation"))
        for start in range(0, stream.tokens - LENGTH, LENGTH):
            ids = torch.from_numpy(stream.read(start, LENGTH + 1))[None]
            logits = model(input_ids=ids[:, :-1])[0, :, :400]
            nats += F.cross_entropy(logits.float(), ids[0, 1:], reduction="sum").item()
            count += LENGTH
    return nats, count


def test_categories_against_the_uncached_forward(run: Path, manifest: Manifest) -> None:
    said = invoke("eval", run, "--tokens", 0)
    assert "bits/byte" in said
    found = {entry["task"]: entry for entry in record.read(run / "checkpoints" / "step-000007")}
    assert set(found) == {"perplexity/web", "perplexity/code", "perplexity/all"}  # wiki holds nothing out
    text = load_tokenizer(manifest.tokenizer_path())
    for category, sources in (("web", ["web", "more"]), ("code", ["code"])):
        nats, count = uncached(manifest, sources)
        entry = found[f"perplexity/{category}"]
        assert entry["samples"] == count
        loss, error = entry["metrics"]["loss"]
        assert loss > 3  # weights at scale 1 know nothing, and say so loudly
        assert loss == pytest.approx(nats / count, rel=1e-5)
        assert 0 < error < 1
        assert entry["metrics"]["perplexity"][0] == pytest.approx(math.exp(nats / count), rel=1e-4)
        size = 0
        for source in sources:
            stream = TokenStream(manifest.prefix(source, "validation"))
            whole = (stream.tokens - 1) // LENGTH * LENGTH
            size += len(text.ids_to_text(stream.read(1, whole).tolist(), remove_special_tokens=True).encode())
        assert entry["metrics"]["bits_per_byte"][0] == pytest.approx(nats / math.log(2) / size, rel=1e-3)
    # shares of the phases: web 70 and 50, code 20 and 20; wiki is left out
    expected = (
        0.6 * found["perplexity/web"]["metrics"]["loss"][0] + 0.2 * found["perplexity/code"]["metrics"]["loss"][0]
    ) / 0.8
    assert found["perplexity/all"]["metrics"]["loss"][0] == pytest.approx(expected)


@pytest.fixture(scope="module")
def talk(corpus: Corpus) -> Path:
    """A blend of conversations with the corpus's tokenizer, prepared: some have several answers, some are too long."""
    rng = np.random.default_rng(0)
    words = (corpus.folder / "wiki.txt").read_text().split()[:300]
    lines = []
    for number in range(60):
        turns = [(role, rng.integers(1, 6)) for role in ("user", "assistant") * (1 + number % 2)]
        turns = [(role, 40 if number % 10 == 9 and role == "assistant" else size) for role, size in turns]
        content = [{"role": role, "content": " ".join(rng.choice(words, size))} for role, size in turns]
        lines.append(json.dumps({"messages": content}) + "\n")
    (corpus.folder / "talk.jsonl").write_text("".join(lines), encoding="utf-8")
    blend = {
        "name": "talk",
        "tokenizer": {"kind": "bpe", "blend": "local"},
        "chat_template": "nemotron_h",
        "sources": {
            "talk": {
                "category": "chat",
                "format": "jsonl",
                "chat": "messages",
                "path": "talk.jsonl",
                "validation": 0.5,
            }
        },
        "phases": [{"name": "all", "weights": {"chat": 100}}],
    }
    path = corpus.folder / "talk.yaml"
    path.write_text(yaml.safe_dump(blend), encoding="utf-8")
    prepare(load_blend(path), root=corpus.root, workers=1, console=Console(file=io.StringIO()))
    return path


def test_of_conversations_the_answers_alone_count(run: Path, corpus: Corpus, talk: Path) -> None:
    """Against the training model over each conversation by itself, cut where a window ends."""
    prefix = load_manifest(corpus.root, "talk").prefix("talk", "validation")
    lengths = np.asarray(read_lengths(prefix + ".idx"))
    learnt = np.fromfile(prefix + ".loss", dtype=np.uint8)
    stream, model = TokenStream(prefix), small_model(small_config(vocab_size=400)).eval()
    assert lengths.max() > LENGTH + 1 > lengths.min()
    nats, count, everything = 0.0, 0, 0.0
    for start, length in zip(np.cumsum(lengths) - lengths, lengths.tolist(), strict=True):
        read = min(length, LENGTH + 1)
        ids = torch.from_numpy(stream.read(int(start), read))[None]
        with torch.no_grad():
            logits = model(input_ids=ids[:, :-1])[0, :, :400]
        losses = F.cross_entropy(logits.float(), ids[0, 1:], reduction="none").double().numpy()
        counted = learnt[start + 1 : start + read] == 1
        nats, count, everything = nats + losses[counted].sum(), count + counted.sum(), everything + losses.sum()
    assert 0 < count < 0.9 * np.minimum(lengths - 1, LENGTH).sum()
    invoke("eval", run, "--blend", talk, "--tokens", 0)
    entry = [e for e in record.read(run / "checkpoints" / "step-000007") if e["task"] == "perplexity/chat"][-1]
    assert entry["samples"] == count
    assert entry["metrics"]["loss"][0] == pytest.approx(nats / count, rel=1e-5)
    assert entry["metrics"]["loss"][0] != pytest.approx(everything / np.minimum(lengths - 1, LENGTH).sum(), rel=1e-3)


def test_pairs_of_answers_are_refused(run: Path, talk: Path, tmp_path: Path) -> None:
    """A rejected answer is nothing to be predicted."""
    blend = yaml.safe_load(talk.read_text())
    blend["sources"]["talk"]["chat"] = "preference"
    path = tmp_path / "pairs.yaml"
    path.write_text(yaml.safe_dump(blend), encoding="utf-8")
    with pytest.raises(UserError, match=r"holds pairs.*: held-out loss is of text or conversations") as error:
        invoke("eval", run, "--blend", path)
    assert "--blend NAME" in error.value.hint


def test_results_are_added_to_the_run(run: Path) -> None:
    before = len(record.read(run / "checkpoints" / "step-000007"))
    invoke("eval", run, "--tokens", 200)
    entries = record.read(run / "checkpoints" / "step-000007")
    assert len(entries) == before + 3
    assert (run / "evaluations.json").is_file()
    assert (entries[-1]["checkpoint"], entries[-1]["step"]) == ("step-000007", 7)
    web = entries[-3]
    assert web["task"] == "perplexity/web"
    assert web["samples"] < 300


def test_documents_start_anew(run: Path, manifest: Manifest) -> None:
    """With `document_reset` no sequence holds two documents, and together they are the windows."""
    pieces = list(heldout.sequences(manifest, "code", LENGTH, True, 0))
    whole = list(heldout.sequences(manifest, "code", LENGTH, False, 0))
    joined = np.concatenate([piece.tokens[1:] for piece in pieces])
    np.testing.assert_array_equal(joined, np.concatenate([window.tokens[1:] for window in whole]))
    assert len(pieces) > len(whole)
    end = manifest.tokenizer.eod_id
    assert all((piece.tokens[:-2] != end).all() for piece in pieces)
    text, model = load_tokenizer(manifest.tokenizer_path()), load_model(run)
    reset = heldout.score(model, text, iter(pieces))
    alone = [heldout.score(model, text, iter([piece])).nats for piece in pieces]
    assert reset.nats == pytest.approx(math.fsum(alone), rel=1e-5)  # right padding changes nothing


def test_standard_error() -> None:
    """Of equal sequences none; of independent ones that of their mean."""
    counts = np.full(100, 10)
    assert heldout.ratio_stderr(np.full(100, 20.0), counts) == 0
    sums = np.random.default_rng(0).normal(20, 5, 100)
    assert heldout.ratio_stderr(sums, counts) == pytest.approx((sums / 10).std(ddof=1) / 10)
    assert math.isnan(heldout.ratio_stderr(sums[:1], counts[:1]))


def test_refused(run: Path, corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not prepared"):
        invoke("eval", run, "--root", tmp_path)
    with pytest.raises(UserError, match=r"absent"):
        invoke("eval", run, "--blend", "absent")
    with pytest.raises(UserError, match="--dtype fp8 is unknown"):
        invoke("eval", run, "--dtype", "fp8")
    other = Corpus(tmp_path)
    other.content["tokenizer"]["train_bytes"] = "5K"
    other.prepare()
    with pytest.raises(UserError, match="prepared with another tokenizer"):
        invoke("eval", run, "--blend", other.write(), "--root", other.root)
    copy = tmp_path / "copy"  # other files, the same tokens
    copy.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(corpus.prepared / "tokenizer" / name, copy)
    write_meta(copy, "huggingface")
    invoke("eval", run, "--tokenizer", copy, "--tokens", LENGTH)
    alone = save(
        small_model(small_config(vocab_size=400)),
        tmp_path / "alone",
        data={"tokenizer": str(corpus.prepared / "tokenizer")},
    )
    with pytest.raises(UserError, match="does not tell the blend of the run"):
        invoke("eval", alone)
