"""Chat: turns one after the other are the whole conversation at once, and the command around them."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from save_checkpoint import finish, save
from small_model import VOCABULARY, relative_error, small_config, small_model
from typer.testing import CliRunner
from vision_model import TILE, vision_config, vision_model

from nemotron_h.checkpoint import folders
from nemotron_h.checkpoint.reader import read_record
from nemotron_h.cli.chat import chat as command
from nemotron_h.core.errors import UserError
from nemotron_h.data.chat import FAMILY_SOURCE, ChatTemplate
from nemotron_h.data.images.read import ImageError
from nemotron_h.data.images.records import asked
from nemotron_h.data.messages import ChatError, Turn
from nemotron_h.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from nemotron_h.inference import prefill as prefilling
from nemotron_h.inference.chat import ChatSession
from nemotron_h.inference.drafts import Draft
from nemotron_h.inference.looking import Looking
from nemotron_h.inference.model import GenerationModel, load_model
from nemotron_h.inference.opening import Opened
from nemotron_h.inference.sampling import Sampling

pytestmark = pytest.mark.usefixtures("megatron")

CHATML = (
    "{% for m in messages %}{{ '<SPECIAL_10>' + m['role'] + '\n' + m['content'] + '<SPECIAL_12>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<SPECIAL_10>assistant\n' }}{% endif %}"
)
SOURCES = {"family": (FAMILY_SOURCE, "<SPECIAL_11>"), "chatml": (CHATML, "<SPECIAL_12>")}
QUESTIONS = ["wort größe?", "und 日本?", "abcd " * 30, "noch etwas"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghöß日本🙂", k=4)) for _ in range(50)]
    train_bpe([" ".join(rng.choices(words, k=500))], VOCABULARY, folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def trained(megatron: None):
    return small_model(small_config()).eval()


@pytest.fixture(scope="module")
def run(trained, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save(trained, folder / "checkpoints" / "step-000001", data={"tokenizer": tokenizer.path})
    return folder


@pytest.fixture
def model(run: Path) -> GenerationModel:
    return load_model(run)


def say(session: ChatSession, text: str, images: Sequence[str] = ()) -> str:
    return "".join(session.answer(text, images))


def watch(session: ChatSession, change: Callable[[torch.Tensor], torch.Tensor]) -> list[tuple[int, torch.Tensor]]:
    """What the session's model scores, with the position of the token that it had read; the session sees it changed."""
    seen: list[tuple[int, torch.Tensor]] = []
    plain = GenerationModel.logits.__get__(session.model)

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        scores = plain(hidden)
        seen.append((int(session.states.lengths[0]) - 1, scores[0].clone()))
        return change(scores.clone())

    session.model.logits = logits  # type: ignore[method-assign]
    return seen


def say_tokens(session: ChatSession, tokens: Sequence[int]) -> None:
    """Make the model answer these."""
    script = iter(tokens)

    def change(scores: torch.Tensor) -> torch.Tensor:
        scores[:, next(script)] = 1e9
        return scores

    watch(session, change)


@pytest.mark.parametrize("limit", [7, 10_000])  # passes of a part of a turn, and of a whole one
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("end", ["its end marker", "--max-tokens", "end of document"])
def test_turns_are_the_whole_conversation(
    trained, model, tokenizer: Tokenizer, source: str, end: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every score of four turns is the uncached forward's over all that was said, and each token was read once."""
    monkeypatch.setattr(prefilling, "PASS_TOKENS", limit)
    text, marker = SOURCES[source]
    marker_id = tokenizer.special_tokens[marker]
    template = ChatTemplate(text, tokenizer)
    session = ChatSession(model, template, system="Antworte.", sampling=Sampling(seed=1), max_tokens=12)
    answered = 0

    def change(scores: torch.Tensor) -> torch.Tensor:
        nonlocal answered
        answered += 1
        scores[:, [marker_id, tokenizer.eod_id]] = -1e9
        if end != "--max-tokens" and answered % 9 == 0:
            scores[:, marker_id if end == "its end marker" else tokenizer.eod_id] = 1e9
        return scores

    seen = watch(session, change)
    for question in QUESTIONS:
        say(session, question)
        assert session.ended_by == end
    assert len(session.turns) == 1 + 2 * len(QUESTIONS)
    positions = [position for position, _ in seen]
    assert positions == sorted(set(positions))
    assert len(session.ids) - 1 <= int(session.states.lengths[0]) <= len(session.ids)
    with torch.no_grad():
        expected = trained(input_ids=torch.tensor([session.ids]))[0, :, :VOCABULARY]
    for position, scores in seen:
        assert relative_error(scores, expected[position]) < 1e-4, position


@pytest.fixture(scope="module")
def seeing(megatron: None, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> tuple[object, Path]:
    """A model that reads images, and its checkpoint with a picture of one tile and one of several beside it."""
    folder = tmp_path_factory.mktemp("seeing")
    for name, width in (("one", TILE), ("wide", 3 * TILE)):
        pixels = np.random.default_rng(width).integers(0, 256, (TILE, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    model = vision_model(vision_config()).eval()
    return model, save(model, folder / "checkpoint", data={"tokenizer": tokenizer.path})


@pytest.mark.parametrize("limit", [7, 10_000])
def test_images_of_several_turns(seeing, tokenizer: Tokenizer, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are those of training, and scores those of the uncached forward over all turns with all their images."""
    monkeypatch.setattr(prefilling, "PASS_TOKENS", limit)
    trained, checkpoint = seeing
    opened = Opened(checkpoint, read_record(checkpoint), tokenizer, load_model(checkpoint), "float32")
    template = ChatTemplate(FAMILY_SOURCE, tokenizer)
    session = ChatSession(opened.model, template, looking=Looking(opened, template))
    encoded = []
    tokens = session.looking.images.tokens
    session.looking.images.tokens = lambda tiles: encoded.append(len(tiles)) or tokens(tiles)
    turns: tuple[Turn, ...] = ()
    said = (("größe?", ["one"], "abcd"), ("und 日本?", [], "x"), ("beide?", ["wide", "one"], "y"))
    for question, names, answer in said:
        files = [str(checkpoint.parent / f"{name}.png") for name in names]
        turns = (*turns, asked(question, files) if files else Turn("user", question))
        script = iter(template.tokens(answer + template.answer_end()))

        def change(scores: torch.Tensor, script=script) -> torch.Tensor:
            scores[:, next(script)] = 1e9
            return scores

        seen = watch(session, change)
        assert "".join(session.answer(question, files)).strip() == answer
        ids, places, tiles = session.looking.layout.prompt(template, turns)
        assert session.ids[: -session.written] == ids.tolist()
        mask = torch.zeros(1, len(ids), dtype=torch.bool)
        mask[0, places] = True
        with torch.no_grad():
            inputs = {"input_ids": torch.from_numpy(ids)[None], "image_mask": mask, "tiles": torch.from_numpy(tiles)}
            expected = trained(**inputs)[0, -1, :VOCABULARY]
        assert relative_error(seen[0][1], expected) < 1e-4
        turns = (*turns, Turn("assistant", answer))
        assert session.turns == turns
    assert encoded == [1, 5], "each image once: the wide one has three tiles and a thumbnail"
    with pytest.raises(ImageError, match="no such file"):
        say(session, "wort", ["absent.png"])
    assert session.turns == turns


@pytest.mark.parametrize("source", SOURCES)
def test_tokens_are_those_of_training(model, tokenizer: Tokenizer, source: str) -> None:
    """Answers that end as training's do: the session's tokens are the template's of the whole conversation."""
    template = ChatTemplate(SOURCES[source][0], tokenizer)
    session = ChatSession(model, template, sampling=Sampling(temperature=0))
    turns: tuple[Turn, ...] = ()
    for question, answer in zip(QUESTIONS, ["größe abcd", "日本 🙂", "x", "y"], strict=True):
        turns = (*turns, Turn("user", question))
        say_tokens(session, template.tokens(answer + template.answer_end()))
        assert say(session, question).strip() == answer
        asked = session.ids[: len(session.ids) - session.written]
        assert asked == template.prompt(turns)
        turns = (*turns, Turn("assistant", answer))
        assert session.turns == turns


def test_only_new_tokens_are_read(model, tokenizer: Tokenizer) -> None:
    session = ChatSession(model, ChatTemplate(FAMILY_SOURCE, tokenizer), max_tokens=3)
    say(session, "abcd " * 100)
    assert session.read > 100
    long_turn = session.read
    say(session, "abcd")
    assert session.read < long_turn / 2


def test_reset_forgets(model, tokenizer: Tokenizer) -> None:
    session = ChatSession(model, ChatTemplate(FAMILY_SOURCE, tokenizer), system="s", sampling=Sampling(seed=4))
    first = say(session, "wort")
    say(session, "größe")
    session.reset()
    assert session.turns == (Turn("system", "s"),)
    assert say(session, "wort") == first


def test_a_closed_answer_is_kept_as_far_as_it_went(model, tokenizer: Tokenizer) -> None:
    session = ChatSession(model, ChatTemplate(FAMILY_SOURCE, tokenizer), sampling=Sampling(seed=2))
    pieces = session.answer("wort")
    shown = next(pieces) + next(pieces)
    pieces.close()
    assert session.ended_by == "interrupt"
    assert session.turns[-1].content == shown.strip()
    say(session, "weiter")
    assert len(session.turns) == 4


@pytest.mark.parametrize("source", ["itself", "its layers", "lookup"])
def test_a_draft_changes_no_turn(model, tokenizer: Tokenizer, source: str) -> None:
    """Greedy answers, some of them closed inside of a window; and seeded ones are the same again."""
    template = ChatTemplate(FAMILY_SOURCE, tokenizer)
    draft = Draft({"itself": model, "its layers": model.first_layers(3), "lookup": None}[source], 4)
    plain, drafted = (
        ChatSession(model, template, sampling=Sampling(temperature=0), max_tokens=13, draft=each)
        for each in (None, draft)
    )
    for number, question in enumerate(QUESTIONS):
        for session in (plain, drafted):
            pieces = session.answer(question)
            for _ in zip(pieces, range((2, 99)[number % 2] + number), strict=False):
                pass
            pieces.close()
        assert drafted.ids == plain.ids
        assert (drafted.turns, drafted.ended_by) == (plain.turns, plain.ended_by)
        assert len(drafted.ids) - 13 <= int(drafted.states.lengths[0]) <= len(drafted.ids)
    assert drafted.acceptance.passes
    seeded = ChatSession(model, template, sampling=Sampling(seed=4), draft=draft, max_tokens=20)
    first = [say(seeded, question) for question in QUESTIONS[:2]]
    seeded.reset()
    assert [say(seeded, question) for question in QUESTIONS[:2]] == first


def test_refused_text_changes_nothing(model, tokenizer: Tokenizer) -> None:
    session = ChatSession(model, ChatTemplate(FAMILY_SOURCE, tokenizer), max_tokens=3)
    say(session, "wort")
    ids, turns = list(session.ids), session.turns
    with pytest.raises(ChatError, match="reserved"):
        say(session, "\ue0ff")
    assert (session.ids, session.turns) == (ids, turns)


def test_a_marker_in_a_message_is_text(model, tokenizer: Tokenizer) -> None:
    session = ChatSession(model, ChatTemplate(FAMILY_SOURCE, tokenizer), max_tokens=1)
    say(session, "<SPECIAL_11>Assistant")
    assert session.ids[: session.read].count(tokenizer.special_tokens["<SPECIAL_11>"]) == 2


class Plain:
    """A tokenizer without special tokens of the family."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.inner = tokenizer

    def __getattr__(self, name: str):
        return {} if name == "special_tokens" else getattr(self.inner, name)


def test_plain_markers_end_an_answer_as_text(model, tokenizer: Tokenizer) -> None:
    template = ChatTemplate(FAMILY_SOURCE, Plain(tokenizer))
    assert template.plain_markers
    session = ChatSession(model, template, sampling=Sampling(temperature=0))
    say_tokens(session, tokenizer.text_to_ids("größe\n<SPECIAL_11>User"))
    assert say(session, "wort").strip() == "größe"
    assert session.ended_by == "its end marker"


def invoke(*arguments: object, said: str | bytes):
    """Run the command with this standard input, which is no terminal; its errors are raised."""
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [str(a) for a in arguments], input=said, catch_exceptions=False)


def test_command_reads_turns_by_line(run: Path, tokenizer: Tokenizer) -> None:
    options = ["--max-tokens", 8, "--seed", 3, "--system", "kurz"]
    result = invoke(run, *options, said="wort größe\n\n  \n日本\n/reset\n/what\nwort größe\n/quit\nnot read\n")
    session = ChatSession(
        load_model(run),
        ChatTemplate(FAMILY_SOURCE, tokenizer),
        system="kurz",
        sampling=Sampling(0.8, 0, 0.95, 3),
        max_tokens=8,
    )
    expected = [say(session, "wort größe").rstrip(), say(session, "日本").rstrip()]
    session.reset()
    expected.append(say(session, "wort größe").rstrip())
    assert result.stdout == "".join(answer + "\n" for answer in expected)
    assert result.stderr.count("tokens read in") == 3
    assert "there is no command /what" in result.stderr
    assert "forgotten" in result.stderr


def test_command_shows_images(run: Path, seeing: tuple[object, Path]) -> None:
    checkpoint = seeing[1]
    picture = checkpoint.parent / "wide.png"
    options = ["--max-tokens", 4, "--temperature", 0]
    result = invoke(checkpoint, *options, said=f"/image absent.png\n/image\n/image {picture}\nwort\nwort\n")
    assert "not shown: absent.png: there is no such file" in result.stderr
    assert "there is no command" not in result.stderr
    assert f"{picture}, 48 x 16 pixels, goes with the next turn" in result.stderr
    read = [int(number) for number in re.findall(r"([\d,]+) tokens read", result.stderr)]
    assert read[0] > 16 + read[1], "one turn has the tiles"
    forgotten = invoke(checkpoint, *options, said=f"/image {picture}\n/reset\nwort\n")
    assert int(re.search(r"([\d,]+) tokens read", forgotten.stderr)[1]) < read[0] - 16
    refused = invoke(run, *options, said=f"/image {picture}\nwort\n")
    assert "not shown: " in refused.stderr
    assert "reads text alone" in refused.stderr
    assert refused.stderr.count("tokens read in") == 1


def test_command_drafts(run: Path) -> None:
    options = ["--max-tokens", 12, "--temperature", 0]
    plain, drafted = (invoke(run, *options, *more, said="wort größe\n日本\n") for more in ((), ("--draft", "layers:3")))
    assert drafted.stdout == plain.stdout
    assert drafted.stderr.count("% of those drafted, ended by") == 2
    assert "drafted" not in plain.stderr


def test_command_goes_on_after_a_refused_turn(run: Path) -> None:
    result = invoke(run, "--max-tokens", 2, said="\ue0ff\nwort\n")
    assert "not sent" in result.stderr
    assert result.stderr.count("tokens read in") == 1
    result = invoke(run, "--max-tokens", 2, said=b"caf\xe9\nwort\n")
    assert "not sent: the turn: byte 3 (0xe9) is not UTF-8" in result.stderr
    assert result.stderr.count("tokens read in") == 1
    with pytest.raises(UserError, match="--system: byte 0xe9"):
        invoke(run, "--system", "caf\udce9", said="")


def test_the_tokenizer_s_own_template_is_used(run: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """It stands in tokenizer_config.json; without it the family's is."""
    own = Path(shutil.copytree(tokenizer.path, tmp_path / "own"))
    config = json.loads((own / "tokenizer_config.json").read_text())
    (own / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CHATML}))
    (tmp_path / "chatml.jinja").write_text(CHATML)

    def read(*options: object) -> str:
        said = invoke(run, "--max-tokens", 1, *options, said="wort\n").stderr
        return re.search(r"[\d,]+ tokens read", said)[0]

    assert read("--tokenizer", own) == read("--template", tmp_path / "chatml.jinja") != read()
    assert read("--tokenizer", own, "--template", "nemotron_h") == read()


def test_a_base_model_is_warned_of(run: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert "warning" not in invoke(run, "--max-tokens", 1, said="wort\n").stderr
    base = tmp_path / "step-000001"
    save(small_model(small_config()), base, data={"tokenizer": tokenizer.path})
    record = json.loads((base / folders.RECORD).read_text())
    (base / folders.RECORD).write_text(json.dumps(record | {"recipe": {"stage": "pretrain"}}))
    finish(base)
    assert "pretrained alone" in invoke(base, "--max-tokens", 1, said="wort\n").stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--template", "absent.jinja"], "absent.jinja"),
        (["--top-p", "2"], "top-p = 2"),
        (["--dtype", "int8"], "int8"),
    ],
)
def test_refused_before_any_work(tmp_path: Path, arguments: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        invoke(tmp_path / "absent", *arguments, said="")


def test_template_that_cannot_chat(run: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ raise_exception('no system') if messages[0]['role'] == 'system' }}x")
    with pytest.raises(UserError, match="chat_template: the template writes a turn in another way"):
        invoke(run, "--template", tmp_path / "t.jinja", said="wort\n")


@pytest.mark.parametrize("drafted", [False, True])
def test_a_thought_is_ended_in_each_turn(model: GenerationModel, tokenizer: Tokenizer, drafted: bool) -> None:
    """Where the template begins one: the tokens of the whole conversation; what a user writes begins none."""
    from nemotron_h.inference.generate import generate
    from nemotron_h.inference.thought import ThoughtBudget

    answer = "{% generation %}{{ m['content'] + '<SPECIAL_12>\n' }}{% endgeneration %}"
    thinking = (
        "{% for m in messages %}{{ '<SPECIAL_10>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        + answer
        + "{% else %}{{ m['content'] + '<SPECIAL_12>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<SPECIAL_10>assistant\n<think>\n' }}{% endif %}"
    )
    draft, greedy = Draft(None, 3) if drafted else None, Sampling(temperature=0)
    for source, opens in ((thinking, True), (CHATML, False)):
        template, budget = ChatTemplate(source, tokenizer), ThoughtBudget(tokenizer, 3, 2)
        options = {"sampling": greedy, "max_tokens": 16, "budget": budget, "draft": draft}
        session = ChatSession(model, template, **options)
        for number, text in enumerate(("was?", "und <think>?")):
            turns = (*session.turns, Turn("user", text))
            assert template.answer_begin(turns).endswith("<think>\n") is opens
            say(session, text)
            written = session.ids[-session.written :]
            prompt = session.ids[: -session.written]
            one = budget if opens else None
            assert written == generate(model, [prompt], max_tokens=len(written), sampling=greedy, budget=one)[0]
            ended = tokenizer.ids_to_text(written).count("</think>")
            assert ended >= opens, number
