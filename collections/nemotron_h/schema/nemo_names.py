"""Names of NeMo's configurations for the values of a recipe: one table, read in both directions. Imports no NeMo."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from nemotron_h.schema.multipliers import MultipliersSchema
from nemotron_h.schema.recipe import (
    AdapterSchema,
    DistillSchema,
    ExpertsSchema,
    ModelSchema,
    PairLossSchema,
    RecomputeSchema,
)
from nemotron_h.schema.vision import ProjectorSchema, VisionSchema

_RENAMED = {
    "name": "definition_name",
    "pattern": "hybrid_override_pattern",
    "head_dim": "kv_channels",
    "position_embedding": "position_embedding_type",
    "rope_base": "rotary_base",
    "rope_percent": "rotary_percent",
    "qkv_bias": "add_qkv_bias",
    "qk_norm": "qk_layernorm",
    "tied_embeddings": "share_embeddings_and_output_weights",
    "norm_epsilon": "layernorm_epsilon",
    "init_std": "init_method_std",
}
#: field of a model definition -> that of `NemotronHConfig`, which holds the same value
MODEL = {
    each.name: _RENAMED.get(each.name, each.name)
    for each in fields(ModelSchema)
    if each.name not in ("expect", "sources")
}


def nemo_fields(model: Any) -> dict[str, Any]:
    """Return a model (`ModelSchema`, `ModelDefinition`) as arguments of `NemotronHConfig`."""
    return {name: getattr(model, key) for key, name in MODEL.items()}


def recompute_fields(recompute: RecomputeSchema) -> dict[str, str | bool]:
    """Return the settings as fields of `NemotronHConfig` and of a `Layout`."""
    return {f"recompute_{kind}": value for kind, value in asdict(recompute).items()}


#: key of the graph that NeMo runs -> key of the recipe, where both mean one value by two names
SAME = {
    "data.num_workers": "data.workers",  # its name before
    "data.reward_gap": "preference.reward_gap",
    "log.ckpt.every_steps": "checkpoint.every_steps",
    "log.ckpt.keep": "checkpoint.keep",
    "log.wandb.project": "log.project",
    "model.config.frozen": "optim.frozen",
    "model.config.init_seed": "init_seed",
    **{f"model.config.{each.name}": f"experts.{each.name}" for each in fields(ExpertsSchema)},
    **{f"model.config.recompute_{each.name}": f"recompute.{each.name}" for each in fields(RecomputeSchema)},
    **{f"model.config.multipliers.{each.name}": f"model.multipliers.{each.name}" for each in fields(MultipliersSchema)},
    **{f"model.config.vision.{each.name}": f"model.vision.{each.name}" for each in fields(VisionSchema)},
    **{f"model.config.projector.{each.name}": f"model.projector.{each.name}" for each in fields(ProjectorSchema)},
    **{f"model.config.adapter.{each.name}": f"adapter.{each.name}" for each in fields(AdapterSchema)},
    **{f"model.config.{each.name}": f"distill.{each.name}" for each in fields(DistillSchema)},
    **{f"model.config.{each.name}": f"preference.{each.name}" for each in fields(PairLossSchema)},
    **{f"model.{each.name}": f"preference.{each.name}" for each in fields(PairLossSchema)},  # its name before
    "optim.distributed_optimizer": "parallel.distributed_optimizer",
    "resume.init_checkpoint": "init.checkpoint",
    "resume.reference": "preference.reference",
    "resume.repair_embeddings": "init.repair_embeddings",
    "trainer.devices": "parallel.devices",
    "trainer.num_nodes": "parallel.nodes",
    "trainer.plugins.bf16_edge_layers": "precision_options.bf16_edge_layers",
    "trainer.plugins.fp8_backend": "precision_options.fp8_backend",
    "trainer.plugins.gradients": "optim.gradients",
    "trainer.plugins.name": "precision",
    "trainer.strategy.context_parallel_size": "parallel.context",
    "trainer.strategy.distributed_optimizer": "parallel.distributed_optimizer",
    "trainer.strategy.expert_model_parallel_size": "parallel.expert",
    "trainer.strategy.pipeline_model_parallel_size": "parallel.pipeline",
    "trainer.strategy.sequence_parallel": "parallel.sequence",
    "trainer.strategy.tensor_model_parallel_size": "parallel.tensor",
}

#: key of the graph -> keys of the recipe that its value comes from, in another unit or with another check
DERIVED = {
    "data.horizon_steps": ("tokens",),
    "data.horizon_tokens": ("tokens",),
    "log.explicit_log_dir": ("log.dir", "name"),
    "log.extra_loggers": ("log.trackers",),
    "log.wandb": ("log.trackers",),
    **{f"model.config.{name}": (f"model.{field}",) for field, name in MODEL.items()},
    "optim.decay_steps": ("optim.decay_tokens",),
    "optim.exponential_decay": ("optim.schedule",),
    "optim.warmup_steps": ("optim.warmup_tokens",),
    "trainer.limit_val_batches": ("log.validation_batches",),
    "trainer.max_steps": ("tokens",),
    "trainer.val_check_interval": ("log.validate_every_steps",),
}
