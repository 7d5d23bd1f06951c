"""Settings of a command line: which are the recipe's, and by which name."""

from __future__ import annotations

import pytest

from nemotron_h.core.errors import UserError
from nemotron_h.recipe.compose import compose
from nemotron_h.recipe.overrides import split


def test_a_part_of_a_recipe_is_set_by_a_mapping() -> None:
    expect = "expect: {mamba: 6, attention: 1, ffn: 6, parameters: 1_823_889_664}"
    typed = [f"model={{{expect}, pattern: M-M-M-M*-M-M-, vocab_size: 8192}}", "data={seq_length: 4_096}"]
    values, others = split([*typed, "model.config={hidden_size: 3}"])
    recipe = compose("nemotron_h_8b", values)
    assert (recipe.model.expect.mamba, recipe.model.expect.parameters) == (6, 1_823_889_664)
    assert recipe.data.seq_length == 4096
    assert others == ["model.config={hidden_size: 3}"], "NeMo's own"


def test_a_mapping_and_a_key_are_one_value_by_two_names() -> None:
    with pytest.raises(UserError, match=r"trainer\.devices=2 and parallel\.devices=4 set one value"):
        split(["trainer.devices=2", "parallel={devices: 4}"])
    with pytest.raises(UserError, match="not valid YAML"):
        split(["data={seq_length: "])
