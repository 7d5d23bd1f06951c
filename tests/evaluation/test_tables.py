"""The paper's tables: prompts, what a model answers and how likely it finds options, verdicts, and the command."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
from paper_questions import RECORDS, write, write_calls
from save_checkpoint import save
from small_model import VOCABULARY, small_config, small_model
from typer.testing import CliRunner

from nemotron_h.cli import eval as eval_module
from nemotron_h.cli.main import app
from nemotron_h.core.errors import UserError
from nemotron_h.data.tokenizer import load_tokenizer, train_bpe
from nemotron_h.evaluation import asking, continuing, record
from nemotron_h.evaluation.asking import Conversation, without_thoughts
from nemotron_h.evaluation.grading import packages
from nemotron_h.evaluation.subject import Subject
from nemotron_h.evaluation.tables import answers as answers_module
from nemotron_h.evaluation.tables import measure, ruler
from nemotron_h.evaluation.tables.answers import Answers, option_tokens, shared_tokens, stop_watch, until
from nemotron_h.evaluation.tables.measure import prepared
from nemotron_h.evaluation.tables.questions import Examined, examined
from nemotron_h.evaluation.tables.results import grader_of, rows_of, verdicts
from nemotron_h.evaluation.tables.task import load, load_table, tables, tasks
from nemotron_h.inference.generate import generate
from nemotron_h.inference.model import load_model
from nemotron_h.inference.sampling import Sampling

TABLE = "paper_table_5"
FEW = ("mmlu", "gsm8k", "arc_challenge", "winogrande")


def invoke(*arguments: object) -> str:
    """Run the command; its errors are raised."""
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False).stdout


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write(tmp_path_factory.mktemp("data"))
    write_calls(folder / "bfcl_v2")
    return folder


@pytest.fixture(scope="module")
def of(data: Path) -> dict[str, Examined]:
    return {name: examined(name, load(name), data, None) for name in tasks()}


@pytest.fixture(scope="module")
def run(megatron: None, of: dict[str, Examined], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the small model, whose tokenizer has all characters of the questions."""
    folder = tmp_path_factory.mktemp("run")
    questions = [question for each in of.values() for question in each.questions]
    texts = [question.text for question in questions]
    (folder / "tokenizer").mkdir()
    train_bpe(texts, VOCABULARY, folder / "tokenizer")
    data = {"tokenizer": str(folder / "tokenizer")}
    save(small_model(small_config()), folder / "checkpoints" / "step-000003", data=data)
    return folder


def test_tables_and_tasks_belong_together() -> None:
    """Each task is of a table, each row has a task, a length or a reason, and every task has records here."""
    assert {load(task).data or task for task in tasks()} == {*RECORDS, "bfcl_v2"}
    assert {task for name in tables() for task in load_table(name).tasks} == {*tasks()}
    for name in tables():
        table = load_table(name)
        rows = [row for task in table.tasks for row in load(task).rows]
        assert sorted([*rows, *table.unmeasured, *table.lengths]) == sorted(table.rows)
        assert {len(numbers) for numbers in table.rows.values()} == {len(table.models)}
        assert all(0 < number < 100 for numbers in table.rows.values() for number in numbers if number is not None)


def test_generated_prompts(of: dict[str, Examined]) -> None:
    about = "The following are multiple choice questions (with answers) about college physics.\n\n"
    shots = "".join(
        f"How much is {n} and 1?\nA. {n + 1}\nB. {n + 2}\nC. {n + 3}\nD. {2 * n}\nAnswer: A\n\n" for n in range(5)
    )
    asked = "How much is 7 and 1?\nA. 8\nB. 9\nC. 10\nD. 14\nAnswer:"
    assert of["mmlu"].questions[0].prompt == about + shots + asked
    assert "world religions" in of["mmlu"].questions[1].prompt
    prompt = of["mmlu_pro"].questions[0].prompt
    assert prompt.startswith("The following are multiple choice questions (with answers) about math. Think step by")
    assert (
        "Question:\nWhat comes after 0?\nOptions:\nA. 0\nB. 1\nC. 2\nAnswer: Let's think step by step. One more than "
        "0. The answer is (B).\n\nQuestion:\nWhat comes after 1?" in prompt
    )
    assert prompt.endswith("Options:\nA. 20\nB. 21\nC. 22\nAnswer: Let's think step by step.")
    prompt = of["gsm8k"].questions[0].prompt
    assert prompt.startswith(
        "Problem: How much is 1 and 1?\n Solution: So it is 2. So the answer is \\boxed{2}.\n\nProblem:"
    )
    assert prompt.endswith("Problem: How much is 10 and 10?\n Solution:")
    assert prompt.count("Problem:") == 9
    assert of["gsm8k"].questions[1].reference == "1234"
    assert of["gsm8k"].remarks[-1] == "examples of train.jsonl, not the published ones"
    assert not any("examples" in remark for remark in of["math"].remarks)
    assert of["math"].questions[1].prompt.endswith("\n\nProblem:\nHalve $x$.\n\nSolution:")
    assert of["math"].questions[1].reference == r"\frac{x}{2}"
    assert of["humaneval"].questions[0].prompt == 'def double(x):\n    """Twice x."""\n'
    one = '"""\nWrite a function to add one.\nassert add_one(1) == 2\n"""\n'
    assert of["mbpp"].questions[0].prompt == f"{one}def add_one(x):\n    return x + 1\n\n" * 3 + one
    assert of["mbpp_plus"].questions[0].prompt == one
    prompt = of["math_r1"].questions[0].prompt
    assert prompt.startswith(
        "Problem:\nHow much is 1 and 1?\n\nSolution: <|begin_of_thought|>\nHm.\n<|end_of_thought|>\n"
    )
    assert prompt.endswith("<|end_of_solution|>\n\nProblem:\nAdd a half and a half.\n\nSolution:")
    assert prompt.count("<|begin_of_solution|>") == 4


def test_conversations(of: dict[str, Examined], run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked in a chat template, what an answer has begun with, and that keys depend on the template."""
    (turn,) = of["mmlu_instruct"].questions[0].turns
    assert turn.content.endswith("B, C or D)\n\nHow much is 7 and 1?\nA. 8\nB. 9\nC. 10\nD. 14\nAnswer:")
    assert of["ifeval"].questions[1].turns[0].content == "Say pear twice."
    question = of["humaneval_instruct"].questions[0]
    assert (
        question.opening == f"Here is the completed function:\n```python\n{RECORDS['humaneval']['test'][0]['prompt']}\n"
    )
    simple, *_, live = of["bfcl_v2"].questions
    system, user = simple.turns
    assert (system.role, user.content) == ("system", "Square 0.")
    assert (
        "[{'name': 'square', 'description': 'The square of a number. Note that the provided function is in Python 3"
        in system.content
    )
    assert live.turns[0].content == f"{system.content}\n\nBe quick."
    assert "exec_simple" in of["bfcl_v2"].remarks[-1]

    subject = Subject.of(run, None)
    conversation = without_thoughts(subject)
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}assistant:{% generation %}{{ m['content'] + '\n' }}"
        "{% endgeneration %}{% else %}{{ m['role'] + ':' + m['content'] + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant:SWITCH{% endif %}"
    )
    assert conversation.system == ""  # the family's template has no switch
    tokenizer = subject.tokenizer
    begun = tokenizer.text_to_ids(question.opening)
    ids = answers_module._prompt(tokenizer, conversation, question)
    assert ids[-len(begun) :] == begun
    assert ids[: -len(begun)] == conversation.prompt(question.turns[0].content)
    key = answers_module.record_key(question, conversation)
    for changed in (("source", template), ("system", "/no_think")):
        other = without_thoughts(subject)
        setattr(other, *changed)
        assert answers_module.record_key(question, other) != key
    assert answers_module.record_key(of["gsm8k"].questions[0], None) == of["gsm8k"].questions[0].key
    other.system = "/no_think"  # the line begins the system message that is there
    spoken = tokenizer.ids_to_text(other.tokens(live.turns))
    assert "System\n/no_think\nYou are an expert in composing functions." in spoken
    assert spoken.count("System\n") == 1
    for switch, system in (("{% if enable_thinking %}<think>{% endif %}", ""), ("{# /no_think #}", "/no_think")):
        monkeypatch.setattr(asking, "recorded_template", lambda *a, switch=switch: template.replace("SWITCH", switch))
        off = without_thoughts(subject)
        assert (off.system, off.opening) == (system, "")
        assert Conversation(subject, "on").opening == ("<think>\n" if not system else "")


def test_options(of: dict[str, Examined]) -> None:
    """Numeric keys are shown as letters; three to five options; examples as the harness draws them."""
    four, five, three = of["arc_challenge"].questions
    assert [text for _, text in five.options] == [" A", " B", " C", " D", " E"]
    assert (len(four.options), len(three.options), five.right) == (4, 3, 1)
    assert five.options[0][0].endswith(
        "Question: How many?\nA. 4 apples\nB. 5 apples\nC. 6 apples\nD. 7 apples\nE. 8 apples\nAnswer:"
    )
    assert five.options[0][0].count("Answer: B\n\n") == 25
    rng, numbers = random.Random(1234), range(10, 40)
    for question in (four, five):
        drawn = rng.sample(numbers, 25)
        assert question.options[0][0].startswith(f"Question: How many?\nA. {drawn[0]} apples\n")
    context, ending = of["hellaswag"].questions[1].options[1]
    assert context.endswith("\n\nBaking:  Bake 3 loaves. Mix. The baker".replace(":  ", ": "))
    assert (ending, of["hellaswag"].questions[1].right) == (" sings a song.", 3)
    first, second = of["winogrande"].questions[1].options
    assert first[0].endswith("\n\nAnn gave 3 books to Bea because Ann")
    assert second == (first[0][:-3] + "Bea", " wanted to read.")
    assert of["winogrande"].questions[1].right == 1
    assert of["piqa"].questions[0].options[1] == ("Question: Boil water\nAnswer:", " Freeze it in a box.")
    assert of["openbookqa"].questions[0].options[1] == ("The sun is", " hot")


def test_verdicts(of: dict[str, Examined], monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that are right, in forms that graders have to see through, and wrong ones; without Math-Verify."""
    monkeypatch.setattr(packages, "version", lambda package: None)
    right = {
        "mmlu": [" A.", "A", "\nA"],
        "mmlu_pro": [" After 20 is 21. The answer is (B).\n\nQuestion: the answer is (C)", " Thus B"],
        "gsm8k": [r" 20. So the answer is \boxed{20}. Problem: \boxed{3}", r" \boxed{1,234}"],
        "math": [r" $\boxed{1.0}$", r" \boxed{0.5x}"],
        "humaneval": ["    return x + x\n\nprint(double('a'))\n# and more: (\n"],
        "humaneval_plus": ["    return 2 * x</s>\nassert False"],
        "mbpp": ["def add_one(x):\n    return 1 + x\n\ndef main():\n    exit()\n\nmain()\nno code"],
        "mbpp_plus": ["ONE = 1\n\ndef add_one(x):\n    return x + ONE\n"],
        "math_r1": [
            r"<|begin_of_thought|> so \boxed{2}? <|end_of_thought|> \boxed{1}",
            r"\boxed{x/2} Problem: \boxed{1}",
        ],
        "math_500": [r"<think>\boxed{x}</think> It is $\boxed{0.5x}$."],
        "mmlu_instruct": ["A", " A.", "<think>B</think>\nA"],
        "gsm8k_instruct": ["Ten and ten are 20.\n#### 20.", "#### 1,234\n#### 5"],
        "humaneval_instruct": ["    return x + x\n```\nIt doubles x."],
        "humaneval_plus_instruct": ["    return 2 * x"],
        "mbpp_instruct": ["def add_one(x):\n    return 1 + x\n```\nThat is:\n```\ndef add_one(x):\n    return 0\n```"],
        "mbpp_plus_instruct": ["def add_one(x):\n    return x + 1"],
        "bfcl_v2": ["[square(x=0)]", "square(x=1)", "No.", "x=1", "[square(x=0)]", "<think>f()</think>[square(x=1)]"],
    }
    wrong = {
        "mmlu": ["(A)", "", "B"],
        "mmlu_pro": [" B, or A", ""],
        "gsm8k": ["20", r" \boxed{12.34}"],  # no percent
        "math": [r" \boxed{2}", r" \boxed{\frac{x}{3}}"],
        "humaneval": ["    return x\n"],
        "humaneval_plus": ["    pass\n"],
        "mbpp": ["def add_one(x):\n    x + 1\n"],  # no return
        "mbpp_plus": ["def other(x):\n    return x + 1\n"],
        "math_r1": [r"<|begin_of_thought|> \boxed{2}", r"\boxed{x}"],
        "math_500": [r"<think>It is \boxed{\frac{x}{2}}"],  # a thought without an end
        "mmlu_instruct": ["The answer is A", "B", "<think>A"],
        "gsm8k_instruct": ["20", "#### 1234.5"],
        "humaneval_instruct": ["    return x"],
        "humaneval_plus_instruct": ["```\n    return 2 * x"],
        "mbpp_instruct": ["def add_one(x):\n    return x"],
        "mbpp_plus_instruct": ["```python\ndef add_one(x):\n    return x + 1"],
        "bfcl_v2": ["[square(x=1)]", "square(y=1)", "square(x=1)", "square()", "", "square(1)"],
    }
    for texts, expected in ((right, True), (wrong, False)):
        for name, lines in texts.items():
            keys = [question.key for question in of[name].questions]
            assert [*verdicts(of[name], Answers(dict(zip(keys, lines, strict=True)), {}))] == [expected] * len(keys)
    assert right.keys() == {name for name in tasks() if load(name).generates} - {"ifeval"}
    for name in ("arc_challenge", "hellaswag", "winogrande", "piqa", "openbookqa"):
        nats = {q.key: [1.0 + abs(n - q.right) for n in range(len(q.options))] for q in of[name].questions}
        assert all(verdicts(of[name], Answers({}, nats))) == (name != "piqa")  # acc_norm: per character of the option


def test_rows(of: dict[str, Examined]) -> None:
    whole, stem = rows_of(of["mmlu"], [True, False, False])
    assert (whole.name, stem.name, whole.questions, stem.questions) == ("MMLU", "MMLU-STEM", 3, 2)
    assert (round(whole.score, 3), round(whole.error, 3), stem.score) == (33.333, 33.333, 50)
    level = [*rows_of(of["math"], [True, False])][1]
    assert (level.name, level.score, level.error) == ("MATH Level 5", 0, None)
    keys = [question.key for question in of["ifeval"].questions]
    texts = dict(zip(keys, ["Sure:\n'pear fig'", "*pear* and apple"], strict=True))
    followed = [*verdicts(of["ifeval"], Answers(texts, {}))]
    assert followed == [([False, True], [False, True]), ([False], [False])]
    texts = dict(zip(keys, ['Sure, here:\n"pear fig"', "pear\npear"], strict=True))
    rows = [*rows_of(of["ifeval"], [*verdicts(of["ifeval"], Answers(texts, {}))])]
    assert [(row.name, row.score, row.questions) for row in rows] == [
        ("IFEval Prompt", 50, 2),
        ("IFEval Instruct", pytest.approx(100 / 3), 2),
        ("IFEval Prompt, loose", 100, 2),
        ("IFEval Instruct, loose", 100, 2),
    ]
    (whole, *_) = rows_of(of["bfcl_v2"], [True, False, True, True, True, False])
    live = 1 / (2 + 1053 + 16 + 24 + 882 + 18)  # the categories that are not there count as 0
    assert whole.score == pytest.approx(50 * (live + (0.5 / 3 + 1) / 9))


@pytest.mark.parametrize("installed", [True, False])
def test_math_verify(of: dict[str, Examined], installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Math-Verify judges GSM8K alone and MATH beside our rules; without it the rules do, and the row says so."""
    if installed:
        pytest.importorskip("math_verify")
    else:
        monkeypatch.setattr(packages, "version", lambda package: None)
    examples = {  # Math-Verify finds an answer without a box; our rules take percent, either way
        "gsm8k": ["The answer is 20.", r"\boxed{1234}"],
        "math": ["The final answer is $1$.", r"\boxed{50x\%}"],
    }
    for name, texts in examples.items():
        answers = Answers({q.key: text for q, text in zip(of[name].questions, texts, strict=True)}, {})
        assert [*verdicts(of[name], answers)] == ([True, name == "gsm8k"] if installed else [False, name == "gsm8k"])
        said = grader_of(of[name].task)
        assert said.startswith("Math-Verify") == installed
        assert ("NeMo-Skills" in said) == (name == "math" or not installed)


def test_packages(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a grader needs is told before a model is loaded."""
    monkeypatch.setattr(packages, "version", lambda package: None)
    _, left_out = prepared("paper_table_9", data, None, allow_code=False)
    assert left_out["ifeval"] == [f"langdetect, nltk not installed: {packages.INSTALL}"]
    (gsm8k,) = (each for each in prepared(TABLE, data, None, allow_code=False)[0] if each.name == "gsm8k")
    assert gsm8k.remarks[0] == f"Math-Verify, which the paper grades by, is not installed: {packages.INSTALL}"


def test_stop_texts(run: Path) -> None:
    tokenizer = load_tokenizer(run / "tokenizer")
    ids = tokenizer.text_to_ids("It is 2.\n\nProblem: How much")
    watch = stop_watch(tokenizer, ["Problem:", "Q:"])
    ends = [tokenizer.ids_to_text(ids[:end]) for end in range(1, len(ids) + 1) if watch(ids[:end])]
    assert ends[0].endswith("Problem:")
    assert until(ends[0], ["Q:", "Problem:", "\n"]) == "It is 2."
    assert until("no end", ["Q:"]) == "no end"


def test_shared_tokens() -> None:
    """Of which every prompt has more."""
    assert continuing.shared_tokens([[1, 2, 3, 4], [1, 2, 9], [1, 2, 3]]) == 2
    assert continuing.shared_tokens([[1, 2, 3], [1, 2], [1, 2, 4]]) == 1
    assert continuing.shared_tokens([[5, 6]] * 3) == 1
    assert continuing.shared_tokens([[1], [2]]) == 0


def test_the_command(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are those of a prompt alone, likelihoods those of a sequence alone; kept, and taken up again."""
    folder = write(tmp_path / "data", FEW)
    printed = invoke("eval", run, "--suite", TABLE, "--data", folder, "--compare", "paper", "--device", "cpu")
    assert "MMLU-STEM" in printed
    assert "72.8" in printed
    assert "not measured" in printed
    assert "not comparable: gsm8k: examples of train.jsonl" in printed
    checkpoint = run / "checkpoints" / "step-000003"
    entries = {entry["task"].partition("/")[2]: entry for entry in record.read(checkpoint)}
    assert [*entries] == ["MMLU", "MMLU-STEM", "GSM8K", "ARC-C", "Winogrande"]
    assert (entries["ARC-C"]["samples"], entries["ARC-C"]["shots"]) == (3, 25)

    name = "step-000003-float32-cpu.jsonl"
    written = {line["key"]: line["answer"] for line in _lines(run / "evaluations" / "answers" / name)}
    likely = {line["key"]: line["nats"] for line in _lines(run / "evaluations" / "likelihoods" / name)}
    tokenizer = load_tokenizer(run / "tokenizer")
    model = load_model(checkpoint, dtype=torch.float32, device="cpu", tokens=tokenizer.vocab_size)
    measured, left_out = prepared(TABLE, folder, None, allow_code=True)
    assert [each.name for each in measured] == [*FEW]
    assert left_out.keys() == {*load_table(TABLE).tasks} - {*FEW}
    for each in measured:
        for question in each.questions:
            if each.name == "mmlu":  # of which two are of one subject, whose examples are read once
                ids = tokenizer.text_to_ids(question.prompt)
                greedy = Sampling(temperature=0)
                (alone,) = generate(model, [ids], max_tokens=2, sampling=greedy, stop_ids=[tokenizer.eod_id])
                assert written[question.key] == tokenizer.ids_to_text(alone)
            for (context, text), nats in zip(question.options, likely.get(question.key, ()), strict=True):
                whole = tokenizer.text_to_ids(context + text)
                hidden = model.extend(torch.tensor([whole]), model.new_states(1, len(whole)))
                logs = model.logits(hidden[0]).double().log_softmax(-1)
                begin = len(tokenizer.text_to_ids(context))
                expected = -sum(logs[place - 1, whole[place]].item() for place in range(begin, len(whole)))
                assert nats == pytest.approx(expected, rel=1e-4)
                assert option_tokens(tokenizer, context, text).counted.sum() == len(whole) - begin
            if each.name == "arc_challenge":  # whose contexts are read once for all options
                options = [option_tokens(tokenizer, *option) for option in question.options]
                assert shared_tokens(options) == len(tokenizer.text_to_ids(question.options[0][0])) - 1 > 512
    # what is there is not answered again
    monkeypatch.setattr(continuing, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    invoke("eval", run, "--suite", TABLE, "--data", folder, "--device", "cpu", "--limit", 2)
    limited = record.read(checkpoint)[-4:]
    assert [entry["samples"] for entry in limited[-3:]] == [2, 2, 2]
    assert "the first 2 of 3 questions" in limited[-2]["remarks"]


def _lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_stopped_and_taken_up_again(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "data", ("mmlu", "piqa", "openbookqa"))
    files = [run / "evaluations" / kind / "step-000003-float32-cpu.jsonl" for kind in ("answers", "likelihoods")]
    arguments = ("eval", run, "--suite", TABLE, "--data", folder, "--device", "cpu", "--batch-size", 1)
    for file in files:
        file.unlink(missing_ok=True)
    invoke(*arguments)
    straight = [{line["key"]: line.get("answer", line.get("nats")) for line in _lines(file)} for file in files]
    first = files[0].read_text().splitlines(keepends=True)[0]
    files[0].write_text(first + first[:20])  # stopped in the middle of a line
    files[1].write_text("")
    invoke(*arguments)
    assert [{line["key"]: line.get("answer", line.get("nats")) for line in _lines(file)} for file in files] == straight


def test_a_table_of_conversations(run: Path, tmp_path: Path) -> None:
    """Greedy answers in the chat template, to what the template makes of the questions."""
    folder = write(tmp_path / "data", ("mmlu",))
    printed = invoke("eval", run, "--suite", "paper_table_9", "--data", folder, "--compare", "paper", "--device", "cpu")
    assert "MT-Bench" in printed
    assert "62.6" in printed
    written = {
        line["key"]: line["answer"] for line in _lines(run / "evaluations/answers/step-000003-float32-cpu.jsonl")
    }
    subject = Subject.of(run, None)
    model = load_model(subject.checkpoint, dtype=torch.float32, device="cpu", tokens=subject.tokenizer.vocab_size)
    conversation = without_thoughts(subject)
    (measured,), _ = prepared("paper_table_9", folder, None, allow_code=True)
    for question in measured.questions:
        ids = conversation.prompt(question.turns[0].content)
        settings = {"max_tokens": 2, "sampling": Sampling(temperature=0), "stop_ids": conversation.stop_ids}
        (alone,) = generate(model, [ids], **settings)
        assert written[answers_module.record_key(question, conversation)] == subject.tokenizer.ids_to_text(alone)
    (entry,) = [entry for entry in record.read(subject.checkpoint) if entry["task"].startswith("paper_table_9/")]
    assert (entry["task"], entry["samples"], entry["shots"]) == ("paper_table_9/MMLU (0-shot generative)", 3, 0)


def test_a_table_of_lengths(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RULER's means, as nemotron-h ruler has them, goes on after a stop."""
    monkeypatch.setattr(ruler, "PUBLISHED", ("niah_single_1", "fwe"))
    table = load_table("paper_table_10")
    short = {name: 1000 + 500 * number for number, name in enumerate(table.lengths)}
    for module in (measure, eval_module):
        monkeypatch.setattr(module, "load_table", lambda name: dataclasses.replace(table, lengths=short))
    arguments = ("eval", run, "--suite", "paper_table_10", "--device", "cpu", "--limit", 1, "--compare", "paper")
    printed = invoke(*arguments)
    assert "RULER 131,072" in printed
    assert "81.7" in printed
    assert "1 items of a task and length" in printed
    entries = [entry for entry in record.read(run / "checkpoints/step-000003") if "paper_table_10" in entry["task"]]
    assert [(entry["task"].split()[-1], entry["samples"]) for entry in entries] == [
        ("16,384", 2), ("32,768", 2), ("65,536", 2), ("131,072", 2)
    ]  # fmt: skip
    monkeypatch.setattr(continuing, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    invoke(*arguments)


def test_refused(run: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "data", ("mmlu", "humaneval"))
    table = ("eval", run, "--suite", TABLE)
    with pytest.raises(UserError, match="needs --data FOLDER"):
        invoke(*table)
    with pytest.raises(UserError, match="is no folder"):
        invoke(*table, "--data", tmp_path / "absent")
    with pytest.raises(UserError, match="--compare papers is unknown"):
        invoke(*table, "--data", folder, "--compare", "papers")
    with pytest.raises(UserError, match="--shots, --show-commands: --suite paper_table_5 does not take that"):
        invoke(*table, "--data", folder, "--shots", 0, "--show-commands")
    with pytest.raises(UserError, match="--data and --compare are of a table"):
        invoke("eval", run, "--data", folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has the data of no task") as error:
        prepared(TABLE, tmp_path / "empty", None, allow_code=True)
    assert "load_dataset('openai/gsm8k', 'main', split='test').to_json(" in error.value.hint
    assert "with the 8 published examples" in error.value.hint
    _, left_out = prepared(TABLE, folder, None, allow_code=False)
    assert left_out["humaneval"] == ["it runs code that the model wrote, as your user: --allow-code-execution"]
    test = folder / "mmlu" / "test.jsonl"
    good = json.loads(test.read_text().splitlines()[0])
    for change, message in (
        ({"answer": "A"}, r"record 1 is not as the task needs it: .*"),
        ({"subject": "chemistry"}, "has 0 examples of chemistry, 5 are needed"),
        ({"answer": None}, "record 1 is not as the task needs it"),
    ):
        test.write_text(json.dumps({**good, **change}) + "\n")
        with pytest.raises(UserError, match=message):
            prepared(TABLE, folder, None, allow_code=False)
    write(tmp_path / "more", ("math",))
    examples = tmp_path / "more" / "math" / "exemplars_r1.jsonl"
    examples.write_text(examples.read_text().replace("<|end_of_thought|>", "", 1))
    with pytest.raises(UserError, match=r"exemplars_r1\.jsonl, record 1 is not as the task needs it: .*end_of_thought"):
        prepared("paper_table_4", tmp_path / "more", None, allow_code=False)
    examples.unlink()
    _, left_out = prepared("paper_table_4", tmp_path / "more", None, allow_code=False)
    assert left_out["math_r1"][0].endswith("with the 4 published examples, as records of problem, level, solution")
    del good["choices"]
    test.write_text(json.dumps(good) + "\n")
    with pytest.raises(UserError, match=r"test\.jsonl, record 1 lacks choices"):
        prepared(TABLE, folder, None, allow_code=False)
