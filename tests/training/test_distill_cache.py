"""A distillation from a teacher's stored logits is the one from the teacher, bit for bit, and loads no teacher."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_run import FORKS, Small, distill_recipe, losses

from nemotron_h.core.locks import locked
from nemotron_h.data.tokenizer import train_bpe
from nemotron_h.training.stages.distillation import teacher_cache

pytestmark = pytest.mark.slow
TOP = 5


def cache_of(small: Small, name: str, top_k: int | None = None) -> Path:
    folder = small.folder / name
    top = "null" if top_k is None else top_k
    recipe = distill_recipe(small, f"{name}_recipe")
    said = small.command(
        name, "distill-cache", str(recipe), f"distill.teacher_logits={folder}", f"distill.top_k={top}"
    ).stdout
    said = " ".join(said.split())
    kept = "all 512" if top_k is None else f"{top_k} of 512"
    assert f"48 training and 8 validation windows of 64 tokens, {kept} logits each" in said
    assert "of the teacher's probability" in said
    return folder


@pytest.fixture(scope="module")
def whole(distilled: Small) -> Path:
    """A cache of all logits."""
    return cache_of(distilled, "logits")


def test_interrupted_on_two_ranks_it_equals_the_run_with_the_teacher(distilled: Small, whole: Path) -> None:
    """With pipeline stages, killed and resumed, and the teacher's folder not there."""
    settings = [f"model.config.teacher_logits={whole}", "model.config.teacher=not_on_this_machine"]
    settings += ["trainer.strategy.pipeline_model_parallel_size=2", "trainer.devices=2"]
    recipe = distill_recipe(distilled, "kd_stored")
    killed = distilled.train("kd_stored", *settings, "kill=4", ranks=2, check=False, recipe=recipe)
    assert killed.returncode < 0
    out = distilled.train("kd_stored", *settings, ranks=2, recipe=recipe)
    assert "resumed at step 3" in out.stdout
    assert f"its logits from {whole}" in " ".join(out.stdout.split())
    assert losses(distilled, "kd_stored") == losses(distilled, "kd")


def test_a_cache_has_one_writer(distilled: Small, whole: Path) -> None:
    recipe = str(distilled.folder / "logits_recipe.yaml")
    with locked(whole, "written", ""):
        setting = f"distill.teacher_logits={whole}"
        refused = distilled.command("logits_again", "distill-cache", recipe, setting, check=False)
    assert refused.returncode == 2
    assert f"is being written by another process: pid {os.getpid()} on" in " ".join(refused.stderr.split())


def test_the_likeliest_tokens_alone(distilled: Small, whole: Path) -> None:
    """Loss and gradients of the first steps, and what the files hold."""
    folder = cache_of(distilled, "logits_top", TOP)
    short = [f"model.config.top_k={TOP}", "trainer.max_steps=2", "optim.warmup_steps=1", "data.horizon_steps=6"]
    distilled.train("kd_top", *short, recipe=distill_recipe(distilled, "kd_top"))
    stored = f"model.config.teacher_logits={folder}"
    distilled.train("kd_top_stored", *short, stored, recipe=distill_recipe(distilled, "kd_top_stored"))
    assert distilled.steps("kd_top_stored") == distilled.steps("kd_top")
    all_logits, top = (load_file(teacher_cache.shard_path(at, "train", 1)) for at in (whole, folder))
    expected = all_logits["values"].topk(TOP)
    assert torch.equal(top["values"], expected.values)
    assert torch.equal(all_logits["values"].gather(-1, top["ids"].long()), expected.values)
    assert torch.equal(top["logsumexp"], all_logits["logsumexp"])
    sums = all_logits["values"].double().logsumexp(-1)
    torch.testing.assert_close(top["logsumexp"].double(), sums, rtol=0, atol=1e-5)


def test_tensor_parallel_ranks_go_on_where_it_was_interrupted(distilled: Small, whole: Path) -> None:
    """Files that are there stay; those of the split teacher are bfloat16 sums in another order, so close."""
    folder = distilled.folder / "logits_again"
    folder.mkdir()
    names = [path.name for path in sorted(whole.glob("*.safetensors"))]
    for name in [teacher_cache.HEADER, *names[:3]]:
        (folder / name).write_bytes((whole / name).read_bytes())
    before = {name: (folder / name).stat().st_mtime_ns for name in names[:3]}
    parallel = "parallel: {tensor: 2, devices: 2, sequence: true}\n"
    text = distill_recipe(distilled, "logits_again_recipe").read_text()
    recipe = distilled.folder / "logits_again_recipe.yaml"
    recipe.write_text(text.replace("distill: {", f"{parallel}distill: {{teacher_logits: {folder}, "))
    code = FORKS.run(
        "nemotron_h.training.stages.distillation.cache_teacher",
        str(recipe),
        folder=distilled.folder,
        name="again",
        ranks=2,
    )
    assert code == 0, (distilled.folder / "again.err").read_text()[-4000:]
    assert {name: (folder / name).stat().st_mtime_ns for name in names[:3]} == before
    for name in names[3:]:
        ours, single = load_file(folder / name), load_file(whole / name)
        assert torch.equal(ours["text"], single["text"])
        apart = (ours["values"].float() - single["values"].float()).abs()
        assert apart.max() < 0.1 * single["values"].float().std() * 8
        assert apart.mean() < 0.02 * single["values"].float().std()


def test_data_of_another_tokenizer_than_the_teacher_s_is_refused(distilled: Small) -> None:
    root = Path(shutil.copytree(distilled.folder / "data", distilled.folder / "other_data"))
    path = root / "words" / "manifest.json"
    manifest = json.loads(path.read_text())
    other = train_bpe([Path(__file__).read_text()], 512, path.with_name("tokenizer"))
    manifest["tokenizer"]["sha256"] = other.fingerprint()
    del manifest["sha256"]
    path.write_text(json.dumps(manifest))
    settings = [f"distill.teacher_logits={distilled.folder / 'foreign'}", f"data.root={root}"]
    recipe = distill_recipe(distilled, "foreign_recipe")
    done = distilled.command("foreign", "distill-cache", str(recipe), *settings, check=False)
    assert done.returncode == 2
    assert "distill.teacher: wrong tokenizer: blend words was prepared" in " ".join(done.stderr.split())


def test_another_seed_is_refused_before_the_start(distilled: Small, whole: Path) -> None:
    done = distilled.train(
        "kd_foreign",
        f"model.config.teacher_logits={whole}",
        "data.seed=7",
        check=False,
        recipe=distill_recipe(distilled, "kd_foreign"),
    )
    assert done.returncode == 2
    said = " ".join(done.stderr.split())
    assert f"the cache in {whole} was written for another run: data.seed: 1234 -> 7" in said
