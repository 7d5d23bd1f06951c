"""The importance of a model's layers and channels: measured values, the scores made of them, and the artefact.

The artefact is a folder: `importance.safetensors` holds the measured values, `importance.json` what they were measured
on, the scores of the layers, and the sha256 of the other file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.checkpoint.definition import read_definition
from nemotron_h.compression.child import check_parent
from nemotron_h.compression.measure import Advance, measure_layers, measure_widths
from nemotron_h.compression.unfinished import Unfinished
from nemotron_h.core.errors import UserError, writing
from nemotron_h.core.files import file_sha256, read_json_object, write_json
from nemotron_h.core.progress import StageProgress
from nemotron_h.data.blend import Blend
from nemotron_h.data.feed.calibration import calibration_windows
from nemotron_h.data.manifest import Manifest
from nemotron_h.inference.model import GenerationModel
from nemotron_h.schema.minipuzzle import METRICS, ORDERS

VALUES, RECORD = "importance.safetensors", "importance.json"
FILES = (RECORD, VALUES)
#: end of the names of normalised inputs among the activations, of which the hidden size's scores are made
NORM = "norm"


@dataclass(frozen=True)
class Scores:
    """Numbers for layers and channels; those with the higher ones stay.

    Attributes:
        layers: [layers].
        hidden: [hidden_size].
        inner: layer -> activation -> [size of axis, ...] over its axes (`Block.activations`).
    """

    layers: np.ndarray
    hidden: np.ndarray
    inner: Mapping[int, Mapping[str, np.ndarray]]

    def ordered(self, order: str, seed: int = 0) -> Scores:
        """Return these scores (`importance`), or a control that they have to beat: `random` by `seed`, or `reversed`.

        Errors:
            UserError: unknown order.
        """
        if order not in ORDERS:
            raise UserError(f"order {order!r} is unknown", hint=f"use one of {', '.join(ORDERS)}")
        return {"importance": lambda: self, "random": lambda: self.shuffle(seed), "reversed": self.reverse}[order]()

    def reverse(self) -> Scores:
        """Return the opposite order."""
        # over several axes the sum of squares decides: the negative would change nothing
        inner = {
            layer: {name: -v if v.ndim == 1 else v.max() - v for name, v in activations.items()}
            for layer, activations in self.inner.items()
        }
        return Scores(-self.layers, -self.hidden, inner)

    def shuffle(self, seed: int) -> Scores:
        """Return a random order, the same for each `seed`."""
        rng = np.random.default_rng(seed)
        layers, hidden = rng.random(self.layers.shape), rng.random(self.hidden.shape)
        shapes = ((v.ndim, layer, name, v.shape) for layer, row in self.inner.items() for name, v in row.items())
        inner: dict[int, dict[str, np.ndarray]] = {}
        for _, layer, name, shape in sorted(shapes):
            inner.setdefault(layer, {})[name] = rng.random(shape)
        return Scores(layers, hidden, inner)


@dataclass(frozen=True)
class Importance:
    """Measured values of a model.

    Attributes:
        definition: of the model.
        metric: of `layers`; one of `METRICS`.
        layers: float64 [samples, layers], what removing a layer changes; see `measure_layers`.
        activations: name -> float64 [width]; see `measure_widths`.
        settings: what it was measured on: hashes of checkpoint and data, numbers of samples.
    """

    definition: ModelDefinition
    metric: str
    layers: Tensor
    activations: Mapping[str, Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def ranks(self) -> Tensor:
        """Return the mean over samples of each layer's rank among all layers, 0 for the least important: [layers].

        The paper averages rankings, not values (3.2): a sample with large errors then counts as any other.
        """
        return self.layers.argsort(dim=1, stable=True).argsort(dim=1).double().mean(0)

    def scores(self) -> Scores:
        """Return the scores by which layers and channels stay."""
        norms: list[Tensor] = []
        inner: dict[int, dict[str, np.ndarray]] = {}
        for name, values in self.activations.items():
            if name.endswith(NORM):
                norms.append(values)
            else:  # layers.I.NAME
                _, number, activation = name.split(".")
                axes = self.definition.blocks[int(number)].activations()[activation]
                inner.setdefault(int(number), {})[activation] = values.reshape([axis.size for axis in axes]).numpy()
        # where two layers have one mean rank, the mean value decides
        order = np.lexsort((self.layers.mean(0).numpy(), self.ranks().numpy()))
        return Scores(order.argsort().astype(float), torch.stack(norms).sum(0).numpy(), inner)

    def least(self, count: int = 4) -> str:
        """Return the first layers to go, for a line of text: `3 (-), 0 (M)`."""
        layers = self.scores().layers.argsort()[:count].tolist()
        return ", ".join(f"{layer} ({self.definition.pattern[layer]})" for layer in layers)

    def save(self, folder: Path) -> None:
        """Write the artefact into `folder`, which exists."""
        tensors = {"layers": self.layers, **self.activations}
        with writing(folder / VALUES):
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / VALUES)
        ranks, values = self.ranks(), self.layers.mean(0)
        record = {
            "settings": dict(self.settings),
            "metric": self.metric,
            "layers": [
                {"layer": number, "type": block.name, self.metric: float(value), "mean_rank": float(rank)}
                for number, (block, value, rank) in enumerate(zip(self.definition.blocks, values, ranks, strict=True))
            ],
            "model": _record(self.definition),
            "sha256": file_sha256(folder / VALUES),
        }
        write_json(folder / RECORD, record)

    @classmethod
    def load(cls, folder: Path, definition: ModelDefinition | None = None) -> Importance:
        """Read the artefact.

        Args:
            definition: the model that it has to be of; None takes any.
        Errors:
            UserError: it is missing, damaged, or of another model.
        """
        again = "measure the importance again"
        try:
            record = read_json_object(folder / RECORD)
        except UserError as error:
            raise UserError(f"{folder} holds no importance that can be read: {error.message}", hint=again) from error
        try:
            recorded, sha = read_definition(record, str(folder / RECORD)), record["sha256"]
            if file_sha256(folder / VALUES) != sha:
                raise UserError(f"{folder / VALUES} is not the file that was written", hint=again)
            tensors = load_file(folder / VALUES)
            layers = tensors.pop("layers")
            if four := record.get("aggregations"):  # as earlier versions measured: rows of every activation
                tensors = {name: values[four.index("mean_l2")] for name, values in tensors.items()}
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(f"{folder} holds no importance that can be read: {error}", hint=again) from error
        if definition is not None:
            check_parent(recorded, definition, f"importance {folder}")
        return cls(recorded, record["metric"], layers, tensors, record["settings"])


def _record(definition: ModelDefinition) -> dict[str, Any]:
    """Return a definition as the artefact states it, `overrides` only where layers have widths of their own."""
    return {key: value for key, value in asdict(definition).items() if key != "overrides" or value}


def measure(
    model: GenerationModel,
    layer_windows: np.ndarray,
    width_windows: np.ndarray,
    *,
    metric: str = "mse",
    settings: Mapping[str, Any] | None = None,
    advance: Advance = lambda _: None,
    device: str | None = None,
    unfinished: Path | None = None,
) -> Importance:
    """Measure layers and channels.

    Args:
        layer_windows, width_windows: token ids, int64 [samples, length]: the paper takes 128 for layers and 1,024 for
            neurons (3.2).
        metric: of the layers; see `measure_layers`.
        settings: what the record tells of checkpoint and data.
        advance: told of work that is done, in windows through the whole model; `work` is all of it.
        device: where to compute, if not where the weights are.
        unfinished: a file for what an interrupted measurement has come to; one of the same settings is continued.
    Errors:
        UserError: unknown metric, or token ids that the model lacks.
    """
    if metric not in METRICS:
        raise UserError(f"metric {metric!r} is unknown", hint=f"use one of {', '.join(METRICS)}")
    d = model.definition
    for windows in (layer_windows, width_windows):
        check_tokens(windows, d)
    record = {
        **(settings or {}),
        "layer_samples": len(layer_windows),
        "neuron_samples": len(width_windows),
        "seq_length": layer_windows.shape[1],
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    text = hashlib.sha256(layer_windows.tobytes() + width_windows.tobytes()).hexdigest()
    so_far = Unfinished(unfinished, json.dumps([record, metric, "mean_l2", text, _record(d)], sort_keys=True))
    weight = work(d, 1, 0)
    layers = measure_layers(
        model, layer_windows, metric, lambda done: advance(done * weight), device, so_far.layers, so_far.keep_layers
    )
    so_far.layers = layers
    activations = measure_widths(model, width_windows, advance, device, so_far.sums, so_far.keep_widths)
    so_far.remove()
    return Importance(d, metric, layers, activations, record)


def check_tokens(windows: np.ndarray, definition: ModelDefinition) -> None:
    """Check that a model has all of these tokens.

    Errors:
        UserError: names the largest that it lacks.
    """
    if (largest := int(windows.max())) >= definition.vocab_size:
        raise UserError(
            f"the data has token {largest:,}, model {definition.name} a vocabulary of {definition.vocab_size:,}",
            hint="measure on data of the model's own tokenizer",
        )


def measure_text(
    load: Callable[[], GenerationModel],
    blend: Blend,
    manifest: Manifest,
    seq_length: int,
    samples: tuple[int, int],
    *,
    console: Console,
    **options: Any,
) -> Importance:
    """Measure on the training text of a prepared blend, with progress.

    Args:
        load: returns the model, when it is known that there is enough text.
        seq_length: tokens of a window.
        samples: windows for layers, and for widths; the fewer are the first of the more.
        options: of `measure`.
    Errors:
        UserError: see `measure`; a source has too little text.
    """
    windows = calibration_windows(blend, manifest, max(samples), seq_length)
    layer_windows, width_windows = (windows[:count] for count in samples)
    model = load()
    with StageProgress(console, "windows through the model", work(model.definition, *samples)) as bar:
        return measure(model, layer_windows, width_windows, advance=bar.advance, **options)


def work(definition: ModelDefinition, layer_samples: int, width_samples: int) -> int:
    """Return the work of `measure`, in windows through the whole model: half a model per removed layer, and one."""
    return layer_samples * (1 + definition.num_layers // 2) + width_samples
