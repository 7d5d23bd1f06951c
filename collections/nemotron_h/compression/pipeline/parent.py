"""The parent of a compression: its checkpoint, its weights while they are needed, its results on held-out text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.checkpoint.definition import read_definition
from nemotron_h.checkpoint.reader import find_checkpoint, read_record
from nemotron_h.compression.pipeline.text import Text, named
from nemotron_h.compression.scoring import Predictions, Score, predict
from nemotron_h.core.errors import UserError
from nemotron_h.core.progress import StageProgress
from nemotron_h.data.manifest import Manifest
from nemotron_h.inference.model import GenerationModel, load_model
from nemotron_h.inference.trained_tokenizer import check_data
from nemotron_h.launch.stages import content_digest
from nemotron_h.recipe.checks import definition_of
from nemotron_h.schema.recipe import RecipeConfig


class Parent:
    """A trained model that candidates are made of.

    Args:
        recipe: of the compression.
        text: that models are scored on.
        origin: stands for the recipe in errors.
        console: where progress goes.
    Attributes:
        checkpoint: its folder.
        definition: the recipe's, which is the checkpoint's.
        device, dtype: of the weights of all models that this process holds.
    Errors:
        UserError: the checkpoint is missing, damaged or of another model than the recipe's; its tokenizer is not the
            data's.
    """

    def __init__(self, recipe: RecipeConfig, text: Text, origin: str, console: Console) -> None:
        self.text, self.console, self._batch = text, console, recipe.data.micro_batch_size
        self.folder = Path(recipe.log.dir) / recipe.name
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        key = f"{origin}: {recipe.stage}.parent"
        with named(key, hint=f"train it first, or name another: {recipe.stage}.parent=runs/NAME"):
            self.checkpoint = find_checkpoint(Path(text.part.parent).expanduser())
        self.definition = definition_of(recipe, origin)
        _check_model(self.checkpoint, self.definition, key)
        self.check_tokenizer(text.manifest, origin)
        self._predictions: dict[str, Predictions] = {}

    def check_tokenizer(self, manifest: Manifest, origin: str) -> None:
        """Check that data was prepared with the parent's tokenizer; print a warning where nothing tells it.

        Errors:
            UserError: it was prepared with another one.
        """
        tokenizer, key = manifest.tokenizer, f"{self.text.origin}: {self.text.key}.parent"
        if tokenizer.vocab_size > self.definition.vocab_size:
            raise UserError(
                f"{origin}: the tokenizer of blend {manifest.blend} has {tokenizer.vocab_size:,} tokens, the parent "
                f"a vocabulary of {self.definition.vocab_size:,}",
                hint="choose a blend that was prepared with the parent's tokenizer",
            )
        if warning := check_data(self.checkpoint, manifest, key):
            self.console.print(f"warning: {warning}", highlight=False, markup=False, soft_wrap=True)

    @cached_property
    def model(self) -> GenerationModel:
        """Return the weights, read once until `release`."""
        self.console.print(f"loading {self.checkpoint}", highlight=False, markup=False, soft_wrap=True)
        return load_model(self.checkpoint, dtype=self.dtype, device=self.device)

    def release(self) -> None:
        """Give the weights' memory back: to a child, or to a run on the same machine."""
        self.__dict__.pop("model", None)
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def inputs(self) -> dict[str, Any]:
        """Return a stage's inputs: the parent's weights, by content."""
        return {"parent": content_digest(self.checkpoint)}

    def score_inputs(self, *halves: str) -> dict[str, Any]:
        """Return a stage's inputs: parent and text of scores on halves of the held-out text."""
        return {**self.inputs(), **self.text.held_out_inputs(*halves), "dtype": str(self.dtype)}

    def predictions(self, half: str) -> Predictions:
        """Return the greedy predictions of a half of the held-out text; they are kept in the compression's folder."""
        if half not in self._predictions:
            key = json.dumps(self.score_inputs(half), sort_keys=True)
            path = self.folder / f"parent-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
            if not path.exists():
                text = self.text.held_out[half]
                with StageProgress(self.console, "parent", text[:, 1:].size) as bar:
                    predictions = predict(self.model, text, self._batch, bar.advance)
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.with_suffix(".tmp.npz")
                np.savez_compressed(temporary, greedy=predictions.greedy, loss=predictions.loss)
                temporary.replace(path)
            with np.load(path) as stored:
                self._predictions[half] = Predictions(stored["greedy"], float(stored["loss"]))
        return self._predictions[half]

    def own_score(self, half: str) -> Score:
        """Return the parent's score on a half of the held-out text."""
        predictions = self.predictions(half)
        return predictions.score(self.text.held_out[half], predictions.greedy)

    def score(self, model: GenerationModel, half: str, advance: Callable[[int], None] = lambda _: None) -> Score:
        """Return a model's score on a half of the held-out text, in agreement with the parent too."""
        predictions = predict(model, self.text.held_out[half], self._batch, advance)
        return predictions.score(self.text.held_out[half], self.predictions(half).greedy)


def _check_model(checkpoint: Path, definition: ModelDefinition, key: str) -> None:
    """Check that a checkpoint is of the recipe's model."""
    recorded = read_definition(read_record(checkpoint), f"checkpoint {checkpoint}")
    differs = recorded.differences(definition, "in the checkpoint", "in the recipe", but=("name", "init_std"))
    if differs:
        raise UserError(
            f"{key}: {checkpoint} is of another model: {'; '.join(differs)}",
            hint="name a checkpoint of the recipe's model, or take the model of the checkpoint: model=NAME",
        )
