"""Task files: their data, the prompts that they make, what is refused; and the harness itself where it is installed.

NEMOTRON_H_LM_EVAL_PYTHON names an environment of lm-evaluation-harness (default: `.bench/lm_eval`, `make test-eval`).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import jinja2
import pytest
import yaml
from save_checkpoint import save
from small_model import small_config, small_model
from typer.testing import CliRunner

from nemotron_h.cli.main import app
from nemotron_h.core.errors import UserError
from nemotron_h.data.tokenizer import train_bpe
from nemotron_h.evaluation import harness, record, tasks

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("NEMOTRON_H_LM_EVAL_PYTHON", ROOT / ".bench" / "lm_eval" / "bin" / "python"))
needs_harness = pytest.mark.skipif(not PYTHON.is_file(), reason=f"no {PYTHON}; `make test-eval` sets it up")

#: records in the form of each package's file, written here
RECORDS = {
    "logiqa": {
        "input": [
            {"role": "system", "content": "Instructions"},
            {
                "role": "user",
                "content": "\nPassage: All a are b.Question: Which follows?\nA. A.x\nB. B.y\nC. z\nD. w\nAnswer:",
            },
        ],
        "ideal": "C",
    },
    "mmlu_sample": {"question": "Which is a fruit?\nA. stone\nB. apple\nC. iron\nD. glass\nAnswer:", "answer": "B"},
    "humaneval_local": {
        "task_id": "Own/0",
        "prompt": 'def double(x):\n    """Twice x."""\n',
        "entry_point": "double",
        "canonical_solution": "    return 2 * x\n",
        "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n",
    },
}


def invoke(*arguments: object) -> str:
    """Run the command; its errors are raised."""
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False).stdout


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All local tasks as the harness reads them, each with its one record in place of the package's."""
    shared = tmp_path / "tasks"
    shared.mkdir()

    def local(task: str):
        path = tmp_path / f"{task}.source.jsonl"
        path.write_text(json.dumps(RECORDS[task]) + "\n")
        return lambda *_: [(path.name, path)]

    for name in tasks.local_tasks():
        definition = tasks.load_task(name)
        definition.records = 1
        with monkeypatch.context() as patch:
            patch.setattr(tasks, "fetch", local(name))
            patch.setattr(tasks, "load_task", lambda _, found=definition: found)
            tasks.write_task(name, shared)
    return shared


def test_every_local_task_has_a_record_here() -> None:
    assert set(RECORDS) == set(tasks.local_tasks())
    for name in RECORDS:
        task = tasks.load_task(name)
        assert task.fetch.sha256
        assert task.records > 100


def test_prompts_and_targets(written: Path) -> None:
    class Loader(yaml.SafeLoader):
        """Reads what only the harness resolves as text."""

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    expected = {
        "logiqa": ("Passage: All a are b.Question: Which follows?\nA. A.x\nB. B.y\nC. z\nD. w\nAnswer:", "C"),
        "mmlu_sample": ("Which is a fruit?\nA. stone\nB. apple\nC. iron\nD. glass\nAnswer:", "B"),
        "humaneval_local": ('def double(x):\n    """Twice x."""\n', "    return 2 * x\n"),
    }
    for name, (prompt, target) in expected.items():
        content = yaml.load((written / f"{name}.yaml").read_text(), Loader)
        assert content["task"] == name
        (found,) = tasks.read_records(Path(content["dataset_kwargs"]["data_files"]["test"]))

        def render(text: str, found: dict = found) -> str:
            return jinja2.Template(text, keep_trailing_newline=True).render(**found)

        assert render(content["doc_to_text"]) == prompt
        assert render(content["doc_to_target"]) == target
        assert content.get("unsafe_code", False) == (name == "humaneval_local")
        if content["output_type"] == "multiple_choice":
            assert target in content["doc_to_choice"]


def test_other_data_than_expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("{}\n{}\n")
    monkeypatch.setattr(tasks, "fetch", lambda *_: [("x.jsonl", path)])
    with pytest.raises(UserError, match=r"x\.jsonl has 2 records, 1,354 are expected"):
        tasks.write_task("logiqa", tmp_path)


def test_paper_suite_prints_its_commands() -> None:
    lines = invoke("eval", "runs/x", "--suite", "paper", "--show-commands", "--device", "cuda").splitlines()
    assert lines[0] == "nemotron-h export hf runs/x MODEL"
    rows = tasks.load_suite("paper")
    assert len(lines) == len(rows) + 1
    by_task = dict(zip((row.task for row in rows), lines[1:], strict=True))
    assert "--tasks mmlu --output_path RESULTS --num_fewshot 5" in by_task["mmlu"]
    assert "--num_fewshot 25" in by_task["arc_challenge"]
    assert "--confirm_run_unsafe_code" in by_task["humaneval"]
    assert "--confirm_run_unsafe_code" not in by_task["piqa"]
    assert all(row.source.startswith("paper table 4") for row in rows)


def test_code_is_not_run_unasked() -> None:
    for option in (("--tasks", "perplexity,humaneval_local"), ("--suite", "paper")):
        with pytest.raises(UserError, match="run code that the model wrote") as error:
            invoke("eval", "runs/x", *option)
        assert "--allow-code-execution" in error.value.hint


def test_hub_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="cannot be reached: HF_HUB_OFFLINE is set") as error:
        harness.check_hub()
    assert "--show-commands" in error.value.hint
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9, which cannot be reached"):
        harness.check_hub()


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no suite papers"):
        invoke("eval", tmp_path, "--suite", "papers")
    with pytest.raises(UserError, match="exclude each other"):
        invoke("eval", tmp_path, "--suite", "paper", "--tasks", "logiqa")
    with pytest.raises(UserError, match="--shots is of --tasks"):
        invoke("eval", tmp_path, "--suite", "paper", "--shots", 3)
    with pytest.raises(UserError, match="--tasks names none"):
        invoke("eval", tmp_path, "--tasks", " , ")
    with pytest.raises(UserError, match="neither a checkpoint nor a run"):
        invoke("eval", tmp_path, "--tasks", "logiqa")
    with pytest.raises(UserError, match="does not run"):
        harness.check_interpreter(tmp_path / "absent")


def test_results_of_the_harness() -> None:
    values = {
        "alias": "x",
        "acc,none": 0.5,
        "acc_stderr,none": 0.1,
        "exact_match,strict": 0.25,
        "exact_match_stderr,strict": "N/A",
        "sample_len": 4,
    }
    content = {"results": {"x": values}, "n-samples": {"x": {"original": 9, "effective": 4}}, "n-shot": {"x": 5}}
    assert harness.parse(content) == [
        {"task": "x", "metrics": {"acc": [0.5, 0.1], "exact_match (strict)": [0.25, None]}, "samples": 4, "shots": 5}
    ]


def test_damaged_record(tmp_path: Path) -> None:
    (tmp_path / record.FILE).write_text("{")
    with pytest.raises(UserError, match=r"evaluations\.json is damaged"):
        record.add(tmp_path, [{"task": "x"}])


@needs_harness
def test_completions_are_scored_by_their_tests(written: Path) -> None:
    program = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import run_tests\n"
        "doc = json.loads(open(sys.argv[2]).readline())\n"
        "tries = [doc['canonical_solution'], '    return x\\n', '    while True: pass\\n', '    return (\\n']\n"
        "print([run_tests.process_results(doc, [t])['pass@1'] for t in tries])"
    )
    command = [str(PYTHON), "-c", program, str(written), str(written / "humaneval_local.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[1.0, 0.0, 0.0, 0.0]", done.stderr


@needs_harness
@pytest.mark.slow
@pytest.mark.usefixtures("megatron")
def test_tasks_run_in_the_harness(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command from end to end, over the three records."""
    (tmp_path / "tokenizer").mkdir()
    train_bpe(["abc def " * 100], 261, tmp_path / "tokenizer")
    model = small_model(small_config(vocab_size=261))
    data = {"tokenizer": str(tmp_path / "tokenizer"), "seq_length": 256}
    checkpoint = save(model, tmp_path / "run" / "checkpoints" / "step-000003", data=data)

    def copied(name: str, folder: Path, *_: object) -> None:
        for path in written.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())

    monkeypatch.setattr("nemotron_h.evaluation.measure.write_task", copied)
    names = ",".join(tasks.local_tasks())
    said = invoke("eval", tmp_path / "run", "--tasks", names, "--allow-code-execution", "--python", PYTHON)
    found = {entry["task"]: entry for entry in record.read(checkpoint)}
    assert set(found) == set(RECORDS)
    assert all(entry["samples"] == 1 for entry in found.values())
    assert found["logiqa"]["metrics"]["acc"][0] in (0.0, 1.0)
    assert found["humaneval_local"]["metrics"] == {"pass@1": [0.0, None]}
    assert "mmlu_sample" in said
