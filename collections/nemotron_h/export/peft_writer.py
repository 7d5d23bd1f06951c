"""Write an adapter's checkpoint as a folder that Hugging Face's PEFT loads over the exported base.

PEFT's formulas are ours (`nemotron_h.model.adapters`): W + alpha/rank B A, and with DoRA the rows brought to trained
lengths. What differs are the matrices. Queries, keys and values are three there: each has the A of all three and its
rows of B. `out_proj` of a Mamba-2 layer can have no adapter there: transformers' fused kernel reads its weights past
the layer, so PEFT refuses it. Its merged matrix is written whole, as one of `modules_to_save`, which computes the same.
transformers holds a matrix of all routed experts as one parameter, and PEFT's adapter of it (`target_parameters`) has
their A one below the other, and in each row of B their columns by rank; one without dropout and without lengths.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nemotron_h.checkpoint.adapters import AdaptedWeights, adapter_record
from nemotron_h.checkpoint.definition import read_definition
from nemotron_h.checkpoint.names import Weight, weights
from nemotron_h.checkpoint.reader import read_record
from nemotron_h.core.errors import UserError, writing
from nemotron_h.core.files import write_json
from nemotron_h.export.folder import new_folder
from nemotron_h.export.hf_types import check_expressible
from nemotron_h.export.hf_writer import INDENT

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: modules that PEFT puts no adapter on
WHOLE = "out_proj"
#: an expert's, in the names of its weights
_NUMBER = re.compile(r"(?<=\.experts\.)\d+\.")
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Plan:
    """Plan of an export to PEFT.

    Attributes:
        weights: the adapter's checkpoint and its base.
        rows: the adapted matrices.
        config: the content of `adapter_config.json`.
        size: bytes of all tensors.
        whole: how many matrices are written whole.
    """

    weights: AdaptedWeights
    rows: list[Weight]
    config: dict[str, Any]
    size: int
    whole: int


def plan(checkpoint: Path, base: Path | None = None, base_model: str | None = None) -> Plan:
    """Look at an adapter's checkpoint and its base; reads no weights.

    Args:
        checkpoint: as `find_checkpoint` returns it.
        base: where its base is, if it was moved.
        base_model: the exported base, a folder or a name on the hub, for those who load the adapter alone.
    Errors:
        UserError: it holds no adapter, or one that PEFT cannot express; the base is not found; one of the two is
            damaged.
    """
    settings = adapter_record(checkpoint)
    if settings is None:
        raise UserError(f"{checkpoint} holds no adapter", hint="export the whole model: nemotron-h export hf")
    definition = read_definition(read_record(checkpoint), f"checkpoint {checkpoint}")
    check_expressible(definition)
    file = AdaptedWeights(checkpoint, base)
    rows = [row for row in weights(definition) if not file.adapted.isdisjoint(row.ours)]
    stacked = [row for row in rows if row.stacked]
    if stacked and settings["kind"] == "dora":
        raise UserError(
            f"{checkpoint} has DoRA on routed experts, where PEFT has LoRA alone",
            hint="export the merged model: nemotron-h export hf",
        )
    modules = [_module(name).rpartition(".")[2] for row in rows if not row.stacked for name in row.theirs]
    modules = list(dict.fromkeys(modules))
    if modules == [WHOLE] and not stacked:
        raise UserError(
            f"{checkpoint} adapts {WHOLE} alone, which PEFT puts no adapter on",
            hint="export the merged model: nemotron-h export hf",
        )
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": settings["rank"],
        "lora_alpha": settings["alpha"],
        "lora_dropout": 0.0 if stacked else settings["dropout"],
        "use_dora": settings["kind"] == "dora",
        "target_modules": [name for name in modules if name != WHOLE],
        "modules_to_save": [WHOLE] if WHOLE in modules else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    if stacked:  # such as mixer.experts.up_proj
        names = (".".join(_parameter(row).split(".")[-3:]) for row in stacked)
        config["target_parameters"] = list(dict.fromkeys(names))
    tensors = [tensor for row in rows for tensor in _empty(file, row)]
    whole = sum(_is_whole(row) for row in rows)
    return Plan(file, rows, config, sum(tensor.nbytes for tensor in tensors), whole)


def write(plan: Plan, out: Path, advance: Advance = lambda _: None) -> None:
    """Write the folder: tensors in the checkpoint's dtypes, so that an adapter's numbers are bit for bit the trained.

    Args:
        plan: what to write. All tensors are in memory at once: PEFT reads one file.
        out: the folder; must not exist.
        advance: told the bytes of each matrix's tensors.
    Errors:
        UserError: `out` exists, the disk is full, or a checkpoint's weights are damaged.
    """
    with new_folder(out, plan.size) as folder:
        write_json(folder / CONFIG, plan.config, INDENT)
        tensors: dict[str, Tensor] = {}
        for row in plan.rows:
            if row.stacked:
                found = _stacked(plan.weights, row, plan.rows)
            else:
                found = (_whole if _is_whole(row) else _adapter)(plan.weights, row)
            tensors |= found
            advance(sum(tensor.nbytes for tensor in found.values()))
        with writing(folder / WEIGHTS):
            save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)  # safetensors lets the owner alone read


def _module(theirs: str) -> str:
    """Return the module of transformers' model that a weight of an exported folder is loaded into, as PEFT names it."""
    inside = theirs.removeprefix("backbone.").removeprefix("model.")
    return f"base_model.model.model.{inside.removesuffix('.weight')}"


def _parameter(row: Weight) -> str:
    """Return transformers' parameter that holds a matrix of all experts."""
    return _NUMBER.sub("", _module(next(iter(row.theirs))))


def _is_whole(row: Weight) -> bool:
    return any(_module(name).endswith(f".{WHOLE}") for name in row.theirs)


def _parts(file: AdaptedWeights, row: Weight) -> dict[str, list[str]]:
    """Return part of the adapter -> the names of the tensors that join to it; A has one."""
    names = [file.adapter_names(name) for name in row.ours]
    parts = {part: list(dict.fromkeys(each[part] for each in names)) for part in names[0]}
    return parts if file.dora else {part: parts[part] for part in ("a", "b")}


def _empty(file: AdaptedWeights, row: Weight) -> list[Tensor]:
    """Return tensors without memory, of the sizes that will be written."""
    if _is_whole(row):
        return [torch.empty(file.shapes[name], dtype=file.dtypes[name], device="meta") for name in row.ours]
    times = {} if row.stacked else {"a": len(row.theirs)}
    return [
        torch.empty(file.adapter.shapes[name], dtype=file.adapter.dtypes[name], device="meta")
        for part, names in _parts(file, row).items()
        for name in names * times.get(part, 1)
    ]


def _whole(file: AdaptedWeights, row: Weight) -> dict[str, Tensor]:
    """Return the merged matrix."""
    ((ours, shape), (theirs, _)) = *row.ours.items(), *row.theirs.items()
    tensor = torch.empty(shape, dtype=file.dtypes[ours])
    file.read({ours: tensor})
    return {f"{_module(theirs)}.weight": tensor}


def _read(file: AdaptedWeights, row: Weight) -> dict[str, Tensor]:
    """Return part of the adapter -> its numbers."""
    joined = {}
    for part, names in _parts(file, row).items():
        tensors = {n: torch.empty(file.adapter.shapes[n], dtype=file.adapter.dtypes[n]) for n in names}
        file.adapter.read(tensors)
        joined[part] = torch.cat(list(tensors.values()))
    return joined


def _stacked(file: AdaptedWeights, row: Weight, rows: list[Weight]) -> dict[str, Tensor]:
    """Return the adapter of a matrix of all experts, [experts * rank, inputs] and [outputs, rank * experts].

    Args:
        rows: all adapted matrices, in transformers' order.
    """
    parts, (module, _, name) = _read(file, row), _parameter(row).rpartition(".")
    # PEFT wraps a module once for each of its parameters, and the last is outermost
    names = [_parameter(other) for other in rows if other.stacked]
    outside = [other for other in names[names.index(f"{module}.{name}") + 1 :] if other.rpartition(".")[0] == module]
    inside = f"{module}{'.base_layer' * len(outside)}"
    return {
        f"{inside}.lora_A.weight": parts["a"].flatten(0, 1),
        f"{inside}.lora_B.weight": parts["b"].permute(1, 2, 0).flatten(1).contiguous(),
    }


def _adapter(file: AdaptedWeights, row: Weight) -> dict[str, Tensor]:
    """Return the adapters of a row's matrices."""
    joined, written = _read(file, row), {}
    for theirs, rows in row.to_theirs(joined["b"]).items():
        # tensors of one memory cannot be saved
        written[f"{_module(theirs)}.lora_A.weight"] = joined["a"].clone()
        written[f"{_module(theirs)}.lora_B.weight"] = rows.clone()
    if file.dora:
        for theirs, lengths in row.to_theirs(joined["magnitude"]).items():
            written[f"{_module(theirs)}.lora_magnitude_vector"] = lengths.clone()
    return written
