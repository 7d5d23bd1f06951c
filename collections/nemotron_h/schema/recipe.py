"""The one vocabulary of recipes: typed, and strict (unknown keys are errors, numbers have ranges).

Imports no torch, NeMo or Megatron.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from omegaconf import MISSING

from nemotron_h.core.strict import number, within
from nemotron_h.schema.hybridise import HybridiseSchema
from nemotron_h.schema.minipuzzle import MiniPuzzleSchema
from nemotron_h.schema.multipliers import MultipliersSchema
from nemotron_h.schema.puzzle import PuzzleSchema
from nemotron_h.schema.ranges import COUNT, SEED, VOCABULARY, WIDTH
from nemotron_h.schema.reason import ReasonSchema
from nemotron_h.schema.vision import CLOSEST, MOST_TILES, ProjectorSchema, VisionSchema

PRECISIONS = ("fp32", "bf16", "fp8_current_scaling", "fp8_blockwise")
FP8_BACKENDS = ("auto", "te", "emulate")
OPTIMIZERS = ("adamw", "muon")
#: coefficients of Muon's steps (ops/newton_schulz.py)
NEWTON_SCHULZ = ("simple", "quintic", "polar_express")
OPTIMIZER_CHANGES = ("from_step",)
#: of what the optimizer keeps
STATE_DTYPES = ("fp32", "bf16")
#: stage -> the command of `nemo llm` that runs it
STAGES = {"pretrain": "pretrain", "sft": "finetune", "preference": "finetune", "distill": "distill"}
#: stages of a recipe that a command of `nemotron-h` runs: each is made of several runs of `STAGES`
PIPELINES = {"minipuzzle": "minipuzzle", "puzzle": "puzzle", "hybridise": "hybridise", "reason": "reason"}
#: pipeline -> key of its part that names the checkpoint which is there before
STARTS = {**dict.fromkeys(PIPELINES, "parent"), "reason": "start"}
TOO_LONG = ("cut", "drop")
#: the first of which read no rewards
DPO_LOSSES = ("dpo", "dpo_norm")
PREFERENCE_LOSSES = (*DPO_LOSSES, "rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq")
ADAPTERS = ("none", "lora", "dora")
EXPONENTIAL = "wsd_exponential"
SCHEDULES = ("cosine", "wsd", EXPONENTIAL)
TRACKERS = ("tensorboard", "wandb", "mlflow")
_RECOMPUTED = ("mamba", "ffn", "attention", "parallel", "swiglu", "experts", "linear", "logits", "vision")
_ACTIVATION = ("none", "activation", "layer")
RECOMPUTE = dict.fromkeys(_RECOMPUTED, ("none", "layer"))
RECOMPUTE |= {"ffn": _ACTIVATION, "swiglu": _ACTIVATION, "logits": ("none", "chunks")}
BLEND_CHANGES = ("from_step",)
#: how the phases of a blend order its windows
PHASE_ORDERS = ("blend", "random")


@dataclass
class ExpectSchema:
    """Counts that the model must have; loading fails when they differ."""

    mamba: int = number(least=0, most=COUNT)
    attention: int = number(least=0, most=COUNT)
    ffn: int = number(least=0, most=COUNT)
    parameters: int = number(least=0, most=10**18)
    parallel: int = number(0, least=0, most=COUNT)
    swiglu: int = number(0, least=0, most=COUNT)
    experts: int = number(0, least=0, most=COUNT)
    linear: int = number(0, least=0, most=COUNT)
    active: int = number(0, least=0, most=10**18)
    mtp: int = number(0, least=0, most=10**18)
    vision: int = number(0, least=0, most=10**18)


@dataclass
class ModelSchema:
    """Pattern and widths; see `architecture.definition.ModelDefinition` for the meaning of each. 0 is left out."""

    name: str = MISSING
    family: str = MISSING
    pattern: str = MISSING
    hidden_size: int = number(least=1, most=WIDTH)
    vocab_size: int = number(least=1, most=VOCABULARY)
    ffn_hidden_size: int = number(0, least=0, most=WIDTH)
    num_attention_heads: int = number(0, least=0, most=WIDTH)
    num_query_groups: int = number(0, least=0, most=WIDTH)
    head_dim: int = number(0, least=0, most=WIDTH)
    mamba_num_heads: int = number(0, least=0, most=WIDTH)
    mamba_head_dim: int = number(0, least=0, most=WIDTH)
    mamba_num_groups: int = number(0, least=0, most=WIDTH)
    mamba_state_dim: int = number(0, least=0, most=WIDTH)
    conv_kernel: int = number(0, least=0, most=WIDTH)
    num_experts: int = number(0, least=0, most=WIDTH)
    experts_per_token: int = number(0, least=0, most=WIDTH)
    expert_hidden_size: int = number(0, least=0, most=WIDTH)
    shared_expert_hidden_size: int = number(0, least=0, most=WIDTH)
    expert_scaling: float = number(0.0, least=0, most=1e6)
    expert_latent_size: int = number(0, least=0, most=WIDTH)
    mtp_pattern: str = ""
    mtp_steps: int = number(0, least=0, most=COUNT)
    mamba_norm: bool = True
    position_embedding: str = "none"
    rope_base: int = number(0, least=0, most=10**18)
    rope_percent: float = number(0.0, least=0, most=1)
    rope_scaling_factor: float = number(0.0, least=0, most=1e6)
    rope_low_freq_factor: float = number(0.0, least=0, most=1e6)
    rope_high_freq_factor: float = number(0.0, least=0, most=1e6)
    rope_original_length: int = number(0, least=0, most=COUNT)
    qkv_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    norm_epsilon: float = number(1e-5, above=0, most=1)
    init_std: float = number(0.02, above=0, most=10)
    multipliers: MultipliersSchema = field(default_factory=MultipliersSchema)
    vision: VisionSchema | None = None
    projector: ProjectorSchema | None = None
    overrides: dict[str, dict[str, int]] = field(default_factory=dict, metadata=within(least=1, most=WIDTH))
    expect: ExpectSchema = field(default_factory=ExpectSchema)
    sources: dict[str, str] = field(default_factory=dict)


@dataclass
class DataSchema:
    """Blend, and its split into batches.

    Attributes:
        blend: name of a file in `data_blends/`, or a path.
        root: folder of prepared data; null is `$NEMOTRON_H_DATA`, or `./data`.
        seq_length: tokens per sequence.
        global_batch_size: sequences per step, over all ranks.
        micro_batch_size: sequences per forward pass of one rank.
        seed: of the sample order.
        phase_order: pretraining: `blend` takes phase after phase; `random` the windows of all phases in one random
            order, the control of a curriculum.
        document_reset: whether states and attention start anew at document boundaries; packed conversations always do.
        too_long: sft and preference: what becomes of conversations (or pairs of them) longer than `seq_length`: `cut`
            at its end, or `drop` them.
        max_tiles, tiling: sft with images: most tiles of one without its thumbnail; `closest` or `area` (images.md).
        workers: processes that load data, per rank.
    """

    blend: str = MISSING
    root: str | None = None
    seq_length: int = number(least=1, most=COUNT)
    global_batch_size: int = number(least=1, most=COUNT)
    micro_batch_size: int = number(1, least=1, most=COUNT)
    seed: int = number(1234, least=0, most=SEED)
    phase_order: str = "blend"
    document_reset: bool = False
    too_long: str | None = None
    max_tiles: int = number(MOST_TILES, least=1, most=MOST_TILES)
    tiling: str = CLOSEST
    workers: int = number(0, least=0, most=1024)


@dataclass
class OptimSchema:
    """AdamW or Muon, and a schedule with linear warm-up.

    Attributes:
        name: `adamw`, or `muon`: the layers' matrices are updated by their orthogonalized momentum, all other weights
            by AdamW at the same rate. Formulas: docs/muon.md.
        momentum: of Muon, summed and Nesterov's.
        newton_schulz: coefficients of Muon's orthogonalization: `simple` (Keller Jordan's), `quintic` (You's) or
            `polar_express`.
        qk_clip: largest attention logit that a step of Muon leaves alone; None is any. Kimi K2 has 100.
        schedule: `cosine` (from the warm-up to the end of the run), `wsd` (warm-up, stable, linear decay), or
            `wsd_exponential` (its decay is exponential: the same factor every step).
        peak_lr, final_lr: learning rates at the end of the warm-up and of the run.
        warmup_tokens: length of the warm-up; an integer, or text such as 8.3B.
        decay_tokens: length of the decay at the end of the run; of both wsd only.
        beta1, beta2, eps: AdamW.
        weight_decay: decoupled, of both.
        clip_grad: largest global gradient norm; 0 is no clipping.
        moments: `fp32`, or `bf16`: Adam's two moments, half as large; on GPUs only.
        gradients: `fp32`, or `bf16`: sums of gradients over micro-batches and data-parallel ranks, half as large.
        skip_spikes: do not apply a step whose loss or gradient norm is over six standard deviations above the mean of
            the last 128 steps; learning rate and data go on.
        frozen: parts that do not train: kinds of layers by name (`ffn`, `attention`, ...), `embedding`, and `output`
            (the last norm and the output matrix); of a model that reads images `vision` (the encoder), `projector`, and
            `language` (all the rest).
    """

    name: str = "adamw"
    momentum: float = number(0.95, least=0, below=1)
    newton_schulz: str = "simple"
    qk_clip: float | None = number(None, above=0, most=1e9)
    peak_lr: float = number(above=0, most=10)
    final_lr: float = number(least=0, most=10)
    warmup_tokens: str = MISSING
    schedule: str = "cosine"
    decay_tokens: str | None = None
    beta1: float = number(0.9, least=0, below=1)
    beta2: float = number(0.95, least=0, below=1)
    eps: float = number(1e-8, least=0, most=1)
    weight_decay: float = number(0.1, least=0, most=100)
    clip_grad: float = number(1.0, least=0, most=1e9)
    moments: str = "fp32"
    gradients: str = "fp32"
    skip_spikes: bool = False
    frozen: list[str] = field(default_factory=list)


@dataclass
class ParallelSchema:
    """Split of the model and the batch over ranks. Data parallel is what remains of nodes * devices.

    Attributes:
        context: ranks that the tokens of a sequence are split over; where a layer mixes tokens, these ranks split its
            heads instead.
        expert: ranks that the routed experts of a layer are split over. They lie over the tensor-, context- and
            data-parallel ranks of a pipeline stage, and no expert is split (megatron-core's
            `expert_tensor_parallel_size` 1).
    """

    nodes: int = number(1, least=1, most=2**20)
    devices: int = number(1, least=1, most=2**20)
    tensor: int = number(1, least=1, most=2**20)
    pipeline: int = number(1, least=1, most=2**20)
    context: int = number(1, least=1, most=2**20)
    expert: int = number(1, least=1, most=2**20)
    sequence: bool = False
    distributed_optimizer: bool = True


@dataclass
class PrecisionOptionsSchema:
    """Options of an FP8 precision; the others read none of it.

    Attributes:
        bf16_edge_layers: layers of the pattern at each end that stay in BF16. 2 are the "4 GEMMs" of the paper's
            introduction (an `M-` or `*-` has 4), 4 the "4 layers" of its section 2.3.
        fp8_backend: `te` (Transformer Engine), `emulate` (float8 casts around float32 matmuls, slow), or `auto`:
            Transformer Engine on a GPU, emulation on the CPU.
        measured_steps: steps, from 1, at which every FP8 operand's amax, underflow and saturation are measured.
    """

    bf16_edge_layers: int = number(2, least=0, most=WIDTH)
    fp8_backend: str = "auto"
    measured_steps: list[int] = field(default_factory=list, metadata=within(most=COUNT))


@dataclass
class RecomputeSchema:
    """Activations that the backward pass computes again instead of keeping, by layer type.

    Attributes:
        mamba, attention, parallel, experts, linear: `none`, or `layer` (only the layer's input is kept).
        vision: the same of all layers of the image encoder.
        ffn, swiglu: `none`, `activation` (squared ReLU or SwiGLU is computed again), or `layer`.
        logits: `none`, or `chunks`: output matmul and loss run over chunks of tokens, forward and backward, and the
            logits of a chunk alone exist. A distillation does so in any case.
        offload: the inputs of layers that are `layer` are kept in host memory until their backward; not the encoder's.
    """

    mamba: str = "none"
    ffn: str = "none"
    attention: str = "none"
    parallel: str = "none"
    swiglu: str = "none"
    experts: str = "none"
    linear: str = "none"
    logits: str = "none"
    vision: str = "none"
    offload: bool = False


@dataclass
class ExpertsSchema:
    """Balance of the routed experts' loads; read by models with experts alone.

    Attributes:
        balance_loss: weight of the load-balancing loss of each sequence; 0 is none. 1e-4 is Nemotron 3's.
        bias_update: step by which the correction bias of an expert falls or rises after each optimizer step, when more
            or fewer tokens chose it than the mean (arXiv 2408.15664). 1e-3 is Nemotron 3's.
    """

    balance_loss: float = number(1e-4, least=0, most=1e3)
    bias_update: float = number(1e-3, least=0, most=1e3)


@dataclass
class ResumeSchema:
    """Rules by which a run continues from its checkpoint.

    Attributes:
        blend_change: null, or `from_step`: a resumed run may take another blend, seed, seq_length or global_batch_size
            from the checkpoint's step on; the record keeps both.
        optimizer_change: null, or `from_step`: a resumed run may take another `optim.name` from the checkpoint's step
            on. Moments that the checkpoint lacks begin at zero.
    """

    blend_change: str | None = None
    optimizer_change: str | None = None


@dataclass
class InitSchema:
    """Start of a run that has no checkpoint of its own.

    Attributes:
        checkpoint: a run's folder, one of its checkpoints, or `hub:organisation/name@revision` of the Hugging Face
            Hub: weights are taken, the optimizer starts anew. Null draws them from `init_seed`.
        repair_embeddings: give rows of the input embedding whose norm is far from the others' (they are named in any
            case) the direction of the output layer's row, at the median norm. Released models have some near zero.
    """

    checkpoint: str | None = None
    repair_embeddings: bool = False


@dataclass
class PairLossSchema:
    """The loss over pairs of answers. Formulas: docs/preference.md.

    Attributes:
        loss: `dpo`, `dpo_norm` (log-probabilities are means over an answer's tokens), or reward-aware: `rpo_bwd_kl`,
            `rpo_fwd_kl`, `rpo_sq` (NeMo-Aligner's names).
        beta: how strongly the policy is held to the reference: scales log-probability ratios.
        gt_reward_scale: scales the records' rewards (rpo only).
    """

    loss: str = MISSING
    beta: float = number(0.2, above=0, most=1e6)
    gt_reward_scale: float = number(1.0, least=-1e6, most=1e6)


@dataclass
class PreferenceSchema(PairLossSchema):
    """The loss, and the rewards that it reads.

    Attributes:
        reward_gap: the chosen answer's reward less the rejected one's, where records state none (rpo only).
        reference: a run's folder or a checkpoint, as `init.checkpoint`, whose log-probabilities are the reference; null
            is the checkpoint that training starts from. It may be another model of the same tokenizer.
    """

    reward_gap: float | None = number(None, least=-1e6, most=1e6)
    reference: str | None = None


@dataclass
class AdapterSchema:
    """Low-rank adapters in place of training the weights; `sft` and `preference` only.

    Attributes:
        kind: `none` (all weights are trained), `lora` (W + alpha/rank B A), or `dora` (its rows also have a trained
            length).
        rank: columns of B and rows of A.
        alpha: the adapter's output is multiplied by alpha / rank.
        dropout: of the adapter's input, in training; 0 to below 1.
        targets: which matrices: `in_proj`, `out_proj` (Mamba-2), `linear_qkv`, `linear_proj` (attention), `linear_fc1`,
            `linear_fc2` (FFN), `experts.linear_fc1`, `experts.linear_fc2` (routed experts, one adapter each), the same
            of `shared_experts`, `linear` (linear layers).
    """

    kind: str = "none"
    rank: int = number(0, most=WIDTH)
    alpha: float = number(0.0, most=1e6)
    dropout: float = number(0.0, most=1)
    targets: list[str] = field(default_factory=list)


@dataclass
class DistillSchema:
    """The frozen teacher and the loss: `kl_weight * temperature^2 * KL + lm_weight * cross entropy + hidden_weight *
    (1 - cosine)`, a mean over tokens; read by stage distill alone.

    Attributes:
        teacher: a run's folder, one of its checkpoints, or one of the Hub, as `init.checkpoint`.
        temperature: both models' logits are divided by it in the KL.
        reverse: KL(student || teacher) instead of KL(teacher || student).
        kl_weight, lm_weight: of the KL, and of the cross entropy with the text.
        hidden_weight: of the distance between both models' states. A student of another width learns a projection of
            its states to the teacher's width, which is no part of the child.
        hidden_layers: whose outputs are compared: pairs of a student's layer and a teacher's, numbered from 0. Empty
            compares the states before the output layer.
        top_k: null, or how many of the teacher's likeliest tokens its distribution is truncated to.
        teacher_logits: null, or the folder of a cache of the teacher's logits, which `nemotron-h distill-cache` writes:
            training reads it and loads no teacher.
    """

    teacher: str | None = None
    temperature: float = number(1.0, above=0, most=1e6)
    reverse: bool = False
    kl_weight: float = number(1.0, least=0, most=1e6)
    lm_weight: float = number(0.0, least=0, most=1e6)
    hidden_weight: float = number(0.0, least=0, most=1e6)
    hidden_layers: list[list[int]] = field(default_factory=list, metadata=within(most=COUNT))
    top_k: int | None = number(None, least=1, most=VOCABULARY)
    teacher_logits: str | None = None


@dataclass
class CheckpointSchema:
    """When checkpoints are written and how many of the newest are kept. The last step always writes one.

    Attributes:
        every_steps: steps between checkpoints.
        keep: how many of the newest stay beside one that is being written; -1 keeps all.
        leave_after: time that one process may take, `HH:MM:SS`; then it writes a checkpoint and leaves with code 75.
            Null is no limit: SIGTERM and SIGUSR1 do the same where the scheduler announces the end.
    """

    every_steps: int = number(least=1, most=COUNT)
    keep: int = number(2, least=-1, most=COUNT)
    leave_after: str | None = None


@dataclass
class LogSchema:
    """Folder that a run writes to, and how often it reports.

    Attributes:
        dir: parent of the run's folder.
        every_steps: steps between progress lines.
        validate_every_steps: steps between validations.
        validation_batches: global batches per validation, at most as many as the held-out text has.
        trackers: where metrics go beside the run's own record: any of `tensorboard`, `wandb`, `mlflow`.
        project: that wandb and mlflow show the run in; null is `$WANDB_PROJECT` or `$MLFLOW_EXPERIMENT_NAME`, or
            `nemotron_h`.
    """

    dir: str = "runs"
    every_steps: int = number(10, least=1, most=COUNT)
    validate_every_steps: int = number(least=1, most=COUNT)
    validation_batches: int = number(least=0, most=COUNT)
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    project: str | None = None


@dataclass
class RecipeConfig:
    """A recipe, composed and complete.

    Attributes:
        name: also the name of the run's folder.
        stage: what the recipe does.
        tokens: length of the run; an integer, or text such as 15T.
        precision: one of `fp32`, `bf16`, `fp8_current_scaling` (paper 2.3), `fp8_blockwise` (Nemotron Nano 2).
        init_seed: of the initial weights.
        init: other initial weights.
        minipuzzle: stage minipuzzle alone: what is compressed, and how.
        puzzle: stage puzzle alone: likewise, where each layer gets a variant of its own.
        hybridise: stage hybridise alone: whose attention becomes Mamba-2, and how.
        reason: stage reason alone: rounds of sampling and preference training.
        preference: stages preference and reason alone: the loss over pairs of answers.
        distill: stages distill, minipuzzle, puzzle and hybridise alone: the teacher (of a pipeline the parent) and the
            loss.
        overrides: settings of the run's object graph beyond these keys, as `nemo` takes them
            (`trainer.max_steps=20`); a run writes here what its command line set beyond them.
        sources: where values come from (`paper 2.4`, `ours: ...`), by dotted key.
    """

    name: str = MISSING
    stage: str = MISSING
    tokens: str = MISSING
    precision: str = MISSING
    init_seed: int = number(1234, least=0, most=SEED)
    model: ModelSchema = field(default_factory=ModelSchema)
    data: DataSchema = field(default_factory=DataSchema)
    optim: OptimSchema = field(default_factory=OptimSchema)
    parallel: ParallelSchema = field(default_factory=ParallelSchema)
    precision_options: PrecisionOptionsSchema = field(default_factory=PrecisionOptionsSchema)
    recompute: RecomputeSchema = field(default_factory=RecomputeSchema)
    experts: ExpertsSchema = field(default_factory=ExpertsSchema)
    init: InitSchema = field(default_factory=InitSchema)
    minipuzzle: MiniPuzzleSchema | None = None
    puzzle: PuzzleSchema | None = None
    hybridise: HybridiseSchema | None = None
    reason: ReasonSchema | None = None
    preference: PreferenceSchema | None = None
    adapter: AdapterSchema = field(default_factory=AdapterSchema)
    distill: DistillSchema | None = None
    resume: ResumeSchema = field(default_factory=ResumeSchema)
    checkpoint: CheckpointSchema = field(default_factory=CheckpointSchema)
    log: LogSchema = field(default_factory=LogSchema)
    overrides: list[str] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)


def factory_of_file(path: object) -> str:
    """Return the `--factory` of a recipe's file; what separates a factory's arguments is written as in URLs."""
    return f"nemotron_h_recipe(path={str(path).replace('%', '%25').replace(',', '%2C')})"


def file_of_factory(path: str) -> str:
    """Return the file that a `--factory` names, as a person or `factory_of_file` wrote it."""
    return path if Path(path).expanduser().is_file() else unquote(path)


def command_of(stage: str, path: object) -> str:
    """Return the shell command that runs a recipe's file of this stage."""
    if stage in PIPELINES:
        return f"nemotron-h {PIPELINES[stage]} {shlex.quote(str(path))}"
    factory = factory_of_file(path)
    quoted = shlex.quote(factory) if re.search(r'["$`\\!]', factory) else f'"{factory}"'
    return f"nemo llm {STAGES[stage]} --factory {quoted} --yes"
