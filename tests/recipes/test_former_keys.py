"""Keys that recipes once had: read with the value that remains, refused with another."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemotron_h.core.errors import UserError
from nemotron_h.recipe.compose import compose
from nemotron_h.recipe.former_keys import DROPPED
from nemotron_h.recipe.overrides import recipe_keys

COMPRESSION = "nemotron_h_tiny/minipuzzle"


def recipe(folder: Path, value: str) -> str:
    """A file that names the first dropped key, and the source of its value."""
    key = next(iter(DROPPED))
    part, name = key.split(".")
    file = folder / "old.yaml"
    file.write_text(
        f"# @package _global_\ndefaults: [/{COMPRESSION}, _self_]\n{part}: {{{name}: {value}}}\n"
        f"sources: {{{key}: 'ours: any'}}\n"
    )
    return str(file)


def test_a_file_with_the_value_that_remains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key, remains = next(iter(DROPPED.items()))
    file = recipe(tmp_path, remains)
    assert compose(file).minipuzzle == compose(file).minipuzzle == compose(COMPRESSION).minipuzzle
    assert key not in compose(file).sources
    said = f"note: {file}: {key} is no longer a key, every recipe has {remains!r}; leave it out\n"
    assert capsys.readouterr().err == said  # once


def test_a_file_with_another_value(tmp_path: Path) -> None:
    key, remains = next(iter(DROPPED.items()))
    file = recipe(tmp_path, "other")
    with pytest.raises(UserError) as raised:
        compose(file)
    assert raised.value.message.startswith(f"{file}: {key} = 'other' is gone: every recipe has {remains!r}")
    assert raised.value.hint == f"leave {key} out"


@pytest.mark.parametrize("key", DROPPED)
def test_settings_of_a_command_and_of_a_file(key: str, tmp_path: Path) -> None:
    assert key not in recipe_keys()
    assert compose(COMPRESSION, [f"{key}={DROPPED[key]}"]) == compose(COMPRESSION)
    with pytest.raises(UserError, match=rf"override: {key} = 'other' is gone"):
        compose(COMPRESSION, [f"{key}=other"])
    file = tmp_path / "old.yaml"
    file.write_text(f"# @package _global_\ndefaults: [/{COMPRESSION}, _self_]\noverrides: [{key}=other]\n")
    with pytest.raises(UserError, match=rf"overrides: {key} = 'other' is gone"):
        compose(str(file))


def test_what_is_no_mapping_is_left_to_the_schema() -> None:
    with pytest.raises(UserError, match="minipuzzle"):
        compose(COMPRESSION, ["minipuzzle=3"])
