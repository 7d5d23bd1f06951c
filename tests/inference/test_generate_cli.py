"""`nemotron-h generate`: the text, the summary, and errors before any work."""

from __future__ import annotations

import codecs
import io
import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
import typer
from save_checkpoint import finish, save
from small_model import VOCABULARY, small_config, small_model
from typer.testing import CliRunner

from nemotron_h.cli.generate import generate as command
from nemotron_h.cli.generate import read_prompts
from nemotron_h.core.errors import UserError
from nemotron_h.data.tokenizer import load_tokenizer, train_bpe
from nemotron_h.inference.generate import generate
from nemotron_h.inference.model import GenerationModel, load_model
from nemotron_h.inference.sampling import Sampling

pytestmark = pytest.mark.usefixtures("megatron")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghöß日本🙂", k=4)) for _ in range(50)]
    train_bpe([" ".join(rng.choices(words, k=500))], VOCABULARY, folder)
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
    expected = generate(model, [ids], max_tokens=30, sampling=sampling, stop_ids=[text.eod_id])[0]
    assert result.stdout == text.ids_to_text(expected) + "\n"
    for word in (f"{len(ids)} tokens read", f"{len(expected)} generated", "tokens/s", "step-000001"):
        assert word in result.stderr


def test_a_thought_is_ended_at_its_budget(run: Path) -> None:
    """In the prompt that begins one alone; at once where the prompt's line has ended."""
    result = invoke(run, "a <think>\n", "wort", "--thought-budget", 0, "--max-tokens", 12, "--seed", 3)
    first = re.search(r"^\[1\] a <think>\n(.*?)^\[2\] wort", result.stdout, re.MULTILINE | re.DOTALL)[1]
    assert first.startswith("</think>")
    assert "</think>" not in result.stdout.replace(first, "", 1)
    assert "1 of 1 thoughts ended at the budget" in result.stderr


def test_empty_prompt_begins_a_document(run: Path) -> None:
    assert invoke(run, "", "--max-tokens", 1).exit_code == 0


def test_wrong_tokenizer(run: Path, tmp_path: Path) -> None:
    train_bpe(["abc abd abe " * 50, "xyz xyw " * 50], 265, tmp_path)
    with pytest.raises(UserError, match=r"gives tokens other ids than .*tokenizer.*, with which .*step-000001 was"):
        invoke(run, "x", "--tokenizer", tmp_path)


def test_no_tokenizer(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no prepared tokenizer"):
        invoke(run, "x", "--tokenizer", tmp_path)
    folder = save(small_model(small_config()), tmp_path / "step-000001")
    with pytest.raises(UserError, match="does not tell the tokenizer") as error:
        invoke(folder, "x")
    assert "--tokenizer" in error.value.hint


def test_several_prompts_are_each_alone(run: Path, tokenizer: Path, tmp_path: Path) -> None:
    """As JSON, in the order of the prompts, whatever batch they come in; the second goes through a file."""
    file = tmp_path / "more.jsonl"
    file.write_text('{"prompt": "日本 wort"}\n\n{"prompt": "abcd efgh abcd"}\n')
    options = ["--max-tokens", 12, "--json", "--seed", 3]
    rows = [json.loads(line) for line in invoke(run, "größe", "--prompts", file, *options).stdout.splitlines()]
    assert [row["prompt"] for row in rows] == ["größe", "日本 wort", "abcd efgh abcd"]
    one_by_one = invoke(run, "größe", "--prompts", file, "--batch", 1, *options).stdout.splitlines()
    assert [json.loads(line) for line in one_by_one] == rows
    text, model = load_tokenizer(tokenizer), load_model(run)
    for number, row in enumerate(rows):
        sampling = Sampling(temperature=0.8, top_p=0.95, seed=3 + number)
        ids = text.text_to_ids(row["prompt"])
        assert row["tokens"] == generate(model, [ids], max_tokens=12, sampling=sampling, stop_ids=[text.eod_id])[0]
        assert row["text"] == text.ids_to_text(row["tokens"])
        assert row["ended_by"] == ("--max-tokens" if len(row["tokens"]) == 12 else "end of document")


def test_several_prompts_as_text(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("first prompt\r\n\nsecond\n")
    result = invoke(run, "--prompts", file, "--max-tokens", 3)
    assert result.stdout.startswith("[1] first prompt")
    assert "\n[2] second" in result.stdout
    assert "generated" in result.stderr


def test_stop_strings(run: Path) -> None:
    options = ["--max-tokens", 40, "--json", "--seed", 2]
    free = json.loads(invoke(run, "größe", *options).stdout)
    stop = free["text"][len(free["text"]) // 2 :][:2]
    assert len(free["tokens"]) > 4
    row = json.loads(invoke(run, "größe", "--stop", stop, "--stop", "never this", *options).stdout)
    assert row["text"] == free["text"][: free["text"].index(stop)]
    assert row["ended_by"] == f"--stop {stop!r}"
    assert len(row["tokens"]) < len(free["tokens"])
    streamed = invoke(run, "größe", "--stop", stop, *options[:2], *options[3:])
    assert streamed.stdout == row["text"] + "\n"
    assert f"ended by --stop {stop!r}" in streamed.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x", "--dtype", "float31"], "float31"),
        (["x", "--device", "tpu"], "--device tpu is unknown"),
        (["x", "--top-p", "1.5"], "top-p = 1.5"),
        (["x", "--top-p", "0"], "top-p = 0"),
        (["x", "--stop", ""], "--stop is empty"),
        (["--prompts", "absent.txt"], "--prompts absent.txt: No such file"),
        ([], "nothing to continue"),
        (["x", "caf\udce9"], "prompt 2: byte 0xe9 at character 3 is not UTF-8"),
        (["x", "--stop", "\ud800"], "--stop: lone surrogate U+D800"),
        (["x", "--draft-tokens", "3"], "--draft-tokens: there is no --draft"),
        (["x", "--draft", "layers:half"], "--draft layers:half: 'half' is no number of layers"),
    ],
)
def test_refused_before_any_work(tmp_path: Path, arguments: list[str], words: str) -> None:
    """The checkpoint is not even looked for; but for the device, whose check needs torch."""
    with pytest.raises(UserError, match=re.escape(words)):
        invoke(tmp_path / "absent", *arguments)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b" \n\n", "has no prompts"),
        ("a.txt", b"\xff\xfex\0", "UTF-16 text, not UTF-8"),
        ("a.txt", b"one\ncaf\xe9\n", r"a\.txt: byte 7 \(0xe9, line 2\) is not UTF-8"),
        ("a.jsonl", b'{"prompt": "\\ud800"}', "line 1: lone surrogate"),
        ("a.jsonl", b"[" * 100_000, "line 1: .*nested too deep"),
        ("a.jsonl", b'{"prompt": "x"}\n{"text": "y"}', "line 2"),
        ("a.jsonl", b'{"prompt": 3}', "line 1: prompt is int"),
        ("a.jsonl", b"[1]", "line 1"),
    ],
)
def test_bad_prompt_files(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        invoke(tmp_path, "--prompts", tmp_path / name)


def test_drafts(run: Path, tokenizer: Path, tmp_path: Path) -> None:
    """The same greedy text, whatever drafts it, and how much of that was accepted."""
    other = save(small_model(small_config(pattern="M-M-"), seed=1), tmp_path / "d", data={"tokenizer": str(tokenizer)})
    prompts = ["größe", "日本 wort wort wort", "--max-tokens", 20, "--temperature", 0]
    plain = invoke(run, *prompts)
    assert "draft" not in plain.stderr
    accepted = {run: "3.00 drafted tokens accepted per pass, 100% of those drafted", other: r"accepted|nothing drafted"}
    for draft in (run, other, "lookup", "layers:2"):
        result = invoke(run, *prompts, "--draft", draft, "--draft-tokens", 3)
        assert result.stdout == plain.stdout
        assert re.search(accepted.get(draft, accepted[other]), result.stderr)
        assert f"3 tokens drafted by {'its first 2 layers' if draft == 'layers:2' else draft}" in result.stderr


def test_drafts_that_cannot_draft(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--draft layers:7: .*step-000001 has 7 layers"):
        invoke(run, "x", "--draft", "layers:7")
    for name, data in (("another", {"tokenizer": str(tmp_path / "t")}), ("untold", None)):
        save(small_model(small_config(pattern="M-")), tmp_path / name, data=data)
    (tmp_path / "t").mkdir()
    train_bpe(["abc abd abe " * 50, "xyz xyw " * 50], 265, tmp_path / "t")
    with pytest.raises(UserError, match=r"another: .* tokenizer .*/t, which gives .* ids than .*, the .* of .*run"):
        invoke(run, "x", "--draft", tmp_path / "another")
    with pytest.raises(UserError, match=r"untold: its run.json does not tell its tokenizer, which has to be .*run"):
        invoke(run, "x", "--draft", tmp_path / "untold")


def test_negative_temperature_is_a_usage_error(run: Path) -> None:
    result = invoke(run, "x", "--temperature", -1)
    assert result.exit_code == 2
    assert "--temperature" in result.output


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in (("a.txt", b"alpha\n"), ("a.jsonl", b'{"prompt": "alpha"}\n')):
        (tmp_path / name).write_bytes(codecs.BOM_UTF8 + content)
        assert read_prompts(str(tmp_path / name)) == ["alpha"]
    for content in (b"alpha\n", b"caf\xe9\n"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(codecs.BOM_UTF8 + content)))
        if content.isascii():
            assert read_prompts("-") == ["alpha"]
        else:
            with pytest.raises(UserError, match=r"--prompts -: byte 6 \(0xe9"):
                read_prompts("-")


def test_names_of_folders_are_no_markup(run: Path, tmp_path: Path) -> None:
    """In the last line, which names the checkpoint."""
    checkpoint = Path(shutil.copytree(run / "checkpoints" / "step-000001", tmp_path / "step[bold]"))
    assert "step[bold], float32 on cpu" in invoke(checkpoint, "x", "--max-tokens", 1).stderr


def test_weights_and_scores_that_are_no_numbers(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(small_config())
    with torch.no_grad():
        model.decoder.layers[0].mixer.out_proj.weight[3, 5] = float("nan")
        model.decoder.final_norm.weight[0] = float("inf")
    wrong = save(model, tmp_path / "wrong")
    with pytest.raises(
        UserError, match=r"wrong: NaN or infinite weights in decoder\.final_norm\.weight, decoder.*out_pr"
    ):
        load_model(wrong)
    scores = GenerationModel.logits

    def overflow(self: GenerationModel, hidden: torch.Tensor) -> torch.Tensor:
        return scores(self, hidden) * float("inf")

    monkeypatch.setattr(GenerationModel, "logits", overflow)
    for temperature in (0, 0.8):
        with pytest.raises(UserError, match="scores of the next token are not finite"):
            invoke(run, "x", "--temperature", temperature)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("integrity.json", "{}", "is not a finished checkpoint: .* lists no files"),
        ("integrity.json", '{"run.json": 5}', "is not a finished checkpoint: .*run.json is 5, not its size and sha256"),
        ("integrity.json", "[1]", "does not hold a JSON object"),
        ("run.json", "[" * 100_000, "run.json: .*nested too deep"),
        ("run.json", "[]", "run.json does not hold a JSON object"),
        ("run.json", '{"data": [3]}', "run.json: data is no mapping"),
        ("run.json", {"tokenizer": 5}, "run.json: data.tokenizer is 5, not a folder"),
        ("run.json", {"tokenizer": None}, "does not tell the tokenizer"),
    ],
)
def test_records_of_another_shape(run: Path, tmp_path: Path, name: str, content: object, words: str) -> None:
    checkpoint = Path(shutil.copytree(run / "checkpoints" / "step-000001", tmp_path / "c"))
    if isinstance(content, dict):
        content = json.dumps(json.loads((checkpoint / name).read_text()) | {"data": content})
    (checkpoint / name).write_text(content)
    if name != "integrity.json":
        finish(checkpoint)
    with pytest.raises(UserError, match=words):
        invoke(checkpoint, "x")
