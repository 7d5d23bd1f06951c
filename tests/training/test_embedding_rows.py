"""Rows of the embedding that a released checkpoint has near zero: named, met in the data, replaced."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_run import Small, sft_recipe

from nemotron_h.checkpoint.definition import read_definition
from nemotron_h.checkpoint.embedding_rows import EMBEDDING, find_outliers, replacements
from nemotron_h.checkpoint.reader import WeightFile, find_checkpoint, read_record
from nemotron_h.checkpoint.writer import finish, write_weights
from nemotron_h.core.errors import UserError
from nemotron_h.training.callbacks.embedding_rows import EmbeddingRows

IDS = [40, 41, 300, 301, 302, 303, 304, 511]  # 40 and 41 are capitals, which no text has; the others are of words


def damaged(small: Small) -> Path:
    """A checkpoint of the run `straight` whose rows of these ids are zero, or nearly."""
    source = find_checkpoint(small.run_dir("straight"))
    definition, file = read_definition(read_record(source), "straight"), WeightFile(source)
    folder = small.folder / "outlying_rows"
    folder.mkdir()

    def read(row):
        tensors = {name: torch.empty(file.shapes[name], dtype=file.dtypes[name]) for name in row.ours}
        file.read(tensors)
        if EMBEDDING in tensors:
            tensors[EMBEDDING][IDS] = 0
            tensors[EMBEDDING][IDS[0]] = 1e-8
        return tensors

    write_weights(folder, definition, torch.bfloat16, read)
    finish(folder, definition, {"data": read_record(source)["data"]}, "A test's.")
    return folder


def rows(weight: torch.Tensor) -> tuple[torch.Tensor, float]:
    norms = weight[:512].float().norm(dim=1)
    return norms[IDS], float(norms.median())


@pytest.mark.slow
def test_rows_are_named_met_and_replaced(talk: Small) -> None:
    checkpoint = damaged(talk)
    recipe = sft_recipe(talk, "rows")
    recipe.write_text(recipe.read_text().replace(str(talk.run_dir("straight")), str(checkpoint)))
    kept = talk.train("rows", "trainer.max_steps=2", recipe=recipe)
    assert f"warning: 8 embedding rows of {checkpoint} have outlying norms: 40 " in kept.stdout
    met = re.findall(r"warning: step \d: the data have tokens of outlying embedding rows: ([\d, ]+);", kept.stdout)
    numbers = [number for line in met for number in line.split(", ")]
    assert numbers  # each once
    assert sorted(set(numbers)) == sorted(numbers)
    assert set(numbers) <= set(map(str, IDS[2:]))
    record = json.loads((talk.run_dir("rows") / "run.json").read_text())["embedding_rows"]
    assert (list(record["outliers"]), record["repaired"]) == ([str(i) for i in IDS], False)
    again = talk.train("rows", "trainer.max_steps=3", "resume.repair_embeddings=true", recipe=recipe, check=False)
    assert again.returncode == 2
    assert "init.repair_embeddings: False in the checkpoint, True now" in again.stderr

    recipe = sft_recipe(talk, "new")
    start = f"checkpoint: {talk.run_dir('straight')}"
    recipe.write_text(recipe.read_text().replace(start, f"checkpoint: {checkpoint}, repair_embeddings: true"))
    repaired = talk.train("new", "trainer.max_steps=2", recipe=recipe)
    assert "they are replaced" in repaired.stdout
    assert "the data have tokens" not in repaired.stdout
    start = torch.load(talk.folder / "new" / "start.pt")
    norms, median = rows(next(value for key, value in start.items() if key.endswith(EMBEDDING)))
    assert torch.allclose(norms, torch.full_like(norms, median), rtol=1e-2)  # rounded to bfloat16
    # the optimizer's own copy too: from near zero, one step's update would be all of the row
    for name, options in (
        ("new", ()),
        ("split", ("trainer.devices=2", "trainer.strategy.tensor_model_parallel_size=2")),
    ):
        if options:
            recipe.write_text(recipe.read_text().replace(str(talk.folder / "new"), str(talk.folder / name)))
            talk.train(name, "trainer.max_steps=2", *options, recipe=recipe)
        saved = WeightFile(find_checkpoint(talk.run_dir(name)))
        weight = torch.empty(saved.shapes[EMBEDDING])
        saved.read({EMBEDDING: weight})
        norms, median = rows(weight)
        assert torch.allclose(norms, torch.full_like(norms, median), rtol=0.2), name
    assert read_record(find_checkpoint(talk.run_dir("new")))["embedding_rows"]["repaired"] is True


def test_new_rows_have_the_output_layer_s_direction() -> None:
    rng = torch.Generator().manual_seed(1)
    embedding, head = (torch.randn(64, 16, generator=rng) for _ in range(2))
    embedding[5], embedding[7], embedding[63] = 0, 1e6, 0
    head[7] = 0
    outliers = find_outliers(embedding, 60)  # the last four rows are padding
    assert list(outliers.norms) == [5, 7]
    new = replacements(outliers, head)
    assert torch.allclose(new.norm(dim=1), torch.full((2,), outliers.median))
    assert torch.cosine_similarity(new[0], head[5], dim=0) > 0.9999
    assert outliers.described(lambda number: f"t{number}").startswith("5 't5' 0.0e+00, 7 't7' 4.0e+06 (the median")
    assert find_outliers(torch.randn(64, 16, generator=rng), 64).record(False) == {}


def test_an_adapter_s_frozen_rows_are_not_repaired() -> None:
    module = SimpleNamespace(config=SimpleNamespace(adapter=object()))
    with pytest.raises(UserError, match="with an adapter") as error:
        EmbeddingRows(Path("base"), True).setup(SimpleNamespace(), module, "fit")
    assert "--repair-embeddings" in error.value.hint
