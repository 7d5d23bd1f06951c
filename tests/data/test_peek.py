"""`data peek` shows what training reads, and a recipe's data settings reach the data module."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from local_corpus import Corpus
from typer.testing import CliRunner

from nemotron_h.checkpoint import folders
from nemotron_h.cli.main import app
from nemotron_h.core.errors import UserError
from nemotron_h.data.blend import load_blend
from nemotron_h.data.feed.peek import Peek, RunSettings
from nemotron_h.data.tokenizer import load_tokenizer
from nemotron_h.recipe.compose import compose

SETTINGS = RunSettings(tokens=64 * 8 * 40, seq_length=64, global_batch_size=8, seed=7)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    corpus = Corpus(tmp_path_factory.mktemp("corpus"))
    corpus.content["sources"]["code"]["validation"] = 0
    corpus.prepare()
    corpus.write()
    return corpus


def recipe(corpus: Corpus, **data: object) -> Path:
    """A recipe over the local blend."""
    content = {
        "defaults": ["/base/pretrain", {"/model": "nemotron_h_tiny"}, "_self_"],
        "name": "local",
        "tokens": SETTINGS.tokens,
        "data": {
            "blend": str(corpus.folder / "local.yaml"),
            "root": str(corpus.root),
            "seq_length": SETTINGS.seq_length,
            "global_batch_size": SETTINGS.global_batch_size,
            "seed": SETTINGS.seed,
            **data,
        },
        "optim": {"peak_lr": 1e-3, "final_lr": 1e-5, "warmup_tokens": 512},
        "checkpoint": {"every_steps": 10},
        "log": {"validate_every_steps": 10, "validation_batches": 1},
    }
    path = corpus.folder / "recipe.yaml"
    path.write_text("# @package _global_\n" + yaml.safe_dump(content, sort_keys=False))
    return path


def data_module(path: Path, overrides: list[str] | None = None, resume: dict[str, object] | None = None):
    """The data module that training builds from the recipe, under a trainer at step 0, declared changes included."""
    import fiddle

    from nemotron_h.training.resume import DeclareBlendChange
    from nemotron_h.training.stages.pretrain import build

    partial = build(compose(str(path), overrides or []))
    for key, value in (resume or {}).items():  # what `resume.key=value` on the command line does
        setattr(partial.resume, key, value)
    data, resumed = fiddle.build(partial.data), fiddle.build(partial.resume)
    data.trainer = SimpleNamespace(global_step=0, max_steps=partial.trainer.max_steps, limit_val_batches=1)
    data.setup("fit")
    if resumed.blend_change is not None:
        DeclareBlendChange(resumed.blend_change).setup(SimpleNamespace(datamodule=data), None, "fit")
    return data


def test_a_step_shows_exactly_what_training_reads(corpus: Corpus) -> None:
    data, peek = data_module(recipe(corpus)), Peek(corpus.blend(), SETTINGS, corpus.root)
    dataset, phases = data.train_dataloader().dataset, set()
    for step in (0, 1, 23, 24, 39):  # the phases switch at step 24
        items = list(peek.samples(step))
        assert len(items) == 8
        for item, number in zip(items, range(8 * step, 8 * step + 8), strict=True):
            read = dataset[number]
            assert item.sample.index == int(read["sample_ids"]) == number
            assert np.array_equal(item.tokens, read["tokens"].numpy())
            assert np.array_equal(item.labels, read["labels"].numpy())
            assert item.sample == data.order.sampler[number]
            assert item.phase == data.order.phase_at(step).name
            phases.add((step, item.phase))
    assert phases == {(0, "one"), (1, "one"), (23, "one"), (24, "two"), (39, "two")}


def test_the_command_prints_the_text(corpus: Corpus) -> None:
    result = CliRunner().invoke(app, ["data", "peek", "--recipe", str(recipe(corpus)), "--step", "24", "--limit", "0"])
    assert result.exit_code == 0, result.output
    peek = Peek(corpus.blend(), SETTINGS, corpus.root)
    tokenizer = load_tokenizer(peek.manifest.tokenizer_path())
    for item in peek.samples(24):
        assert tokenizer.ids_to_text(item.tokens.tolist()) in result.output
        assert f"sample {item.sample.index:,}  source {item.sample.source}  epoch {item.sample.epoch}" in result.output
    assert "Step 24 of 40, phase two" in result.output
    given = ["--tokens", str(SETTINGS.tokens), "--seq-length", "64", "--global-batch", "8", "--seed", "7"]
    line = ["data", "peek", str(corpus.folder / "local.yaml"), "--step", "24", "--limit", "0", *given]
    assert CliRunner().invoke(app, [*line, "--root", str(corpus.root)]).output == result.output


def test_less_of_a_step_says_what_is_left_out(corpus: Corpus) -> None:
    line = ["data", "peek", "--recipe", str(recipe(corpus)), "--limit", "3", "--characters", "10"]
    output = CliRunner().invoke(app, line).output
    assert output.count("source ") == 3
    assert "and 5 more samples" in output
    assert "more characters" in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--step", "40"], "steps 0 to 39"),
        (["--root", "/nowhere"], "not prepared"),
        (["--seq-length", "100_000"], "fewer tokens than one window|less than a step"),
    ],
)
def test_mistakes(corpus: Corpus, options: list[str], message: str) -> None:
    options = [option.replace("_", "") for option in options]
    result = CliRunner().invoke(app, ["data", "peek", "--recipe", str(recipe(corpus)), *options])
    assert isinstance(result.exception, UserError)
    assert any(part in str(result.exception) for part in message.split("|"))


def test_a_run_that_is_not_known(corpus: Corpus) -> None:
    result = CliRunner().invoke(app, ["data", "peek", str(corpus.folder / "local.yaml"), "--tokens", "1M"])
    assert "--seq-length, --global-batch missing" in str(result.exception)


def checkpoint_of(data, folder: Path, step: int) -> Path:
    """A checkpoint folder with the record that training writes, but without weights."""
    data.trainer.global_step = step
    checkpoint = folder / "checkpoints" / f"step-{step:06d}"
    (checkpoint / "weights").mkdir(parents=True)
    (checkpoint / "run.json").write_text(json.dumps({"data": data.record()}))
    names = folders.content(checkpoint)
    folders.write_integrity(checkpoint, folders.describe(checkpoint, names))
    return checkpoint


def other_blend(corpus: Corpus) -> Path:
    """The local blend with other weights and one phase."""
    content = yaml.safe_load((corpus.folder / "local.yaml").read_text())
    content["phases"] = [{"name": "all", "weights": {"web": 20, "wiki": 40, "code": 40}}]
    path = corpus.folder / "other.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_after_a_declared_change_peek_shows_what_the_resumed_run_reads(corpus: Corpus, tmp_path: Path) -> None:
    path, other = recipe(corpus), other_blend(corpus)
    checkpoint = checkpoint_of(data_module(path), tmp_path, 10)
    state = json.loads((checkpoint / "run.json").read_text())["data"]["order"]
    length, size = 32, 4  # half the batch of half as long sequences: 160 steps
    changes = [f"data.blend={other}", f"data.seq_length={length}", f"data.global_batch_size={size}", "data.seed=9"]
    resumed = data_module(path, [*changes, "resume.blend_change=from_step"])
    resumed.load_state_dict(state)
    settings = RunSettings(SETTINGS.tokens, length, size, 9)
    peek = Peek(load_blend(other), settings, corpus.root, state, "from_step")
    unchanged_sampler = data_module(path).order.sampler
    resumed.trainer.global_step = 10
    dataset = resumed.train_dataloader().dataset
    for step in (10, 11, 100, 159):
        resumed.trainer.global_step = step
        first = resumed.next_sample()
        items = list(peek.samples(step))
        assert [item.sample.index for item in items] == list(range(first, first + size))
        for item in items:
            read = dataset[item.sample.index]
            assert np.array_equal(item.tokens, read["tokens"].numpy())
            assert np.array_equal(item.labels, read["labels"].numpy())
            assert item.phase == "all"
    assert first == 80 + 149 * 4
    assert [unchanged_sampler[i] for i in range(80, 88)] != [peek.order.sampler[i] for i in range(80, 88)]
    with pytest.raises(UserError, match="--step 9: this data takes over at step 10"):
        list(peek.samples(9))


def test_the_command_continues_a_checkpoint(corpus: Corpus, tmp_path: Path) -> None:
    def output(*options: object) -> str:
        line = ["data", "peek", "--limit", "0", "--characters", "0", *map(str, options)]
        result = CliRunner().invoke(app, line, catch_exceptions=False)
        return result.output

    path, other = recipe(corpus), other_blend(corpus)
    checkpoint = checkpoint_of(data_module(path), tmp_path, 10)
    # all of the run is known from its checkpoint, and its next step is shown
    assert output("--checkpoint", tmp_path) == output("--recipe", path, "--step", 10)
    assert output("--checkpoint", checkpoint, "--step", 3) == output("--recipe", path, "--step", 3)
    with pytest.raises(UserError, match=r"(?s)share of web: .*--blend-change from_step") as error:
        output(other, "--checkpoint", checkpoint)
    assert "step 10" in error.value.message
    declared = output(other, "--checkpoint", checkpoint, "--blend-change", "from_step")
    assert "Step 10 of 40, phase all: samples 80 to 87" in declared
    changed = recipe(corpus, blend=str(other))
    changed.write_text(changed.read_text() + "resume: {blend_change: from_step}\n")
    assert output("--recipe", changed, "--checkpoint", checkpoint) == declared
    # the next checkpoint goes on with the changed data, which need not be declared again
    resumed = data_module(changed)
    resumed.load_state_dict(json.loads((checkpoint / "run.json").read_text())["data"]["order"])
    checkpoint_of(resumed, tmp_path, 20)
    assert "Step 20 of 40, phase all: samples 160 to 167" in output("--checkpoint", tmp_path)
    assert output("--checkpoint", tmp_path, "--step", 10) == declared
    with pytest.raises(UserError, match="Name it: --checkpoint"):
        output(other, "--blend-change", "from_step")
    with pytest.raises(UserError, match="Did you mean from_step"):
        output("--checkpoint", tmp_path, "--blend-change", "from_stp")


def test_blend_change_reaches_the_data_module(corpus: Corpus) -> None:
    path = recipe(corpus)
    old = data_module(path)
    old.trainer.global_step = 10
    state = old.state_dict()
    with pytest.raises(UserError, match=r"resume\.blend_change=from_step") as error:
        data_module(path, ["data.seed=8"]).load_state_dict(state)
    assert "seed: 7 -> 8" in error.value.message
    data_module(path).load_state_dict(state)
    in_recipe = data_module(path, ["data.seed=8", "resume.blend_change=from_step"])
    on_command_line = data_module(path, ["data.seed=8"], {"blend_change": "from_step"})
    for changed in (in_recipe, on_command_line):
        changed.load_state_dict(state)
        assert changed.order.origin.step == 10
        assert [record["plan"]["seed"] for record in changed.order.history] == [7]
    wrong = r"resume\.blend_change = 'from_stp'\nDid you mean from_step\? Known: from_step"
    with pytest.raises(UserError, match="recipe.yaml: " + wrong):
        compose(str(path), ["resume.blend_change=from_stp"])
    with pytest.raises(UserError, match=wrong):
        data_module(path, [], {"blend_change": "from_stp"})
    with pytest.raises(UserError, match=r"unknown key data\.blend_change"):
        compose(str(path), ["data.blend_change=from_step"])
