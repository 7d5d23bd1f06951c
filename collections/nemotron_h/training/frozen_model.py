"""Another model beside the one that is trained, in its layout and precision, with the weights of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from megatron.core import dist_checkpointing

from nemotron_h.architecture.definition import ModelDefinition
from nemotron_h.checkpoint.index import safe_reads
from nemotron_h.checkpoint.reader import WEIGHTS, WeightFile
from nemotron_h.model.module import NemotronHConfig, NemotronHMegatronModel
from nemotron_h.model.stored_names import reading
from nemotron_h.schema.nemo_names import recompute_fields
from nemotron_h.schema.recipe import RecomputeSchema


def frozen_model(
    trained: NemotronHConfig, definition: ModelDefinition, checkpoint: Path, pre_process: bool, post_process: bool
) -> NemotronHMegatronModel:
    """Build this rank's part of a model, frozen, with its weights.

    Args:
        trained: configuration of the model that is trained.
        definition: of the other one.
        checkpoint: its weights, in any layout.
        pre_process, post_process: this pipeline stage has the embedding, the output layer.
    Errors:
        UserError: the weights are not readable.
    """
    config = trained.of_definition(
        definition,
        adapter=None,
        perform_initialization=False,
        fuse_weight_gradients=False,
        **recompute_fields(RecomputeSchema(logits=trained.recompute_logits)),
    )
    model = config.megatron_model(NemotronHMegatronModel, pre_process, post_process)
    if config.bf16:
        model.bfloat16()  # as Megatron's wrapper does to the trained one
    model.eval().requires_grad_(False)
    load_weights(model, checkpoint)
    return model


def load_weights(model: NemotronHMegatronModel, checkpoint: Path) -> None:
    """Load a checkpoint of any layout into this rank's part of a model, in the model's dtypes."""
    prefix = WeightFile(checkpoint).prefix
    with safe_reads(checkpoint / WEIGHTS) as index:
        with reading(index.state_dict_metadata, [model]):
            wanted = model.sharded_state_dict(prefix=prefix)
        names = list(wanted)
        loaded = dist_checkpointing.load(wanted, str(checkpoint / WEIGHTS))  # with what else the checkpoint holds
    model.load_state_dict({name.removeprefix(prefix): loaded[name] for name in names})
