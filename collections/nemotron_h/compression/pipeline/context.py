"""The things that the stages of MiniPuzzle share, beside each other's outputs.

<log.dir>/<name>/importance/    importance.json, importance.safetensors
                 candidates/    candidates.json: every architecture of the grid within the budget
                 score/         scores.jsonl (a line as each is scored), ranking.json
                 short-distil/  NAME-pruned (checkpoint), NAME (run), for each of the best; results.json
                 select/        winner.json
                 distil/        <name> (run): its checkpoint is the child; results.json
                 export/        hf/, model.yaml, report.html, result.json
"""

from __future__ import annotations

import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.checkpoint.reader import find_checkpoint
from nemotron_h.compression.candidates import Candidate, Candidates
from nemotron_h.compression.child import Child, child_definition
from nemotron_h.compression.importance import Scores
from nemotron_h.compression.pipeline.compression import Compression
from nemotron_h.compression.pipeline.text import named
from nemotron_h.compression.selection import child_of
from nemotron_h.compression.slicing import slice_model, write_child
from nemotron_h.compression.task_scores import task_scores
from nemotron_h.inference.model import GenerationModel


class Context(Compression):
    """A compression with the children that candidates stand for.

    Args:
        arguments: as of `Compression`.
    Errors:
        UserError: as of `Compression`; no candidate fits the budget (where the grid gives a depth, the stage that makes
            them says so).
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.text.check_samples()
        if not self.part.grid.depth:  # which layers fill a depth is known when their importance is
            self.candidates(None)

    def candidates(self, layer_scores: np.ndarray | None) -> Candidates:
        """Return the candidates of the recipe's grid and budget."""
        with named(f"{self.origin}: minipuzzle"):
            return Candidates(self.definition, self.part.grid, self.part.budget, layer_scores)

    # children

    @cached_property
    def scores(self) -> Scores:
        """Return the order in which layers and channels stay; a control has another."""
        return self.importance.scores().ordered(self.part.order, self.recipe.init_seed)

    def child(self, candidate: Candidate) -> Child:
        """Return what of the parent a candidate keeps."""
        return child_of(self.definition, self.scores, candidate)

    def name_of(self, candidate: Candidate) -> str:
        """Return the name of a candidate's model definition."""
        return f"{self.definition.name}-{candidate.name}"

    def definition_of(self, candidate: Candidate) -> ModelDefinition:
        """Return a candidate's definition."""
        return child_definition(self.definition, self.child(candidate), self.name_of(candidate))

    def realised(self, candidate: Candidate) -> GenerationModel:
        """Return a candidate over the parent's weights."""
        return slice_model(self.parent.model, self.child(candidate), self.name_of(candidate))

    def pruned(self, folder: Path, candidate: Candidate) -> Path:
        """Return the candidate's checkpoint before any training, in a stage's folder; it is written once."""
        path = folder / f"{candidate.name}-pruned"
        if not (path / "integrity.json").is_file():
            shutil.rmtree(path, ignore_errors=True)
            write_child(self.parent.checkpoint, self.child(candidate), path, self.name_of(candidate))
        return path

    def measure(self, checkpoint: Path) -> dict[str, Any]:
        """Measure a trained model, on the recipe's evaluation too."""
        result = super().measure(checkpoint)
        if self.part.evaluate:
            result["evaluated"] = task_scores(self.part.evaluate, find_checkpoint(checkpoint), self.origin)
        return result
