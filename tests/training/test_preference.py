"""Preference training starts at its reference, computes that once, raises the margin, and resumes bit for bit."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import PREFERENCE_STEPS, Small, assert_same, changes_at_resume, drawn, preference_recipe, write_pairs

from nemotron_h.report.run import read_run

pytestmark = pytest.mark.slow
STEPS = PREFERENCE_STEPS


@pytest.fixture(scope="module")
def paired(small: Small, straight: dict[int, dict]) -> Small:
    """With pairs prepared beside the texts that `straight` was trained on: words of one kind are preferred."""
    write_pairs(small)
    return small


def cached(small: Small) -> list[Path]:
    return sorted((small.folder / "data" / "pairs" / ".reference").glob("*.npz"))


@pytest.fixture(scope="module")
def dpo(paired: Small) -> subprocess.CompletedProcess:
    return paired.train("dpo", recipe=preference_recipe(paired, "dpo"))


def test_it_starts_at_log_2_and_raises_the_margin(paired: Small, dpo: subprocess.CompletedProcess) -> None:
    steps = paired.steps("dpo")
    margins = [float.fromhex(steps[n]["margin"]) for n in range(1, STEPS + 1)]
    losses = [float.fromhex(steps[n]["loss"]) for n in range(1, STEPS + 1)]
    assert losses[0] == torch.tensor(math.log(2)).item()  # the same windows as the reference's: the same bits
    assert margins[0] == 0
    assert margins[-1] > 0.5
    assert losses[-1] < 0.5
    assert "computing them" in dpo.stdout
    assert "margin +" in dpo.stdout
    record = json.loads((paired.run_dir("dpo") / "run.json").read_text())
    assert record["metrics"]["reward_margin"] == margins[-1]
    assert record["metrics"]["val_reward_margin"] > 0.5
    assert record["data"]["reference"]["file"] == str(cached(paired)[0])
    samples = [i for s in steps.values() for i in s["samples"]]
    assert sorted(samples) == list(range(STEPS * 8))
    run = read_run(paired.run_dir("dpo"))
    assert run.values("reward_margin").tolist() == margins
    assert len(run.validated("val_reward_accuracy")[1]) == 2
    page = drawn(run.folder)
    assert all(title in page for title in ("Reward accuracy", "Reward margin", "loss per pair, nats"))


def test_straight_equals_killed_and_resumed_with_the_cache_lost(paired: Small, dpo) -> None:
    """The resumed run finds another checkpoint's cache alone, loads its starting weights again for the reference, and
    goes on with its own.
    """
    (file,) = cached(paired)
    with np.load(file) as content:
        before = {name: content[name] for name in content.files}
    killed = paired.train("dpo_again", "kill=4", check=False, recipe=preference_recipe(paired, "dpo_again"))
    assert killed.returncode < 0
    assert "computing" not in killed.stdout  # both runs have one reference
    other = file.with_name("other.npz")
    np.savez(other, **{**before, "key": np.array(json.dumps({**json.loads(str(before["key"])), "seq_length": 64}))})
    file.unlink()
    out = paired.train("dpo_again", recipe=preference_recipe(paired, "dpo_again"))
    assert "resumed at step 3" in out.stdout
    assert f"{other} are not this run's (seq_length differs)" in " ".join(out.stdout.split())
    assert_same(paired, "dpo_again", "dpo")
    assert "reference log-probs are not the checkpoint's" not in out.stdout + out.stderr
    with np.load(file) as content:
        assert all(np.array_equal(content[name], before[name]) for name in before)
    other.unlink()


def test_another_beta_holds_from_the_resume_on(paired: Small, dpo) -> None:
    recipe = preference_recipe(paired, "dpo_beta")
    changed = changes_at_resume(paired, "dpo", "dpo_beta", recipe, "model.config.beta=0.4")
    assert changed == {"preference.beta": [0.2, 0.4]}


def test_dpo_of_mean_log_probs(paired: Small, dpo) -> None:
    """From the same reference; a gradient is that of beta times it, over the tokens of the answers."""
    recipe = preference_recipe(paired, "dpo_norm", "dpo_norm")
    short = ("trainer.max_steps=3", "optim.warmup_steps=1")
    out = paired.train("dpo_norm", "model.config.beta=5.0", *short, recipe=recipe)
    assert "computing" not in out.stdout
    means, sums = paired.steps("dpo_norm"), paired.steps("dpo")
    assert means[1]["samples"] == sums[1]["samples"]
    assert means[1]["loss"] == sums[1]["loss"]  # log 2, to the bit
    assert float.fromhex(means[1]["margin"]) == 0
    ratio = float.fromhex(means[1]["grad_norm"]) / float.fromhex(sums[1]["grad_norm"])
    tokens = 5.0 / 0.2 / ratio
    assert 5 < tokens < 40, "answers have 2 to 8 words of 2 to 6 letters"
    assert float.fromhex(means[3]["margin"]) > 0.02
    assert float.fromhex(means[3]["loss"]) < float.fromhex(means[1]["loss"])
    record = json.loads((paired.run_dir("dpo_norm") / "run.json").read_text())
    assert record["settings"]["preference.loss"] == "dpo_norm"
    assert record["metrics"]["reward_margin"] == float.fromhex(means[3]["margin"])


def test_ranks_are_one_and_a_damaged_cache_is_not_used(paired: Small, dpo) -> None:
    fp32 = "trainer.max_steps=3", "trainer.plugins.name=fp32", "trainer.limit_val_batches=1"
    before = set(cached(paired))
    out = paired.train("rpo", *fp32, recipe=preference_recipe(paired, "rpo", "rpo_bwd_kl"))
    assert "are not this run's (precision differs)" in " ".join(out.stdout.split())
    (file,) = set(cached(paired)) - before
    with np.load(file) as content:
        arrays = {name: content[name] for name in content.files}
    one = paired.steps("rpo")
    for axis in ("pipeline_model", "context"):
        np.savez(file, **{**arrays, "train/pairs": arrays["train/pairs"] + 1})
        name, layout = f"rpo_{axis}", ("trainer.devices=2", f"trainer.strategy.{axis}_parallel_size=2")
        out = paired.train(name, *fp32, *layout, ranks=2, recipe=preference_recipe(paired, name, "rpo_bwd_kl"))
        assert "changed since it was written; computing them anew" in " ".join(out.stdout.split())
        with np.load(file) as content:
            for split in ("train/pairs", "validation/pairs"):
                np.testing.assert_allclose(content[split], arrays[split], rtol=1e-5)
        two = paired.steps(name)
        for step in (1, 2, 3):
            for key in ("loss", "margin", "grad_norm"):
                expected = pytest.approx(float.fromhex(one[step][key]), rel=1e-4, abs=1e-5)
                assert float.fromhex(two[step][key]) == expected, (axis, step, key)
    assert float.fromhex(one[1]["margin"]) == 0
    assert float.fromhex(one[3]["margin"]) > 0.05
    assert float.fromhex(one[3]["loss"]) < float.fromhex(one[1]["loss"])


def test_kept_log_probs_that_are_damaged_are_computed_anew(tmp_path: Path) -> None:
    from nemotron_h.training.stages import pretrain  # noqa: F401 (first)
    from nemotron_h.training.stages.preference import reference

    path, key, values = tmp_path / "a.npz", {"blend": "x"}, {"train": {"a": np.arange(4.0).reshape(2, 2)}}
    reference.write(path, key, values)
    content = path.read_bytes()
    for at in range(0, len(content), 5):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        found, why = reference.read(path, key)
        assert (found is None and "computing them anew" in why) or reference.digest(found) == reference.digest(values)


def test_another_model_is_the_reference(paired: Small, distilled: Small) -> None:
    """Of another architecture, whose log-probabilities are those of the engine that generates; the policy starts as it
    would with its own, and a run that resumes keeps the reference that it began with.
    """
    import torch

    from nemotron_h.checkpoint import folders
    from nemotron_h.data.chat import FAMILY_SOURCE, ChatTemplate
    from nemotron_h.data.pairs import encode_pair, read_pair
    from nemotron_h.data.tokenizer import load_tokenizer
    from nemotron_h.inference.model import load_model

    fp32 = "trainer.max_steps=2", "optim.warmup_steps=1", "trainer.plugins.name=fp32", "trainer.limit_val_batches=1"
    before = set(cached(paired))
    named = f"resume.reference={paired.run_dir('kd')}"
    paired.train("beside", *fp32, named, recipe=preference_recipe(paired, "beside"))
    (file,) = set(cached(paired)) - before
    with np.load(file) as content:
        computed = np.concatenate([content["train/pairs"], content["validation/pairs"]])
    reference = folders.newest(paired.run_dir("kd"))
    model = load_model(reference, dtype=torch.float32)
    template = ChatTemplate(FAMILY_SOURCE, load_tokenizer(paired.folder / "data/pairs/tokenizer"))
    expected = []
    for line in (paired.folder / "pairs.jsonl").read_text().splitlines():
        encoded = encode_pair(template, read_pair(json.loads(line)))
        ids, loss = torch.tensor(encoded.ids), torch.tensor(encoded.loss)
        sums = []
        for side in (loss < 2, loss >= 2):
            text, answer = ids[side], (loss[side] & 1).bool()
            hidden = model.extend(text[None], model.new_states(1, len(text)))
            scores = model.logits(hidden)[0].double().log_softmax(-1)
            own = scores[:-1].gather(-1, text[1:, None])[:, 0]
            sums.append(float(own[answer[1:]].sum()))
        expected.append(sums)
    np.testing.assert_allclose(sorted(computed.tolist()), sorted(expected), rtol=2e-4)
    record = json.loads((paired.run_dir("beside") / "run.json").read_text())
    assert record["data"]["reference"]["checkpoint"] == str(reference.resolve())
    assert record["data"]["reference"]["named"] == str(paired.run_dir("kd"))
    paired.train("own", *fp32, recipe=preference_recipe(paired, "own"))
    first = [read_run(paired.run_dir(name)).values("chosen_logprob")[0] for name in ("beside", "own")]
    assert first[0] == first[1]  # the policy's, before its first step
    assert float.fromhex(paired.steps("beside")[1]["margin"]) != 0
    again = ("trainer.max_steps=3", *fp32[1:])
    out = paired.train("beside", *again, check=False, recipe=preference_recipe(paired, "beside"))
    assert out.returncode != 0
    assert "began with preference.reference" in out.stdout + out.stderr
    file.unlink()
    out = paired.train("beside", *again, named, recipe=preference_recipe(paired, "beside"))
    with np.load(file) as content:
        np.testing.assert_array_equal(np.concatenate([content["train/pairs"], content["validation/pairs"]]), computed)
    file.unlink()
    before = set(cached(paired))
    layout = "trainer.devices=2", "trainer.strategy.tensor_model_parallel_size=2"
    paired.train("beside_tp2", *fp32, *layout, named, ranks=2, recipe=preference_recipe(paired, "beside_tp2"))
    (file,) = set(cached(paired)) - before
    with np.load(file) as content:
        ranks = np.concatenate([content["train/pairs"], content["validation/pairs"]])
    np.testing.assert_allclose(ranks, computed, rtol=1e-5)


def test_a_reference_of_another_vocabulary_is_refused(paired: Small, distilled: Small) -> None:
    import shutil
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1] / "inference"))
    from save_checkpoint import finish

    from nemotron_h.checkpoint import folders

    copy = paired.folder / "other" / "step-000001"
    shutil.copytree(folders.newest(paired.run_dir("kd")), copy)
    record = json.loads((copy / "run.json").read_text())
    record["model"]["vocab_size"] += 1
    (copy / "run.json").write_text(json.dumps(record))
    (copy / folders.INTEGRITY).unlink()
    finish(copy)
    out = paired.train("refused", f"resume.reference={copy}", check=False, recipe=preference_recipe(paired, "refused"))
    assert out.returncode != 0
    assert "has a vocabulary of 513, the model that is trained of 512" in " ".join((out.stdout + out.stderr).split())
