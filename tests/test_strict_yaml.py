"""YAML is read as it was written: words, numbers, aliases; and from folders of any name."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from nemotron_h.core import strict_yaml
from nemotron_h.core.errors import UserError
from nemotron_h.core.strict_yaml import parse_settings, parse_yaml
from nemotron_h.data.blend import load_blend
from nemotron_h.recipe import compose


def test_words_stay_as_they_were_written() -> None:
    text = "{no: yes, 2024_07: 3:50:00, on: off, 007: 007, null: ~, 1.0: 1.0, a: 655_360, b: -1, c: 1e-5, d: .inf}"
    assert parse_yaml(text, "a.yaml") == {
        "no": "yes",
        "2024_07": "3:50:00",
        "on": "off",
        "007": "007",
        "null": None,
        "1.0": 1.0,
        "a": 655360,
        "b": -1,
        "c": 1e-5,
        "d": float("inf"),
    }
    assert parse_yaml("[0x10, 0b1, 1_0, 2024-01-01, +5, True, false, '', Null]", "") == [
        *("0x10", "0b1", "1_0", "2024-01-01", "+5"),
        *(True, False, "", None),
    ]
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}", "")["b"] == {"x": 3, "y": 2}
    assert parse_yaml("", "") is None
    assert parse_settings(["a.b=1", "a.c=[x, 2]", "a.b=no"], "override") == {"a": {"b": "no", "c": ["x", 2]}}


def test_a_blend_may_use_words_that_were_booleans_and_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "name: norway\ntokenizer: {kind: bpe, vocab_size: 261}\n"
        "sources:\n  2024_07: {category: no, format: text, path: a}\n  on: {category: en, format: text, path: a}\n"
        "phases:\n  - {name: all, weights: {no: 50, en: 50}}\n"
    )
    blend = load_blend(tmp_path / "a.yaml")
    assert list(blend.sources) == ["2024_07", "on"]
    assert blend.phases[0].weights == {"no": 50, "en": 50}


def test_a_recipe_s_words_reach_their_types(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "defaults: [/nemotron_h_tiny/pretrain, _self_]\nname: 2024_07\n"
        "tokens: 700_000\ncheckpoint: {leave_after: 3:50:00}\nlog: {tensorboard: no}\ndata: {workers: 0_1}\n"
    )
    recipe = compose.compose(str(tmp_path / "a.yaml"))
    assert (recipe.name, recipe.tokens, recipe.checkpoint.leave_after) == ("2024_07", "700000", "3:50:00")
    assert (recipe.log.trackers, recipe.data.workers) == ([], 1)


def test_recipes_and_package_may_lie_in_folders_of_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "Projects (1), [2024] it's $x = {a}"
    for name in ("recipes", "configs"):
        shutil.copytree(getattr(compose, f"{name}_dir")(), folder / name)
        monkeypatch.setattr(compose, f"{name}_dir", lambda name=name: folder / name)
    (folder / "mine.yaml").write_text("defaults: [/nemotron_h_tiny/pretrain, _self_]\nname: mine\n")
    composed = compose.trace(str(folder / "mine.yaml"), ["model=nemotron_h_tiny"])
    assert composed.recipe.name == "mine"
    assert {layer.file.relative_to(folder).parts[0] for layer in composed.layers} == {"recipes", "configs", "mine.yaml"}


def test_a_file_of_the_defaults_is_read_as_strictly(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("defaults: [/nemotron_h_tiny/pretrain, _self_]\nname: a\nname: b\n")
    (tmp_path / "mine.yaml").write_text("defaults: [base, _self_]\nname: mine\n")
    with pytest.raises(UserError, match=r"base\.yaml: not valid YAML: line 3, column 1: duplicate key name"):
        compose.compose(str(tmp_path / "mine.yaml"))


def test_the_library_reads_yaml_in_one_place() -> None:
    library = Path(strict_yaml.__file__).parents[1]
    loads = re.compile(r"yaml\.\w*load|OmegaConf\.load")
    files = [file for file in library.rglob("*.py") if loads.search(file.read_text(encoding="utf-8"))]
    assert [str(file.relative_to(library)) for file in files] == []
