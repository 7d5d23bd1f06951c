"""A student and its frozen teacher as one Megatron model, whose output is the loss of distillation.

The teacher is split over ranks as the student is. Both go through the same pipeline stages: what a stage sends is the
student's states and the teacher's side by side, so each stage holds a part of either. The teacher is no submodule:
optimizer, gradient buffers, checkpoints and `train()` see the student alone, and a checkpoint is an ordinary one.

Axes: s positions (of a rank's shard where sequence parallelism is on), b batch, h width of the student, d of the
teacher; t tokens of all ranks' positions, those of one position one behind the other; v words of this rank, k stored
logits of a token.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from nemo.lightning.megatron_parallel import MegatronLossReduction
from torch import Tensor, nn

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.checkpoint import folders
from nemotron_h.checkpoint.definition import read_definition
from nemotron_h.checkpoint.hub_cache import path_of
from nemotron_h.checkpoint.reader import PROJECTION, WEIGHTS, find_checkpoint, read_record
from nemotron_h.core.errors import UserError
from nemotron_h.model import init
from nemotron_h.model.module import NemotronHConfig, NemotronHMegatronModel, NemotronHModel
from nemotron_h.model.step import over_all_tokens
from nemotron_h.ops.distillation_loss import (
    HiddenTeacher,
    Objective,
    TeacherLogits,
    TopLogits,
    distillation_loss,
)
from nemotron_h.ops.hidden_distance import hidden_distance
from nemotron_h.schema.recipe import DistillSchema
from nemotron_h.training.frozen_model import frozen_model
from nemotron_h.training.stages.distillation.teacher_cache import Header, read_header

#: what the last stage returns of a micro-batch: sums over its tokens
TERMS = ("loss", "tokens", "kl", "lm", "hidden")


#: of a batch: the stored logits of a teacher, and all that a step reads beside the tokens
STORED = ("teacher_values", "teacher_ids")
GIVEN = ("position_ids", "labels", "loss_mask", "seq_idx", *STORED)


def distillation_step(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Run one forward pass: float32 [5], the sums that `TERMS` names, on the last pipeline stage."""
    return model(input_ids=batch["tokens"], **{name: batch.get(name) for name in GIVEN})


@dataclass
class DistillationConfig(NemotronHConfig, DistillSchema):
    """The student's configuration, and what it learns from: the recipe's `distill`."""

    forward_step_fn: Callable = distillation_step

    @property
    def objective(self) -> Objective:
        """Return the terms of the loss that need logits.

        Errors:
            UserError: a value out of its range.
        """
        try:
            return Objective(**{each.name: getattr(self, each.name) for each in dataclasses.fields(Objective)})
        except ValueError as error:
            raise UserError(f"distill: {error}") from error

    @cached_property
    def stored(self) -> Header | None:
        """Read what the cache `teacher_logits` was written for; None without one.

        Errors:
            UserError: there is none, or it is not readable.
        """
        return None if self.teacher_logits is None else read_header(Path(self.teacher_logits).expanduser())

    @cached_property
    def teacher_checkpoint(self) -> Path:
        """Find the checkpoint that `teacher` means now.

        Errors:
            UserError: there is none, or a file is missing or has another size.
        """
        return find_checkpoint(Path(self.teacher or "").expanduser())

    @cached_property
    def teacher_definition(self) -> ModelDefinition:
        """Return the model that the teacher's record describes."""
        if self.stored is not None:
            return read_definition(self.stored.teacher, f"cache {self.teacher_logits}")
        return read_definition(read_record(self.teacher_checkpoint), f"checkpoint {self.teacher_checkpoint}")

    def definitions(self) -> dict[str, ModelDefinition]:
        """Return student and teacher; a teacher whose logits are stored runs no matmuls."""
        teacher = {} if self.stored else {"teacher": self.teacher_definition}
        return {"student": self.definition(), **teacher}

    def record(self) -> dict[str, Any]:
        """Return the teacher's checkpoint, model, one hash over those of its weights' files; a projection's widths."""
        if self.stored is not None:
            return {"teacher": {**self.stored.teacher, "logits": self.teacher_logits}}
        projection = {} if self.projection is None else {PROJECTION: self.projection}
        return {"teacher": self.known_teacher(), **projection}

    @property
    def projection(self) -> list[int] | None:
        """Return rows and columns of the projection of the student's states to the teacher's width, or None."""
        if not self.hidden_weight or self.teacher_definition.hidden_size == self.hidden_size:
            return None
        return [self.teacher_definition.hidden_size, self.hidden_size]

    def known_teacher(self) -> dict[str, Any]:
        """Describe `teacher` as `record` does; empty where its logits are stored and it is not on this machine."""
        if self.stored is not None and not (self.teacher and path_of(self.teacher).exists()):
            return {}
        checkpoint = self.teacher_checkpoint
        listed = folders.read_integrity(checkpoint)
        hashes = sorted((name, digest) for name, (_, digest) in listed.items() if name.startswith(f"{WEIGHTS}/"))
        definition = read_definition(read_record(checkpoint), f"checkpoint {checkpoint}")
        return {
            "checkpoint": str(checkpoint),
            "model": dataclasses.asdict(definition),
            "weights": hashlib.sha256(json.dumps(hashes).encode()).hexdigest(),
        }

    def configure_model(
        self, tokenizer: Any, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: Any = None
    ) -> DistillingModel:
        """Build this rank's part of both models and load the teacher's weights, unless its logits are stored.

        Errors:
            UserError: the tokenizer has another vocabulary; the teacher's weights are not readable.
        """
        self.check_tokenizer(tokenizer)
        first = parallel_state.is_pipeline_first_stage() if pre_process is None else pre_process
        last = parallel_state.is_pipeline_last_stage() if post_process is None else post_process
        teacher = None if self.stored else self.teacher_model(first, last)
        model = self.megatron_model(DistillingModel, first, last, teacher=teacher)
        model.initialize(self.init_seed)
        return self.freeze_parts(model)

    def teacher_model(self, pre_process: bool, post_process: bool) -> NemotronHMegatronModel:
        """Build this rank's part of the teacher; see `frozen_model`."""
        return frozen_model(self, self.teacher_definition, self.teacher_checkpoint, pre_process, post_process)


class DistillingModel(NemotronHMegatronModel):
    """The student, with its teacher beside it.

    Args:
        teacher: this rank's part of it, frozen; None where its logits come with the batches.
    """

    def __init__(
        self, config: DistillationConfig, teacher: NemotronHMegatronModel | None = None, **options: Any
    ) -> None:
        super().__init__(config, **options)
        self._beside = (teacher,)  # in a tuple, where torch does not look for submodules
        self.objective = config.objective
        if teacher is not None:
            self.decoder.taps = {own: None for own, _ in config.hidden_layers}
            teacher.decoder.taps = {theirs: None for _, theirs in config.hidden_layers}
        if self.post_process and config.projection is not None:
            device = torch.device("cpu") if config.use_cpu_initialization else torch.cuda.current_device()
            rows, columns = config.projection
            self.hidden_projection = nn.Linear(columns, rows, bias=False, dtype=config.params_dtype, device=device)
            self._register_load_state_dict_pre_hook(self._expect_no_projection)

    def initialize(self, seed: int) -> None:
        """Initialize as the plain model; the projection keeps the size of states."""
        super().initialize(seed)
        if self.projection is not None:
            init.fill(self.projection, PROJECTION, init.normal(self.config.hidden_size**-0.5), seed)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the student's sharded state, with the projection unless only the model's weights are asked for."""
        state = super().sharded_state_dict(*args, **kwargs)
        if self.state_part == "all":
            return state
        return {key: value for key, value in state.items() if PROJECTION not in key}

    def _expect_no_projection(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Keep the projection where the loaded weights have none, as initial ones."""
        state_dict.setdefault(f"{prefix}{PROJECTION}.weight", self.projection.detach())

    @property
    def projection(self) -> Tensor | None:
        """Return the projection [d, h] on the last stage; None without one."""
        layer = getattr(self, PROJECTION, None)
        return None if layer is None else layer.weight

    @property
    def teacher(self) -> NemotronHMegatronModel | None:
        """Return this rank's part of the frozen model."""
        return self._beside[0]

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None]) -> None:
        """Take what the stage before sent: both models' states, [s, b, h + d]."""
        (received,) = input_tensor if isinstance(input_tensor, list) else [input_tensor]
        if self.teacher is None:
            self.decoder.set_input_tensor(received)
            return
        own = beside = None
        if received is not None:
            own, beside = received.split([self.config.hidden_size, self.teacher.config.hidden_size], dim=-1)
            own, beside = own.contiguous(), beside.detach().contiguous()
        self.decoder.set_input_tensor(own)
        self.teacher.decoder.set_input_tensor(beside)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        teacher_values: Tensor | None = None,
        teacher_ids: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Run both models' layers of this stage, and on the last compute the loss.

        Args:
            input_ids, position_ids, labels, seq_idx: as `NemotronHMegatronModel.forward`.
            loss_mask: float [b, s], the weight of each token.
            teacher_values, teacher_ids: of a teacher that is stored, [b, s, k]: its k largest logits and
                their tokens; without tokens the logits of the whole vocabulary, of all ranks.
        Returns:
            float32 [5] on the last stage, the sums that `TERMS` names; else both models' states side by side.
        """
        beside = None
        if self.teacher is not None:
            with torch.no_grad():
                beside = self.teacher.hidden_states(input_ids, position_ids, seq_idx)  # [s, b, d]
        hidden = self.hidden_states(input_ids, position_ids, seq_idx)  # [s, b, h]
        if not self.post_process:
            return hidden if beside is None else torch.cat([hidden, beside.to(hidden.dtype)], dim=-1)
        weights = loss_mask.transpose(0, 1).reshape(-1).float()  # [t]
        own = self.whole(hidden)  # [t, h]
        if beside is None:
            theirs, teacher = None, self._stored_teacher(teacher_values, teacher_ids)
        else:
            theirs = self.whole(beside)
            teacher = HiddenTeacher(theirs, self.teacher.output_weight)
        found = distillation_loss(
            own,
            self.output_weight,
            teacher,
            labels.transpose(0, 1).reshape(-1),
            weights,
            self.objective,
            self.pg_collection.tp,
            words=self.words,
        )
        total, apart = found.total, torch.zeros_like(found.total)
        if self.config.hidden_weight:
            apart = (weights * self._distance(own, theirs)).sum()
            total = total + self.config.hidden_weight * apart
        kl, lm = (weights * found.kl).sum(), (weights * found.lm).sum()
        return torch.stack([total, weights.sum(), kl, lm, apart.detach()])

    def _distance(self, own: Tensor, theirs: Tensor) -> Tensor:
        """Return the distance [t] between the final states [t, h] and [t, d], or the mean over the pairs of layers."""
        pairs = [(own, theirs)]
        if self.config.hidden_layers:
            taps = (self.decoder.taps, self.teacher.decoder.taps)
            pairs = [
                [self.whole(tap[n]) for tap, n in zip(taps, pair, strict=True)] for pair in self.config.hidden_layers
            ]
            for tap in taps:
                tap.update(dict.fromkeys(tap))  # lets go of the states
        # every tensor-parallel rank takes it of the same states, whose gradients are summed over ranks; the projection
        # is whole on each, and its gradient is not
        ranks = self.pg_collection.tp.size()
        found = [hidden_distance(_shared(ours, ranks), other, self.projection) for ours, other in pairs]
        return torch.stack(found).mean(0)

    def _stored_teacher(self, values: Tensor, ids: Tensor | None) -> TeacherLogits | TopLogits:
        """Return what the loss takes of a batch's logits: [t, k], or [t, v] where all are stored."""
        values = values.transpose(0, 1).flatten(0, 1)  # [t, k], or [t, words of all ranks]
        if ids is not None:
            return TopLogits(values, ids.transpose(0, 1).flatten(0, 1).long())
        width = self.output_weight.shape[0]
        first = self.pg_collection.tp.rank() * width
        return TeacherLogits(values[:, first : first + width])


def _shared(value: Tensor, ranks: int) -> Tensor:
    """Return the value, of whose gradient each of `ranks` passes on an equal part."""
    return value if ranks == 1 else value.detach() + (value - value.detach()) / ranks


class DistillationReduction(MegatronLossReduction):
    """The mean loss per token from the sums of micro-batches; keeps the means of the other terms in `means`."""

    def __init__(self) -> None:
        super().__init__()
        self.means: dict[str, Tensor] = {}

    def forward(self, batch: dict[str, Any], forward_out: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return loss, tokens, and the sums for `reduce`, of a micro-batch."""
        sums = forward_out.detach().clone()  # Megatron divides the loss in place
        return *over_all_tokens(forward_out[0].clone(), sums[1].to(torch.int), batch, per_token=False), {"sums": sums}

    def reduce(self, losses_reduced_per_micro_batch: Sequence[dict[str, Tensor]]) -> Tensor:
        """Average over the tokens of all micro-batches and data-parallel ranks."""
        sums = torch.stack([each["sums"] for each in losses_reduced_per_micro_batch]).sum(0)
        torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        means = sums / sums[TERMS.index("tokens")]
        self.means = {name: mean for name, mean in zip(TERMS, means, strict=True) if name not in ("loss", "tokens")}
        return means[0]


class DistillationModel(NemotronHModel):
    """The Lightning module of a student that is distilled, over `DistillationConfig`."""

    batch_keys = STORED

    def forward(self, **batch: Tensor | None) -> Tensor:  # type: ignore[override]
        """Run the Megatron module, as `DistillingModel.forward`."""
        return self.module(**batch)

    def settings(self) -> dict[str, Any]:
        """Return those of `NemotronHModel`, and the objective's; the teacher itself is compared by its weights."""
        keys = [field.name for field in dataclasses.fields(DistillSchema) if field.name != "teacher"]
        return {**super().settings(), **{f"distill.{key}": getattr(self.config, key) for key in keys}}

    @property
    def training_loss_reduction(self) -> DistillationReduction:
        """Return the reduction of the sums that the model returns."""
        if not self._training_loss_reduction:
            self._training_loss_reduction = DistillationReduction()
        return self._training_loss_reduction

    @property
    def validation_loss_reduction(self) -> DistillationReduction:
        """Return the reduction of the sums that the model returns."""
        if not self._validation_loss_reduction:
            self._validation_loss_reduction = DistillationReduction()
        return self._validation_loss_reduction
