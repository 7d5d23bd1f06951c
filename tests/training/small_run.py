"""A small recipe over a small prepared blend, and a way to run it in a process of its own."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from forks import FORKS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nemotron_h.checkpoint import folders as checkpoints
from nemotron_h.core.strict import leaves
from nemotron_h.report import page

WORKER, COMPARE = (Path(__file__).with_name(name) for name in ("worker.py", "same_tensors.py"))

BLEND = """
name: words
tokenizer: {kind: bpe, vocab_size: 512}
sources:
  low: {category: web, format: jsonl, path: low.jsonl, licence: ours, validation: 0.2}
  high: {category: math, format: jsonl, path: high.jsonl, licence: ours, validation: 0.2}
phases:
  - {name: first, weights: {web: 80, math: 20}, until: {fraction: 0.5}}
  # a quarter of its rows are four short sequences
  - {name: second, weights: {web: 30, math: 70}, short: {seq_length: 16, share: 0.25, weights: {web: 50, math: 50}}}
"""

TUNING_STEPS = DISTILL_STEPS = PREFERENCE_STEPS = 6

TALK = """
name: talk
tokenizer: {kind: bpe, blend: words}
chat_template: nemotron_h
sources:
  talk: {category: chat, format: jsonl, chat: messages, path: talk.jsonl, licence: ours, validation: 0.1}
phases:
  - {name: all, weights: {chat: 100}}
"""

PAIRS = """
name: pairs
tokenizer: {kind: bpe, blend: words}
chat_template: nemotron_h
sources:
  pairs: {category: pairs, format: jsonl, chat: preference, path: pairs.jsonl, licence: ours, validation: 0.1}
phases:
  - {name: all, weights: {pairs: 100}}
"""

RECIPE = """
# @package _global_
defaults:
  - /base/pretrain
  - _self_
name: small
tokens: 6144 # 12 steps
precision: bf16
model:
  name: small
  family: nemotron_h
  pattern: M-M*-
  hidden_size: 64
  ffn_hidden_size: 96
  num_attention_heads: 4
  num_query_groups: 2
  head_dim: 16
  mamba_num_heads: 8
  mamba_head_dim: 16
  mamba_num_groups: 2
  mamba_state_dim: 16
  vocab_size: 512
  conv_kernel: 4
  init_std: 0.1
  expect: {{mamba: 2, attention: 1, ffn: 2, parameters: 163376}}
data:
  blend: {blend}
  root: {root}
  seq_length: 64
  global_batch_size: 8
  micro_batch_size: 2
optim: {{peak_lr: 1e-2, final_lr: 1e-4, warmup_tokens: 1024}}
checkpoint: {{every_steps: 4}}
log: {{dir: {runs}, validate_every_steps: 6, validation_batches: 1}}
"""


@dataclass
class Small:
    """Where the prepared blend is; writes recipes and runs them."""

    folder: Path

    def recipe(self, name: str) -> Path:
        """A recipe whose run goes to `<name>/small`."""
        path = self.folder / f"{name}.yaml"
        path.write_text(
            RECIPE.format(blend=self.folder / "words.yaml", root=self.folder / "data", runs=self.folder / name)
        )
        return path

    def variant(self, name: str, *changes: tuple[str, str]) -> Path:
        """That recipe with parts of its text replaced; each is there."""
        path = self.recipe(name)
        text = path.read_text()
        for before, after in changes:
            assert before in text, before
            text = text.replace(before, after)
        path.write_text(text)
        return path

    def run_dir(self, name: str) -> Path:
        """Where that run writes."""
        return self.folder / name / "small"

    def train(
        self,
        name: str,
        *options: str,
        ranks: int = 1,
        check: bool = True,
        recipe: Path | None = None,
        program: Path = WORKER,
    ) -> subprocess.CompletedProcess:
        """Run the recipe in a process of its own, or one for each rank; see `worker.py` for the options."""
        code = FORKS.run(
            str(program), str(recipe or self.recipe(name)), *options, folder=self.folder, name=name, ranks=ranks
        )
        return self._done(name, code, check)

    def command(self, name: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
        """`nemotron-h ARGUMENTS` in a process of its own."""
        return self._done(name, FORKS.run("nemotron_h", *arguments, folder=self.folder, name=name), check)

    def _done(self, name: str, code: int, check: bool) -> subprocess.CompletedProcess:
        out, err = ((self.folder / f"{name}.{end}").read_text() for end in ("out", "err"))
        done = subprocess.CompletedProcess([name], code, out, err)
        if check:
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done

    def same_tensors(self, one: str, two: str, step: int) -> bool:
        """Return whether two runs' checkpoints of a step hold the same weights and optimizer, bit for bit."""
        first, second = (self.run_dir(name) / f"checkpoints/step-{step:06d}" for name in (one, two))
        return self.same_checkpoints((first, second))

    def same_checkpoints(self, *pairs: tuple[Path, Path]) -> bool:
        """Return whether the two of each pair of checkpoints hold the same weights and optimizer, bit for bit."""
        folders = [str(folder / "weights") for pair in pairs for folder in pair]
        done = self._done("compare", FORKS.run(str(COMPARE), *folders, folder=self.folder, name="compare"), True)
        assert done.stdout.count("same: ") == len(pairs), done.stdout
        return True

    def steps(self, name: str) -> dict[int, dict]:
        """Step -> what the worker recorded; a repeated step keeps its last record."""
        lines = (self.folder / name / "steps.jsonl").read_text().splitlines()
        return {record["step"]: record for record in map(json.loads, lines)}

    def prepare(self, blend: str) -> None:
        """`nemotron-h data prepare` of a blend of this folder."""
        file, root = str(self.folder / blend), str(self.folder / "data")
        self.command(f"prepare_{blend}", "data", "prepare", "--blend", file, "--root", root)


def drawn(run: Path) -> str:
    """The page of a run's report, which `worker.py` leaves undrawn."""
    return page.write(run).page.read_text()


def prepared(folder: Path, kind: type[Small] = Small) -> Small:
    """Write two sources of random words into a folder and prepare them."""
    rng = random.Random(1)
    for name, letters in (("low", "abcdefgh"), ("high", "stuvwxyz")):
        words = ["".join(rng.choices(letters, k=rng.randint(2, 6))) for _ in range(80)]
        documents = [" ".join(rng.choices(words, k=rng.randint(5, 120))) for _ in range(300)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    (folder / "words.yaml").write_text(BLEND)
    small = kind(folder)
    small.prepare("words.yaml")
    return small


def write_talk(small: Small) -> None:
    """Prepare conversations beside the texts that `straight` is trained on."""
    rng = random.Random(2)
    words = _words(small, "low")

    def said() -> str:
        return " ".join(rng.choices(words, k=rng.randint(1, 12)))

    lines = [
        {"messages": [{"role": role, "content": said()} for role in ("user", "assistant") * rng.randint(1, 2)]}
        for _ in range(300)
    ]
    _prepare_lines(small, "talk", TALK, lines)


def write_pairs(small: Small) -> None:
    """Prepare pairs of answers beside those texts: words of one kind are preferred."""
    rng = random.Random(2)
    words, others = _words(small, "low"), _words(small, "high")

    def said(of: list[str]) -> str:
        return " ".join(rng.choices(of, k=rng.randint(2, 8)))

    lines = [
        {
            "prompt": said(words),
            "chosen": said(words),
            "rejected": said(others),
            "chosen_reward": rng.uniform(0, 4),
            "rejected_reward": rng.uniform(-4, 1),
        }
        for _ in range(200)
    ]
    _prepare_lines(small, "pairs", PAIRS, lines)


def _words(small: Small, source: str) -> list[str]:
    return [word for word in (small.folder / f"{source}.jsonl").read_text().split()[:400] if word.isalpha()]


def _prepare_lines(small: Small, name: str, blend: str, lines: list[dict]) -> None:
    (small.folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (small.folder / f"{name}.yaml").write_text(blend)
    small.prepare(f"{name}.yaml")


def sft_recipe(small: Small, name: str) -> Path:
    """The recipe of `Small` as a fine-tuning from the run `straight`."""
    return small.variant(
        name,
        ("- /base/pretrain", "- /base/sft"),
        ("tokens: 6144 # 12 steps", f"tokens: {TUNING_STEPS * 512}\ninit: {{checkpoint: {small.run_dir('straight')}}}"),
        ("words.yaml", "talk.yaml"),
        ("peak_lr: 1e-2, final_lr: 1e-4, warmup_tokens: 1024", "peak_lr: 3e-3, final_lr: 1e-4, warmup_tokens: 512"),
        ("every_steps: 4", "every_steps: 3"),
        ("validate_every_steps: 6", "validate_every_steps: 3"),
    )


def preference_recipe(small: Small, name: str, loss: str = "dpo") -> Path:
    """The recipe of `Small` as a preference training from the run `straight`."""
    return small.variant(
        name,
        ("- /base/pretrain", "- /base/preference"),
        (
            "tokens: 6144 # 12 steps",
            f"tokens: {PREFERENCE_STEPS * 1024}\npreference: {{loss: {loss}}}\n"
            f"init: {{checkpoint: {small.run_dir('straight')}}}",
        ),
        ("words.yaml", "pairs.yaml"),
        ("seq_length: 64", "seq_length: 128"),
        ("peak_lr: 1e-2, final_lr: 1e-4, warmup_tokens: 1024", "peak_lr: 3e-3, final_lr: 3e-4, warmup_tokens: 1024"),
        ("every_steps: 4", "every_steps: 3"),
        ("validate_every_steps: 6", "validate_every_steps: 3"),
    )


def distill_recipe(small: Small, name: str, *changes: tuple[str, str]) -> Path:
    """The recipe of `Small` as a distillation of `straight` into a student of fewer layers and narrower FFNs."""
    return small.variant(
        name,
        ("- /base/pretrain", "- /base/distill"),
        (
            "tokens: 6144 # 12 steps",
            f"tokens: {DISTILL_STEPS * 512}\ndistill: {{teacher: {small.run_dir('straight')}}}",
        ),
        ("pattern: M-M*-", "pattern: M*-"),
        ("ffn_hidden_size: 96", "ffn_hidden_size: 64"),
        ("mamba: 2, attention: 1, ffn: 2, parameters: 163376", "mamba: 1, attention: 1, ffn: 1, parameters: 116568"),
        ("init_std: 0.1", "init_std: 0.3"),
        ("warmup_tokens: 1024", "warmup_tokens: 512"),
        ("every_steps: 4", "every_steps: 3"),
        ("validate_every_steps: 6", "validate_every_steps: 3"),
        *changes,
    )


#: what two runs of one recipe may differ in: where they were started, and how fast they were
OF_THE_PROCESS = ("command", "started", "seconds", "throughput", "save", "recipe.log.dir")
TIMINGS = (
    *("tokens_per_second_per_rank", "tflops_per_rank", "train_step_timing in s", "hp_metric"),
    *("mfu", "mfu_bf16", "max_memory_gib"),  # on a GPU
)


def run_records(run_dir: Path) -> dict[str, dict]:
    """Return `run.json` of a run and of its checkpoints, without what two runs of one recipe may differ in."""
    records = {}
    for path in (run_dir / "run.json", *sorted(run_dir.glob("checkpoints/step-*/run.json"))):
        content = dict(leaves(json.loads(path.read_text())))
        records[str(path.relative_to(run_dir))] = {
            key: value for key, value in content.items() if not key.startswith(OF_THE_PROCESS)
        }
    return records


def events(run_dir: Path) -> dict[str, dict[int, set[float]]]:
    """Return tag -> step -> the values that TensorBoard shows there, of all processes of a run; without timings."""
    files = sorted({path.parent for path in run_dir.rglob("events.out.*")})
    accumulators = [EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload() for folder in files]
    shown: dict[str, dict[int, set[float]]] = {}
    for accumulator in accumulators:
        for tag in set(accumulator.Tags()["scalars"]) - set(TIMINGS):
            for event in accumulator.Scalars(tag):
                shown.setdefault(tag, {}).setdefault(event.step, set()).add(event.value)
    return shown


def assert_same(small: Small, one: str, two: str) -> None:
    """Check that two runs did the same in each step, record the same and show the same in TensorBoard."""
    assert small.steps(one) == small.steps(two)
    assert run_records(small.run_dir(one)) == run_records(small.run_dir(two))
    assert events(small.run_dir(one)) == events(small.run_dir(two))


def without_last(small: Small, name: str, copy: str) -> None:
    """Copy a run as it would be if it had been killed before its last checkpoint."""
    shutil.copytree(small.run_dir(name), small.run_dir(copy))
    shutil.rmtree(checkpoints.finished(small.run_dir(copy))[0])


def changes_at_resume(small: Small, name: str, copy: str, recipe: Path, *settings: str) -> dict[str, list]:
    """Resume a copy of a run before its last checkpoint with other settings; return the changes that it records."""
    without_last(small, name, copy)
    step = checkpoints.step_of(checkpoints.finished(small.run_dir(copy))[0])
    said = small.train(copy, *settings, recipe=recipe).stdout
    (changes,) = json.loads((small.run_dir(copy) / "run.json").read_text())["changes"]
    assert changes.pop("from_step") == step
    for key, (before, now) in changes.items():
        assert f"  {key}: {before} -> {now}\n" in said
    assert small.steps(copy)[step + 1]["loss"] != small.steps(name)[step + 1]["loss"]
    return changes


def layout_of_strategy(**changes: object) -> SimpleNamespace:
    """What checks ask of a strategy; one rank by default."""
    sizes = {f"{kind}_parallel_size": 1 for kind in ("tensor_model", "pipeline_model", "expert_model", "context")}
    return SimpleNamespace(**{**sizes, "sequence_parallel": False, **changes})


def losses(small: Small, name: str) -> list[float]:
    return [float.fromhex(record["loss"]) for _, record in sorted(small.steps(name).items())]
