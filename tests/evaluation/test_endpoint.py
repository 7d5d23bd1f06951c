"""`nemotron-h ruler` and `eval` through an endpoint: a server of our own generation answers as the engine here does."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from paper_questions import write
from small_model import VOCABULARY
from two_runs import output_of, save_two

from nemotron_h.cli.eval import evaluate
from nemotron_h.cli.ruler import ruler as command
from nemotron_h.core.errors import UserError
from nemotron_h.data.tokenizer import load_tokenizer, train_bpe
from nemotron_h.evaluation import endpoint
from nemotron_h.evaluation.long_context.make import Maker
from nemotron_h.evaluation.long_context.texts import Texts
from nemotron_h.inference.generate import generate
from nemotron_h.inference.model import load_model
from nemotron_h.inference.sampling import Sampling

pytestmark = pytest.mark.usefixtures("megatron")

TASKS = ["--tasks", "needle,phonebook", "--lengths", "450", "--samples", 3]


class Server(ThreadingHTTPServer):
    """A server of one model on a port of its own.

    Attributes:
        failures: what the next requests of answers get: a status with a body, or a kind of damage.
        bodies: of the requests that were answered.
        read: tokens that it says it has read, in place of the prompt's.
    """

    daemon_threads = True

    def __init__(self, checkpoint: Path, tokenizer: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.text = load_tokenizer(tokenizer)
        self.model = load_model(checkpoint, dtype=torch.float32, device="cpu", tokens=self.text.vocab_size)
        self.lock = threading.Lock()
        self.failures: list[Any] = []
        self.bodies: list[dict[str, Any]] = []
        self.read: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """Greedily, as a server does that knows the stop tokens by their ids."""
        with self.lock:
            (ids,) = generate(
                self.model,
                [body["prompt"]],
                max_tokens=body["max_tokens"],
                sampling=Sampling(temperature=body["temperature"]),
                stop_ids=body["stop_token_ids"],
            )
            self.bodies.append(body)
        usage = {"prompt_tokens": self.read or len(body["prompt"]), "completion_tokens": len(ids)}
        return {"choices": [{"text": self.text.ids_to_text(ids), "finish_reason": "length"}], "usage": usage}


class Handler(BaseHTTPRequestHandler):
    """The two addresses that are asked."""

    server: Server

    def do_GET(self) -> None:
        self._send(200, json.dumps({"data": [{"id": "org/small"}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            failure = self.server.failures.pop(0) if self.server.failures else None
        if failure == "broken off":
            self.connection.close()
            return
        if failure == "half":
            self._send(200, json.dumps(self.server.answer(body))[:20])
        elif failure:
            self._send(*failure)
        else:
            self._send(200, json.dumps(self.server.answer(body)))

    def _send(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def run(megatron: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a hybrid, beside the folder of its tokenizer."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "tokenizer").mkdir()
    maker = Maker("needle", 2000, 0, Texts(), lambda prompt, prefix: len(prompt))
    train_bpe([item.input for item in maker.items(20)], VOCABULARY, folder / "tokenizer")
    return save_two(folder, folder / "tokenizer")[0]


@pytest.fixture
def server(run: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(endpoint, "_WAITS", (0, 0, 0))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server(run / "checkpoints" / "step-000001", run.parent / "tokenizer") as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.shutdown()


def ask(server: Server, *arguments: object, model: str = "org/small", url: str = "") -> str:
    return output_of(command, "--endpoint", url or server.url, "--model", model, *TASKS, *arguments)


def answers_of(file: Path) -> dict[str, str]:
    return {(line := json.loads(each))["key"]: line["answer"] for each in file.read_text().splitlines()}


@pytest.mark.parametrize("chat", [[], ["--chat"]])
def test_answers_are_those_of_the_engine_here(server: Server, run: Path, tmp_path: Path, chat: list[str]) -> None:
    """Through busy servers, connections that break off and half an answer; with a tokenizer alone or a run."""
    output_of(command, run, *TASKS, *chat, "--out", tmp_path / "here")
    server.failures = [(503, "busy"), "broken off", (429, "slow down"), "half", (500, "oh")]
    ask(server, "--tokenizer", run.parent / "tokenizer", *chat, "--out", tmp_path / "there")
    here, there = (
        answers_of(tmp_path / name) for name in ("here/answers/hybrid.jsonl", "there/answers/org_small.jsonl")
    )
    assert here.keys() == there.keys()
    for key, text in here.items():
        # the engine here ends at a line, where that is all that counts
        assert there[key] == text or (there[key].startswith(text) and "\n" in text.lstrip())
    rows = [(tmp_path / name / "ruler.csv").read_text().replace("org/small", "hybrid") for name in ("here", "there")]
    assert rows[0].replace("hybrid", "org_small") == rows[1]
    assert {body["model"] for body in server.bodies} == {"org/small"}
    assert {body["temperature"] for body in server.bodies} == {0}
    asked = len(server.bodies)
    ask(server, run, *chat, "--out", tmp_path / "there")
    assert len(server.bodies) == asked  # nothing is new


def test_resumed_is_straight(server: Server, run: Path, tmp_path: Path) -> None:
    server.failures = [None, None, (400, "no more")]
    with pytest.raises(UserError, match="HTTP 400: no more") as refused:
        ask(server, run, "--at-once", 1, "--out", tmp_path / "stopped")
    assert "answers so far are kept" in refused.value.hint
    file = tmp_path / "stopped/answers/org_small.jsonl"
    assert len(server.bodies) == len(answers_of(file)) == 2
    ask(server, run, "--out", tmp_path / "stopped")
    assert len(server.bodies) == 6
    ask(server, run, "--out", tmp_path / "straight")
    assert answers_of(file) == answers_of(tmp_path / "straight/answers/org_small.jsonl")
    with pytest.raises(UserError, match="was written with chat = false, now it is true"):
        ask(server, run, "--chat", "--out", tmp_path / "straight")


def test_a_table_of_the_paper(server: Server, run: Path, tmp_path: Path) -> None:
    """Its written answers are those of the engine here; options are left out, whose likelihoods nobody tells."""
    data = write(tmp_path / "data")
    options = ["--suite", "paper_table_5", "--data", data, "--limit", 2]
    here = output_of(evaluate, run, *options)
    there = output_of(evaluate, run, *options, "--endpoint", server.url, "--model", "org/small")
    assert "mmlu: it compares likelihoods" not in here
    scores = [
        {line.split()[0]: line.split()[1:] for line in text.splitlines() if "±" in line} for text in (here, there)
    ]
    assert 0 < len(scores[1]) < len(scores[0])
    assert scores[1].items() <= scores[0].items()
    files = [run / f"evaluations/answers/step-000001-{name}.jsonl" for name in ("float32-cpu", "org_small")]
    first, second = map(answers_of, files)
    assert first.keys() == second.keys()
    assert all(text.startswith(second[key]) for key, text in first.items())  # up to the text that ends it
    with pytest.raises(UserError, match="--endpoint and --model go together"):
        output_of(evaluate, run, *options, "--model", "org/small")
    with pytest.raises(UserError, match="--endpoint is of a table"):
        output_of(evaluate, run, "--endpoint", server.url, "--model", "org/small")


LONG = "This model's maximum context length is 256 tokens. However, you requested 450 tokens"


@pytest.mark.parametrize(
    ("failures", "words", "hint"),
    [
        ([(400, LONG)], f"HTTP 400: {LONG}", "--max-model-len"),
        ([(401, "no key")], "HTTP 401: no key", "OPENAI_API_KEY"),
        ([(404, "what?")], "HTTP 404", "/v1"),
        ([(503, "busy")] * 40, "HTTP 503: busy, 4 times", "the same command continues"),
        (["half"] * 40, "ends in the middle", "the same command continues"),
        ([(200, '{"choices": []}')], "has no choices", "OpenAI-compatible"),
    ],
)
def test_failures_are_told(
    server: Server, run: Path, tmp_path: Path, failures: list[Any], words: str, hint: str
) -> None:
    server.failures = failures
    with pytest.raises(UserError) as told:
        ask(server, run, "--at-once", 1, "--out", tmp_path)
    assert words in told.value.message
    assert hint in told.value.hint


def test_mistakes_are_told_before_any_question(server: Server, run: Path, tmp_path: Path) -> None:
    for arguments, options, words in (
        ([run], {"url": "http://127.0.0.1:9/v1"}, "not reached"),
        ([run], {"url": "somewhere"}, "no address"),
        ([run], {"model": "other"}, "no such model"),
        ([], {}, "needs the tokenizer"),
        ([run, "--batch", 2], {}, "--batch does not go with --endpoint"),
    ):
        with pytest.raises(UserError, match=words):
            ask(server, *arguments, "--out", tmp_path / "none", **options)
    assert not server.bodies
    server.read = 100
    with pytest.raises(UserError, match="read 100 tokens of a prompt of"):
        ask(server, run, "--out", tmp_path / "truncated")
