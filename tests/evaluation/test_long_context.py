"""Items of long-context tasks: each answer follows from its prompt, lengths are kept, scores are the published ones."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from long_context_texts import write_texts
from typer.testing import CliRunner

from nemotron_h.cli.data import app as data_app
from nemotron_h.cli.ruler import ruler as command
from nemotron_h.core.errors import UserError
from nemotron_h.data.blend import load_blend
from nemotron_h.data.tokenizer import load_tokenizer, train_bpe
from nemotron_h.evaluation.long_context import texts as texts_module
from nemotron_h.evaluation.long_context.item import Item, read_items
from nemotron_h.evaluation.long_context.make import Maker, write_items
from nemotron_h.evaluation.long_context.results import Answered, results_of
from nemotron_h.evaluation.long_context.scores import clean, score
from nemotron_h.evaluation.long_context.search import largest
from nemotron_h.evaluation.long_context.tasks import PUBLISHED, TASKS, tasks_named
from nemotron_h.evaluation.long_context.texts import Texts


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    return Texts(write_texts(tmp_path_factory.mktemp("texts")))


def words_of(prompt: str, prefix: str) -> int:
    """Count tokens of a simple tokenizer: words, digits and signs."""
    return len(re.findall(r"[A-Za-z]+|\S", prompt + prefix))


@pytest.mark.parametrize(
    ("rule", "text", "references", "value"),
    [
        ("all", "The numbers are 12 and 34.", ["12", "34"], 1),
        ("all", "12", ["12", "34", "56"], 1 / 3),
        ("all", "it is RED-fox", ["red-Fox"], 1),
        ("all", "12\x00\x0734", ["12\n\n34"], 1),
        ("all", "12\t34", ["12\t34"], 0),  # a control character of the answer becomes a line end, not the reference's
        ("all", "12\x7f34", ["12\x7f34"], 1),
        ("all", "STRASSE", ["straße"], 0),  # lower case, not case folding
        ("all", "\n\x00 ", ["x"], 0),
        ("all", "1234567", ["345"], 1),
        ("part", "in paris", ["Lyon", "Paris"], 1),
        ("part", "Rome", ["Lyon", "Paris"], 0),
        ("line", " 555-0199\nWhat is", ["555-0199"], 1),
        ("line", "555-01990", ["555-0199"], 0),
        ("line", "it is 555-0199", ["555-0199"], 0),
    ],
)
def test_scores(rule: str, text: str, references: list[str], value: float) -> None:
    assert score(rule, text, references) == pytest.approx(value)


def test_clean_answers() -> None:
    assert clean(" \x00a\x1fb\x7f\r\n") == "a\nb\x7f"


def test_scores_as_the_package(texts: Texts) -> None:
    """Scores of 200 items whose answers have some of the references are those of RULER's own functions, one by one."""
    package = "long_context_eval.eval.synthetic.constants"
    theirs = pytest.importorskip(package, reason="nvidia-long-context-eval is not installed")
    rng, seen = random.Random(0), set()
    for name in PUBLISHED:
        rule = theirs.TASKS["qa" if TASKS[name].rule == "part" else "niah"]
        items = [*Maker(name, 900, 0, texts, words_of).items(16)]
        answers = []
        for item in items:
            said = [each.swapcase() for each in item.references if rng.random() < 0.6]
            answers.append(rng.choice(["\n", "\t, ", "\x00"]).join(["It is", *said, item.references[0][:-1], ""]))
        published = [re.sub(r"[\x00-\x1f]", "\n", answer.strip()).strip() for answer in answers]
        references = [item.references for item in items]
        own = [score(item.rule, answer, item.references) for item, answer in zip(items, answers, strict=True)]
        assert [100 * each for each in own] == rule["metric_fn_per_sample"](published, references)
        assert round(100 * sum(own) / len(own), 2) == rule["metric_fn"](published, references)
        seen |= {*own}
    assert len(PUBLISHED) * 16 > 200
    assert {0, 1} < seen


def test_the_largest_that_fits() -> None:
    for limit in range(60):
        for least, step, most in ((1, 1, None), (5, 5, None), (3, 7, 40), (10, 10, 5), (4, 1, 30)):
            sizes = range(least, max(limit, most or limit, least) + step, step)
            fitting = [size for size in sizes if size <= limit and (size == least or most is None or size <= most)]
            assert largest(lambda units, limit=limit: units <= limit, least, step, most) == max(fitting, default=None)


def _needles(item: Item) -> list[str]:
    """Read an item as one who has it before him: the values of the keys that are asked for."""
    kind, query = re.search(r"the special magic (\w+) for (.*) mentioned in the provided text\?$", item.prompt).groups()
    plural = kind if kind.endswith("s") else f"{kind}s"
    keys = re.split(r", and |, ", query)
    found = [
        re.findall(rf"One of the special magic {plural} for {key} is: (\S+)\.(?:\s|$)", item.prompt) for key in keys
    ]
    assert len(found) in (1, 4)
    return [value for several in found for value in several]


def _chain(item: Item) -> list[str]:
    *_, text = item.prompt.split("Memorize and track")
    value, names = re.search(r"assigned the value (\d+) in", text)[1], []
    for name, of in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text):
        if of == value or of in names:
            names.append(name)
    return names


def _common(item: Item) -> list[str]:
    listed = re.findall(r"\d+\. (\S+)", item.prompt.split("Below is a numbered list")[-1])
    (*ten, eleventh) = Counter(listed).most_common(11)
    assert min(count for _, count in ten) > eleventh[1]
    return [word for word, _ in ten]


def _frequent(item: Item) -> list[str]:
    coded = re.search(r"coded words\. (.*)\nQuestion", item.prompt)[1].split()
    ranked = Counter(coded).most_common(5)
    assert ranked[0][0] == "..."
    assert len({count for _, count in ranked}) == 5, "nothing is as frequent as what is asked for"
    return [word for word, _ in ranked[1:4]]


def _question(item: Item) -> list[str]:
    capitals = dict(re.findall(r"the capital of (\w+) is (\w+)\.", item.prompt))
    return [capitals[re.search(r"Question: .* capital of (\w+)\?", item.prompt)[1]]]


def _number(item: Item) -> list[str]:
    book, *_, asked = re.split(r"What is the phone number for (.*)\?\n", item.prompt)[:-1]
    return [dict(re.findall(r"^(.+): (\S+)$", book, re.MULTILINE))[asked]]


SOLVERS: dict[str, Callable[[Item], list[str]]] = {
    **{name: _needles for name in TASKS if name.startswith("niah") or name == "needle"},
    "vt": _chain,
    "cwe": _common,
    "fwe": _frequent,
    "qa_1": _question,
    "qa_2": _question,
    "phonebook": _number,
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [900, 4200])
def test_an_answer_follows_from_its_prompt(task: str, length: int, texts: Texts) -> None:
    maker = Maker(task, length, 7, texts, words_of)
    items = list(maker.items(4))
    assert items == list(Maker(task, length, 7, texts, words_of).items(4))
    assert items[:2] == list(maker.items(2)), "more items are more of the same"
    assert items[0] != next(Maker(task, length, 8, texts, words_of).items(1))
    for item in items:
        assert sorted(SOLVERS[task](item)) == sorted(item.references)
        assert item.tokens == words_of(item.prompt, item.prefix) <= length - item.max_tokens
        assert score(item.rule, ", ".join(item.references), item.references) == 1
        assert score(item.rule, "none", item.references) == 0
    assert len({item.key for item in items}) == 4
    # with a step more the item that decided does not fit, or there is nothing to add
    top = maker.sizes[-1] + maker.task.step_at(length)
    most = maker.task.most(texts)
    draft = maker.draft(items[0].number, top)
    assert words_of(draft.prompt, draft.prefix) > length - items[0].max_tokens or (most is not None and top > most)


@pytest.mark.parametrize("task", ["needle", "phonebook", "niah_single_2", "niah_multiquery"])
def test_depths_are_where_answers_stand(task: str, texts: Texts) -> None:
    items = list(Maker(task, 1500, 3, texts, words_of).items(20))
    for item in items:
        for reference, depth in zip(item.references, item.depths, strict=True):
            place = item.prompt.index(reference) / len(item.prompt)
            assert abs(place - depth) < 0.2
    if not TASKS[task].published:  # evenly, however few there are
        assert sorted(int(10 * item.depths[0]) for item in items[:10])[::3] == [0, 3, 6, 9]


def test_prompts_are_the_published_ones(texts: Texts) -> None:
    one = next(Maker("niah_single_1", 400, 1, texts, words_of).items(1))
    key = re.search(r"for (\S+) mentioned", one.prefix)[1]
    begin, *_, end = one.prompt.split("\n")
    assert begin == (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the number afterwards."
    )
    assert end == f"What is the special magic number for {key} mentioned in the provided text?"
    assert one.prefix == f" The special magic number for {key} mentioned in the provided text is"
    several = next(Maker("niah_multivalue", 900, 1, texts, words_of).items(1))
    assert several.prompt.startswith("Some special magic numbers are hidden within")
    assert "What are all the special magic numbers for " in several.prompt
    assert several.prefix.endswith(" mentioned in the provided text are")
    assert next(Maker("niah_single_3", 900, 1, texts, words_of).items(1)).prompt.startswith("A special magic uuid is")
    chain = next(Maker("vt", 900, 1, texts, words_of).items(1))
    assert re.fullmatch(
        r" Answer: According to the chain\(s\) of variable assignment in the text above, 5 variables are assgined the "
        r"value (\d{5}), they are: ",
        chain.prefix,
    )
    # the example that is answered before: names of three letters
    assert re.search(r"they are: ([A-Z]{3} ){4}[A-Z]{3}\n\nMemorize", chain.prompt)


def test_what_does_not_fit(texts: Texts) -> None:
    with pytest.raises(UserError, match=r"--lengths 200: an item of cwe takes [\d,]+ tokens at least, 120 of them"):
        Maker("cwe", 200, 1, texts, words_of)
    with pytest.raises(UserError, match=r"--tasks = 'vts'"):
        tasks_named("vts")
    with pytest.raises(UserError, match="names none, or one twice"):
        tasks_named("ruler,vt")
    assert tasks_named("ruler") == list(PUBLISHED)
    assert len(PUBLISHED) == 13


def test_texts_of_a_user_and_of_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"has none of adjectives\.txt"):
        Texts(tmp_path)
    (tmp_path / "squad.json").write_text('{"data": [{"paragraphs": [{"context": "x"}]}]}')
    (tmp_path / "nouns.txt").write_text("b\na\n\nb\n")
    (tmp_path / "verbs.txt").write_text("\n")
    own = Texts(tmp_path)
    with pytest.raises(UserError, match=r"squad\.json is not in the format of squad\.json: KeyError\('qas'\)"):
        _ = own.squad
    assert own.nouns == ["a", "b"]
    essays = tmp_path / "PaulGrahamEssays.json"
    essays.write_text(json.dumps({"text": "One two.  Three\nfour! Five"}))
    monkeypatch.setattr(texts_module, "fetch", lambda spec, say: [(spec.members[0], essays)])
    assert own.essay_sentences(4) == ["One two.", "Three four!"]
    assert own.essay_sentences(7) == ["One two.", "Three four!", "Five One two."]
    assert own.own == {"squad.json", "nouns.txt"}

    def offline(spec: object, say: object) -> None:
        raise UserError("cannot be reached", hint="network")

    monkeypatch.setattr(texts_module, "fetch", offline)
    with pytest.raises(UserError, match=r"or put hotpotqa\.json into a folder and name it: --texts FOLDER"):
        _ = own.hotpotqa


def test_files_of_items(tmp_path: Path, texts: Texts) -> None:
    items = list(Maker("phonebook", 300, 1, texts, words_of).items(2))
    file = tmp_path / "items.jsonl"
    write_items(file, items)
    assert read_items(file) == items
    record = json.loads(file.read_text().splitlines()[0])
    assert record["input"] == items[0].prompt + "Answer:"
    for changed, words in (
        ({"prompt": "x"}, "line 1: key or input is not that of the item"),
        ({"rule": "some"}, "line 1 is no item: item 0 of phonebook has the rule 'some'"),
        ({"depths": [0.1, 0.2]}, "2 depths"),
        ({"tokens": "x"}, "line 1 is no item: tokens is 'x'"),
    ):
        file.write_text(json.dumps({**record, **changed}))
        with pytest.raises(UserError, match=re.escape(words)):
            read_items(file)
    for content, words in (("[1]", "line 1 is list, not an object"), ("\n", "has no items")):
        file.write_text(content)
        with pytest.raises(UserError, match=re.escape(words)):
            read_items(file)


def test_means_errors_and_effective_length(texts: Texts) -> None:
    makers = [Maker(task, length, 1, texts, words_of) for task in PUBLISHED for length in (4096, 4200)]
    items = [item for maker in makers for item in maker.items(2)]
    right = {item.key: " ".join(item.references) for item in items}
    half = {item.key: text if item.length == 4096 else text * (i % 2) for i, (item, text) in
            enumerate(zip(items, right.values(), strict=True))}  # fmt: skip
    results = results_of({"good": Answered(items, right), "short": Answered(items, half)})
    assert [results.effective(model) for model in results.models] == [4200, 4096]
    assert results.score("good", "mean", 4200) == 100
    assert results.score("short", "mean", 4200) == 50
    rows = {(row["model"], row["task"], row["length"]): row for row in results.rows}
    assert rows["short", "cwe", 4200]["standard_error"] == 50  # of 0 and 100
    assert rows["short", "mean", 4200]["standard_error"] == pytest.approx(50 / 13**0.5, abs=0.01)
    assert rows["short", "mean", 4200]["empty"] == 13
    assert results.remarks[-1] == "2 items of a task and length: RULER has 500"
    assert "texts of your own: " in results.remarks[0]
    assert sum(row["references"] for row in results.depths if row["model"] == "good") == 2 * 2 * (6 + 4 + 4)


def _data(*arguments: object) -> None:
    result = CliRunner().invoke(data_app, ["retrieval", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0


def test_documents_to_train_on(tmp_path: Path, texts: Texts) -> None:
    options = ["--tasks", "needle,phonebook", "--count", 40, "--length", 300, "--seed", 42]
    _data(*options, "--out", tmp_path / "a")
    _data(*options, "--out", tmp_path / "b")
    blend = load_blend(tmp_path / "a" / "retrieval.yaml")
    assert blend.holds() == "texts"
    tokenizer = load_tokenizer(tmp_path / "a" / "tokenizer")
    assert tokenizer.vocab_size == 512
    for task in ("needle", "phonebook"):
        content = (tmp_path / "a" / "train" / f"{task}.jsonl").read_text()
        assert content == (tmp_path / "b" / "train" / f"{task}.jsonl").read_text()
        documents = [json.loads(line)["text"] for line in content.splitlines()]
        sizes = [len(tokenizer.text_to_ids(text)) for text in documents]
        assert max(sizes) <= 300
        assert max(sizes) > 240 > 190 > min(sizes)
        tested = Maker(task, 300, 42, texts, lambda prompt, prefix: len(tokenizer.text_to_ids(prompt + prefix)))
        prompts = {item.prompt for item in tested.items(40)}
        for text in documents:
            prompt, prefix, answer = re.fullmatch(
                r"(.*?)( The special magic [^\n]* is|Answer:) ([\d-]+)\n", text, re.DOTALL
            ).groups()
            item = Item(task, 300, 0, prompt, prefix, [answer], [], "all", 1, 1)
            assert SOLVERS[task](item) == [answer]
            assert prompt not in prompts
    with pytest.raises(UserError, match="qa_1: its questions are those that models are tested with"):
        _data("--tasks", "needle,qa_1", "--out", tmp_path / "c")
    with pytest.raises(UserError, match=r"an item of needle takes \d+ tokens at least"):
        _data("--tasks", "needle", "--length", 40, "--out", tmp_path / "c")


def invoke(*arguments: object) -> str:
    """Run the command; its errors are raised."""
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_items_for_another_engine_and_its_answers(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    train_bpe(["The special magic number of the phone. Answer: 123-456"] * 9, 270, folder)
    options = ["--tasks", "needle,phonebook,fwe", "--lengths", "900,700", "--samples", 3, "--tokenizer", folder]
    items, answers, out = tmp_path / "items.jsonl", tmp_path / "vllm.jsonl", tmp_path / "out"
    assert "wrote 18 items" in invoke(*options, "--export", items)
    tokenizer = load_tokenizer(folder)
    read = read_items(items)
    for item in read:
        assert item.tokens == len(tokenizer.text_to_ids(item.input)) <= item.length - item.max_tokens
    texts = {item.key: (", ".join(item.references) if item.number else "no") for item in read}
    answers.write_text("\n".join(json.dumps({"key": key, "answer": text}) for key, text in texts.items()))
    printed = invoke("--items", items, "--answers", answers, "--out", out)
    assert "Not comparable with published scores: needle, phonebook: no task of RULER; 700, 900 tokens" in printed
    results = json.loads((out / "ruler.json").read_text())
    assert {row["score"] for row in results["rows"]} == {66.67}
    # the first item's answer is at the begin: all others are right
    assert {(row["from"] > 0, row["score"]) for row in results["depths"]} == {(False, 0), (True, 100)}
    for name in ("ruler.svg", "report.html", "depths.svg"):
        assert "vllm" in (out / name).read_text()
    lines = answers.read_text().splitlines()
    for content, words in (
        (lines[1:], "vllm.jsonl lacks the answers to 1 of 18 items"),
        ([*lines, lines[0]], "is answered twice"),
        ([*lines, '{"key": "x", "answer": "y"}'], "line 19: --items has no item 'x'"),
        ([*lines, '{"key": "x"}'], "line 19 has no texts key and answer"),
        (["[]"], "line 1 has no texts key and answer"),
    ):
        answers.write_text("\n".join(content))
        with pytest.raises(UserError, match=re.escape(words)):
            invoke("--items", items, "--answers", answers, "--out", out)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "there is no run to measure"),
        (["run"], "--lengths '' is no list of lengths"),
        (["run", "--lengths", "8k"], "--lengths '8k' is no list of lengths"),
        (["run", "--lengths", "512,512"], "--lengths '512,512' is no list"),
        (["run", "--lengths", "512", "--items", "x"], "--lengths is for new items"),
        (["--lengths", "512", "--export", "x"], "--export counts the tokens of one tokenizer"),
        (["a", "b", "--lengths", "512", "--export", "x"], "--export counts the tokens of one tokenizer"),
        (["a", "--lengths", "512", "--tokenizer", "x"], "--tokenizer is for an --export or --endpoint without a run"),
        (["--answers", "x"], "--answers needs --items"),
        (["a", "--answers", "x", "--items", "y"], "--answers needs --items, and no run"),
        (["a", "--lengths", "512", "--tasks", "niah"], "--tasks = 'niah'"),
        (["absent", "--lengths", "512"], "absent"),
    ],
)
def test_refusals(arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(words)):
        invoke(*arguments)
    assert not (tmp_path / "runs").exists()
