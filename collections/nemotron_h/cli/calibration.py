"""Text and model of commands that measure and train a parent's layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotron_h.core.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from nemotron_h.compression.puzzle.local import Training
    from nemotron_h.data.blend import Blend
    from nemotron_h.data.manifest import Manifest
    from nemotron_h.inference.model import GenerationModel

#: windows, as in the code of 2412.20677: 128 x 2,048 tokens
SAMPLES = 128
#: ours: of a step of training, as of `LocalSchema`
BATCH, LR = 16, 1e-3


@dataclass(frozen=True)
class CalibrationText:
    """Text of a prepared blend, to measure and to train on.

    Attributes:
        length, samples: tokens of a window, windows to measure on.
        seed: of the choice of windows, and of what a command samples besides.
    """

    blend: Blend
    manifest: Manifest
    length: int
    samples: int
    seed: int

    @classmethod
    def of(
        cls, checkpoint: Path, blend: str, root: Path | None, seq_length: int | None, samples: int, seed: int
    ) -> CalibrationText:
        """Return the text of the options."""
        from nemotron_h.checkpoint.reader import read_record
        from nemotron_h.data.blend import load_blend
        from nemotron_h.data.manifest import check_manifest

        length = seq_length or (read_record(checkpoint).get("data") or {}).get("seq_length")
        if not length:
            raise UserError(f"{checkpoint} does not tell its sequence length", hint="give --seq-length")
        text = load_blend(blend)
        return cls(text, check_manifest(root, text), length, samples, seed)

    def record(self, checkpoint: Path) -> dict[str, Any]:
        """Return what run.json tells of it."""
        from nemotron_h.checkpoint.folders import INTEGRITY
        from nemotron_h.core.files import file_sha256
        from nemotron_h.data.feed.calibration import text_record

        return {
            "checkpoint_sha256": file_sha256(checkpoint / INTEGRITY),
            "samples": self.samples,
            "seq_length": self.length,
            "seed": self.seed,
            **text_record(self.blend, self.manifest),
        }

    def batches(self, training: Training) -> Callable[[int], np.ndarray]:
        """Return number of a step -> its windows of the training text, int64 [batch, length].

        Errors:
            UserError: there is less text.
        """
        from nemotron_h.data.feed.calibration import calibration_batches

        tokens, batch = training.tokens, training.batch
        return calibration_batches(self.blend, self.manifest, tokens, batch, self.length, self.seed)

    def held_out(self) -> np.ndarray:
        """Return windows of the held-out text, int64 [samples, length + 1]: as many as it has, `samples` at most.

        Errors:
            UserError: there is no such text.
        """
        from nemotron_h.data.feed.sampler import ValidationText

        text = ValidationText.of(self.blend, self.manifest, self.length)
        return text.read(self.manifest, min(self.samples, text.windows))


def load_parent(checkpoint: Path, exact: bool) -> GenerationModel:
    """Return the model of a checkpoint; `exact` in float32."""
    import torch

    from nemotron_h.inference.model import load_model

    return load_model(checkpoint, dtype=torch.bfloat16 if torch.cuda.is_available() and not exact else torch.float32)


def device() -> str | None:
    """Return where to compute; None is where the weights are."""
    import torch

    return "cuda" if torch.cuda.is_available() else None
