"""Text of a compression: a blend's training text, and its held-out text in two halves.

Candidates and winner are chosen on one half; the other, which no choice has seen, is reported.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np

from nemotron_h.core.errors import UserError
from nemotron_h.core.units import count_of
from nemotron_h.data.blend import Blend, load_blend
from nemotron_h.data.feed.calibration import calibration_batches, calibration_sampler
from nemotron_h.data.feed.sampler import ValidationText
from nemotron_h.data.manifest import Manifest, check_manifest
from nemotron_h.schema.recipe import RecipeConfig

CHOICE, REPORTED = "choice", "report"
HALVES = {
    half: f"the {nth} half of each source's validation text" for half, nth in ((CHOICE, "first"), (REPORTED, "second"))
}


@contextmanager
def named(key: str, hint: str = "") -> Iterator[None]:
    """Put a key of the recipe in front of errors, and a hint behind those that have none."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {error.message}", error.hint or hint) from error


def content_of(blend: Blend, manifest: Manifest, split: str) -> str:
    """Return the hash of a blend and its text of a split."""
    sources = {name: text for name, text in manifest.texts(split).items() if name in blend.sources}
    return hashlib.sha256(json.dumps([blend.hash(), sources], sort_keys=True).encode()).hexdigest()


class Text:
    """The blend of a compression.

    Args:
        recipe: of the compression.
        origin: stands for the recipe in errors.
    Errors:
        UserError: the blend is not prepared.
    """

    def __init__(self, recipe: RecipeConfig, origin: str) -> None:
        self.part, self.origin, self.seq_length = getattr(recipe, recipe.stage), origin, recipe.data.seq_length
        self.key = recipe.stage
        self.blend = load_blend(recipe.data.blend)
        with named(f"{origin}: data"):
            self.manifest = check_manifest(recipe.data.root, self.blend)

    def check(self) -> None:
        """Check that there is enough held-out text.

        Errors:
            UserError: fewer tokens than are scored.
        """
        part, where = self.part, f"{self.origin}: {self.key}"
        with named(f"{where}.score_tokens = {part.score_tokens}, of each half of the validation text"):
            for half in self._halves.values():
                half.check(self._samples)

    def check_samples(self) -> None:
        """Check that there is enough text to measure importance on.

        Errors:
            UserError: fewer samples than are asked for.
        """
        for key in ("layer_samples", "neuron_samples"):
            samples = getattr(self.part, key)
            with named(f"{self.origin}: {self.key}.{key} = {samples:,}"):
                calibration_sampler(self.blend, self.manifest, samples, self.seq_length)

    def batches(self, tokens: int, batch: int, seed: int) -> Callable[[int], np.ndarray]:
        """Return number of a step -> windows of the training text, int64 [batch, seq_length], for so many tokens.

        Errors:
            UserError: there is less text.
        """
        return calibration_batches(self.blend, self.manifest, tokens, batch, self.seq_length, seed)

    @cached_property
    def held_out(self) -> dict[str, np.ndarray]:
        """Return held-out windows, int64 [samples, seq_length + 1], by half: `CHOICE`, `REPORTED`."""
        return {name: half.read(self.manifest, self._samples) for name, half in self._halves.items()}

    def inputs(self, split: str) -> dict[str, Any]:
        """Return a stage's inputs: the text of a split, by content."""
        text = content_of(self.blend, self.manifest, split)
        return {f"{split} text": text, "data.seq_length": self.seq_length}

    def held_out_inputs(self, *halves: str) -> dict[str, Any]:
        """Return a stage's inputs: halves of the held-out text."""
        return {
            **self.inputs("validation"),
            "held-out text": [HALVES[half] for half in halves],
            f"{self.key}.score_tokens": self.part.score_tokens,
        }

    @cached_property
    def _halves(self) -> dict[str, ValidationText]:
        halves = ValidationText.halves(self.blend, self.manifest, self.seq_length)
        return dict(zip((CHOICE, REPORTED), halves, strict=True))

    @property
    def _samples(self) -> int:
        """Return the windows of each half."""
        tokens = count_of(self.part.score_tokens, f"{self.key}.score_tokens", self.origin)
        return tokens // self.seq_length
