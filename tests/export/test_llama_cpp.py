"""Exported GGUF files in llama.cpp's server, loaded unmodified: probabilities, tokens, texts, conversations.

llama.cpp needs an environment of its own: NEMOTRON_H_GGUF_PYTHON names its interpreter (default: the one that
`make test-gguf` sets up).
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from run_transformers import CONVERSATION
from save_checkpoint import save
from small_model import VOCABULARY, pure_config, small_config, small_model, tokens

from nemotron_h.data.chat import FAMILY_SOURCE, ChatTemplate
from nemotron_h.data.messages import Turn
from nemotron_h.data.tokenizer import PROBES, TiktokenTokenizer, Tokenizer, load_tokenizer, train_bpe, write_meta
from nemotron_h.export import gguf_writer
from nemotron_h.inference.generate import generate
from nemotron_h.inference.model import load_model
from nemotron_h.inference.sampling import Sampling

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("NEMOTRON_H_GGUF_PYTHON", ROOT / ".bench" / "gguf" / "bin" / "python"))
pytestmark = [
    pytest.mark.skipif(not PYTHON.is_file(), reason=f"no {PYTHON}; `make test-gguf` sets it up"),
    pytest.mark.usefixtures("megatron"),
]

LENGTH = 300  # our chunks have 128 tokens: two whole ones and a part
PROMPTS = (1, 2, 64, 65, 127, 128, 129, 200, 255, 256, 257, 299)
GENERATED = 20
CONFIGS = {
    "groups_1": lambda: small_config(1),
    "groups_2": lambda: small_config(2),
    "groups_8": lambda: small_config(8),
    "pruned": lambda: small_config(pattern="MM*-M--", ffn_hidden_size=56),
    "mamba2": lambda: pure_config("M"),
    "experts": lambda: pure_config("E"),
    "experts_one_of_six": lambda: pure_config("E", experts_per_token=1),
    "falcon_h1": lambda: pure_config("PS"),
    "falcon_h1_no_norm": lambda: pure_config("PS", mamba_norm=False, mamba_num_groups=1),
}
EXACT = 1e-4  # of log-probabilities at weights of scale 1; 6e-6 is seen
#: type of the file -> largest difference of a log-probability, about twice what is seen
ROUNDED = {"f16": 0.04, "bf16": 0.2, "q8_0": 0.5}


@dataclass(frozen=True)
class Case:
    """An exported model: the checkpoint, and what llama.cpp made of the file."""

    checkpoint: Path
    answer: dict

    @property
    def theirs(self) -> torch.Tensor:
        """Log-probabilities [prompts, vocabulary]."""
        return torch.tensor(self.answer["log_probabilities"])

    def ours(self) -> torch.Tensor:
        """The same of our model, in float32."""
        model = load_model(self.checkpoint)
        ids = tokens(1, LENGTH)
        logits = model.logits(model.extend(ids, model.new_states(1, LENGTH)))[0]
        assert logits.std() > 0.5  # at the scale that the tolerance is meant for
        return logits[[length - 1 for length in PROMPTS]].log_softmax(-1)


def tiktoken_of(ranked: list[bytes], folder: Path) -> Tokenizer:
    """The same vocabulary in Tekken's format."""
    folder.mkdir()
    vocab = [{"rank": r, "token_bytes": base64.b64encode(token).decode()} for r, token in enumerate(ranked)]
    content = {"config": {"default_vocab_size": len(vocab) + 20}, "vocab": vocab}
    (folder / "tekken.json").write_text(json.dumps(content))
    write_meta(folder, "tiktoken", file="tekken.json", num_special_tokens=20, pattern="")
    return load_tokenizer(folder)


def real_texts() -> list[str]:
    """This repository's own pages and sources."""
    files = [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "collections").rglob("*.py"))[:40]]
    return [file.read_text(encoding="utf-8") for file in files]


@pytest.fixture(scope="module")
def cases(megatron: None, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """All models, exported, and read by one llama.cpp process."""
    root, checkpoints, files = tmp_path_factory.mktemp("llama"), {}, {}
    ids = tokens(1, LENGTH)[0].tolist()
    prompts = [ids[:length] for length in PROMPTS]

    def add(name: str, checkpoint: Path, text: Tokenizer | None, kind: str, **request: object) -> None:
        checkpoints[name] = checkpoint
        gguf_writer.write(gguf_writer.plan(checkpoint, text, kind), root / f"{name}.gguf")
        files[name] = [str(root / f"{name}.gguf"), request]

    data = {"tokenizer": str(tokenizer), "seq_length": 512}
    for name, config in CONFIGS.items():
        checkpoint = save(small_model(config()), root / name / "checkpoint", data=data)
        add(name, checkpoint, load_tokenizer(tokenizer), "f32", prompts=prompts)
    add("small_batches", checkpoints["groups_2"], load_tokenizer(tokenizer), "f32", prompts=prompts, batch=7)
    wide = save(small_model(small_config(hidden_size=64)), root / "wide" / "checkpoint", data=data)
    for kind in ROUNDED:
        add(kind, wide, load_tokenizer(tokenizer), kind, prompts=prompts)
    for kind in ("bpe", "tiktoken"):
        text = train_bpe(real_texts(), 3000, tmp_path_factory.mktemp("bpe"))
        if kind == "tiktoken":
            text = tiktoken_of(text._ranked, root / "tekken")
        model = save(small_model(small_config(vocab_size=text.vocab_size)), root / kind / "checkpoint", data=data)
        add(
            kind,
            model,
            text,
            "f16",
            texts=[*PROBES, *real_texts()],
            vocabulary=text.vocab_size,
            turn_token=text.tokens_to_ids("<SPECIAL_11>"),
        )
    request = {
        "files": files,
        "batch": 64,
        "vocabulary": VOCABULARY,
        "plain_token": 10,
        "prompts": [ids],
        "generated": GENERATED,
        "texts": [],
        "conversation": CONVERSATION,
    }
    (root / "request.json").write_text(json.dumps(request))
    command = [str(PYTHON), str(Path(__file__).with_name("run_llama_cpp.py")), str(root / "request.json")]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads((root / "answer.json").read_text())
    return {name: Case(checkpoint, answers[name]) for name, checkpoint in checkpoints.items()}


@pytest.mark.parametrize("name", [*CONFIGS, "small_batches"])
def test_probabilities(cases: dict[str, Case], name: str) -> None:
    torch.testing.assert_close(cases[name].theirs, cases[name].ours(), atol=EXACT, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_generated_tokens(cases: dict[str, Case], name: str) -> None:
    case, sampling = cases[name], Sampling(temperature=0)
    prompt = tokens(1, LENGTH)[0, : PROMPTS[-1]].tolist()
    expected = generate(load_model(case.checkpoint), [prompt], max_tokens=GENERATED, sampling=sampling)[0]
    actual = case.answer["generated"]
    assert actual == expected[: len(actual)]
    assert len(actual) == GENERATED or case.answer["stop"] == "eos"


@pytest.mark.parametrize("kind", ROUNDED)
def test_rounded_matrices(cases: dict[str, Case], kind: str) -> None:
    difference = (cases[kind].theirs - cases[kind].ours()).abs().max().item()
    assert 1e-4 < difference < ROUNDED[kind]


@pytest.mark.parametrize("kind", ["bpe", "tiktoken"])
def test_texts_are_the_same_tokens(cases: dict[str, Case], kind: str, tmp_path: Path) -> None:
    text = train_bpe(real_texts(), 3000, tmp_path)
    if kind == "tiktoken":
        text = tiktoken_of(text._ranked, tmp_path / "tekken")
        assert isinstance(text, TiktokenTokenizer)
    texts = [*PROBES, *real_texts()]
    for content, ids, back in zip(texts, cases[kind].answer["ids"], cases[kind].answer["back"], strict=True):
        assert ids == text.text_to_ids(content), content[:80]
        assert back == content


def test_conversation(cases: dict[str, Case], tmp_path: Path) -> None:
    text = train_bpe(real_texts(), 3000, tmp_path)
    turns = tuple(Turn(message["role"], message["content"]) for message in CONVERSATION)
    assert cases["bpe"].answer["chat"] == (
        "<SPECIAL_10>System\nBe brief.\n<SPECIAL_11>User\ngröße 日本?\n<SPECIAL_11>Assistant\nabc\n"
        "<SPECIAL_11>User\ndef\n<SPECIAL_11>Assistant\n"
    )
    assert cases["bpe"].answer["chat_ids"] == ChatTemplate(FAMILY_SOURCE, text).prompt(turns)  # as in training
    assert cases["bpe"].answer["end_of_answer"] == "eos"
