"""What makes a recipe impossible: one error that names the key, the recipe, and what would fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemotron_h.core.errors import UserError
from nemotron_h.recipe.compose import compose

TINY, LARGE, NANO, MAMBA = "nemotron_h_tiny", "nemotron_h_8b", "nano_12b_v2", "mamba2_8b"
SFT, LORA = "nemotron_h_tiny/sft", "nemotron_h_tiny/sft_lora"
DISTILL = "nemotron_h_tiny/distill"
DPO, RPO = "nemotron_h_tiny/preference", "nemotron_h_8b/preference"


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        # names
        (TINY, ["precision=fp8_blockwize"], ("precision = 'fp8_blockwize'", "Did you mean fp8_blockwise?")),
        (TINY, ["stage=pretraining"], ("stage = 'pretraining'", "Did you mean pretrain?")),
        (TINY, ["optim.schedule=cosin"], ("optim.schedule = 'cosin'", "Did you mean cosine?")),
        (TINY, ["resume.blend_change=from_steps"], ("resume.blend_change = 'from_steps'", "Did you mean from_step?")),
        (TINY, ["recompute.ffn=activations"], ("recompute.ffn = 'activations'", "Did you mean activation?")),
        (TINY, ["recompute.mamba=activation"], ("recompute.mamba = 'activation'", "Known: none, layer")),
        (TINY, ["optim.moments=fp16"], ("optim.moments = 'fp16'", "Known: fp32, bf16")),
        (TINY, ["optim.gradients=bf61"], ("optim.gradients = 'bf61'", "Did you mean bf16?")),
        (TINY, ["optim.name=moun"], ("optim.name = 'moun'", "Did you mean muon?")),
        (TINY, ["optim.name=muon", "optim.newton_schulz=simpel"], ("optim.newton_schulz = 'simpel'", "mean simple?")),
        (TINY, ["optim.qk_clip=100"], ("optim.qk_clip = 100.0 is unused: optim.name is adamw", "set optim.name: muon")),
        (TINY, ["optim.name=muon", "optim.qk_clip=0"], ("optim.qk_clip", "above 0")),
        (
            "llama_tiny",
            ["optim.name=muon", "optim.qk_clip=9", "model.qk_norm=true", "model.expect.parameters=4_722_368"],
            ("optim.qk_clip = 9.0 shrinks", "with model.qk_norm"),
        ),
        (
            "llama_tiny",
            ["init.repair_embeddings=true"],
            ("init.repair_embeddings = true: the embedding is the output",),
        ),
        (TINY, ["optim.momentum=0.9"], ("optim.momentum = 0.9 is unused: optim.name is adamw", "set optim.name: muon")),
        (TINY, ["optim.name=muon", "optim.moments=bf16"], ("optim.moments = 'bf16' with optim.name = 'muon'",)),
        (
            TINY,
            ["optim.name=muon", "precision=fp32", "parallel.distributed_optimizer=false"],
            ("optim.name = 'muon' with parallel.distributed_optimizer = false",),
        ),
        (TINY, ["optim.frozen=[fnn]"], ("optim.frozen = ['fnn']: nemotron_h_tiny has no 'fnn'", "Did you mean ffn?")),
        (TINY, ["optim.frozen=[ffn,ffn]"], ("names a part twice",)),
        (
            TINY,
            ["optim.frozen=[mamba,attention,ffn,embedding,output]"],
            ("leaves nothing to train of nemotron_h_tiny",),
        ),
        ("llama_tiny", ["optim.frozen=[embedding]"], ("one matrix as embedding and as output", "name both")),
        (LORA, ["optim.frozen=[ffn]"], ("optim.frozen = ['ffn'] with adapter.kind = 'lora'",)),
        (LORA, ["optim.name=muon"], ("optim.name = 'muon' with adapter.kind = 'lora'",)),
        (TINY, ["resume.optimizer_change=fromstep"], ("resume.optimizer_change = 'fromstep'", "mean from_step?")),
        (TINY, ["precision=fp32", "optim.gradients=bf16"], ("optim.gradients = 'bf16' with precision = 'fp32'",)),
        (
            TINY,
            ["precision=bf16", "parallel.distributed_optimizer=false"],
            ("parallel.distributed_optimizer = false with bfloat16 weights", "leave it out"),
        ),
        (NANO, ["precision_options.fp8_backend=emulated"], ("fp8_backend = 'emulated'", "Did you mean emulate?")),
        # unknown and unused keys
        (TINY, ["optim.skip_spikes=maybe"], ("optim.skip_spikes", "maybe")),
        (
            TINY,
            ["optim.skip_spikes=true", "tokens=262_144"],
            ("optim.skip_spikes is unused: the run has 32 steps", "32 before it", "raise tokens"),
        ),
        (TINY, ["optim.peak_lrr=1"], ("unknown key optim.peak_lrr", "Did you mean peak_lr?")),
        (TINY, ["recompute.mlp=layer"], ("unknown key recompute.mlp", "Known keys there: mamba, ffn, attention")),
        (TINY, ["optim.decay_tokens=8192"], ("optim.decay_tokens is unused", "optim.schedule: wsd")),
        (TINY, ["recompute.offload=true"], ("recompute.offload = true is unused", "add recompute.mamba=layer")),
        (MAMBA, ["recompute.attention=layer"], ("recompute.attention = 'layer' is unused", "has no attention layers")),
        (TINY, ["parallel.sequence=true"], ("parallel.sequence is unused", "parallel.tensor to 2")),
        (TINY, ["precision_options.bf16_edge_layers=4"], ("precision_options.bf16_edge_layers is unused",)),
        (TINY, ["model=nemotron_h_tinny"], ("nemotron_h_tinny", "nemotron_h_tiny")),
        (TINY, ["optim.peak_lr=abc"], ("optim.peak_lr",)),
        (TINY, ["model.expect.mamba=7"], ("mamba: 6 counted, 7 expected",)),
        (TINY, ["model.pattern=M-M*M-"], ("attention at layer 3",)),
        # keys of another stage
        (TINY, ["distill.temperature=2"], ("distill is unused: stage is pretrain",)),
        (TINY, ["recompute.logits=layer"], ("recompute.logits = 'layer'", "Known: none, chunks")),
        (DISTILL, ["recompute.logits=chunks"], ("recompute.logits = 'chunks' is unused", "in chunks in any case")),
        (DISTILL, ["distill.teacher=null"], ("distill.teacher is missing", "a run's folder")),
        (DISTILL, ["distill.temperature=0"], ("distill.temperature = 0.0 is not above 0",)),
        (DISTILL, ["distill.lm_weight=-1"], ("distill.lm_weight = -1.0 is below 0",)),
        (DISTILL, ["distill.kl_weight=0"], ("nothing would be learnt",)),
        (DISTILL, ["distill.top_k=9000"], ("distill.top_k = 9000 is above the vocabulary of 8,192",)),
        (
            DISTILL,
            ["distill.teacher_logits=runs/x", "distill.hidden_weight=1"],
            ("distill.hidden_weight with distill.teacher_logits", "leave one of them out"),
        ),
        (
            "nemotron_h_tiny/minipuzzle",
            ["distill.teacher_logits=runs/x"],
            ("distill.teacher_logits is unused", "leave it out"),
        ),
        (DISTILL, ["distill.hidden_layers=[[0,1]]"], ("distill.hidden_layers is unused", "hidden_weight is 0")),
        (
            DISTILL,
            ["distill.hidden_weight=1", "distill.hidden_layers=[[99,1]]"],
            ("distill.hidden_layers has [99, 1]", "has layers 0 to", "the student's layer"),
        ),
        (
            DISTILL,
            ["distill.hidden_weight=1", "distill.hidden_layers=[[1]]"],
            ("distill.hidden_layers has [1]", "[layer of the student, of the teacher]"),
        ),
        (
            DISTILL,
            ["distill.hidden_weight=1", "distill.hidden_layers=[[0,1]]", "parallel.devices=2", "parallel.pipeline=2"],
            ("distill.hidden_layers with parallel.pipeline = 2", "tensor-parallel"),
        ),
        (DISTILL, ["distill.top_k=5", "distill.reverse=true"], ("distill.top_k with distill.reverse", "infinite")),
        (DISTILL, ["model=runs/none"], ("model = runs/none: there is no such file or checkpoint",)),
        (TINY, ["data.too_long=drop"], ("data.too_long is unused",)),
        (
            TINY,
            ["data.blend=sft_sample"],
            ("holds conversations, and stage pretrain reads text",),
        ),
        (SFT, ["data.blend=sample_small"], ("data.blend = sample_small holds texts, and stage sft reads",)),
        (TINY, ["data.phase_order=shuffled"], ("data.phase_order = 'shuffled'", "Known: blend, random")),
        (SFT, ["data.phase_order=random"], ("data.phase_order = random is unused: stage is sft",)),
        (SFT, ["data.too_long=truncate"], ("data.too_long = 'truncate'", "Known: cut, drop")),
        (SFT, ["data.document_reset=false"], ("data.document_reset = false",)),
        (SFT, ["resume.blend_change=from_step"], ("resume.blend_change is for pretraining",)),
        # adapters
        (TINY, ["adapter.kind=lora"], ("adapter is unused: stage is pretrain", "it is for sft and preference")),
        (SFT, ["adapter.kind=lorra"], ("adapter.kind = 'lorra'", "Did you mean lora?")),
        (SFT, ["adapter.rank=8"], ("adapter.rank is unused: adapter.kind is none",)),
        (LORA, ["adapter.kind=none"], ("adapter.rank is unused: adapter.kind is none",)),
        (LORA, ["adapter.rank=0"], ("adapter.rank = 0 is not positive",)),
        (LORA, ["adapter.rank=-4"], ("adapter.rank = -4 is not positive",)),
        (LORA, ["adapter.alpha=0"], ("adapter.alpha = 0.0 is not positive",)),
        (LORA, ["adapter.dropout=1"], ("adapter.dropout = 1.0 is not in [0, 1)",)),
        (LORA, ["adapter.rank=500"], ("adapter.rank = 500 is above the smaller side of in_proj, 256",)),
        (LORA, ["adapter.targets=[]"], ("adapter.targets is empty", "in_proj, out_proj, linear_qkv")),
        (LORA, ["adapter.targets=[in_prj]"], ("has 'in_prj', which matches nothing", "Did you mean in_proj?")),
        (LORA, ["adapter.targets=[in_proj,in_proj]"], ("names 'in_proj' twice",)),
        (LORA, ["adapter.dims=[1]"], ("unknown key adapter.dims",)),
        (
            "nemotron_t_8b/sft",
            ["adapter.kind=lora", "adapter.rank=8", "adapter.alpha=8", "adapter.targets=[linear_fc1,in_proj]"],
            ("has 'in_proj', which matches nothing: nemotron_t_8b has no mamba layers", "it has linear_qkv"),
        ),
        (
            "nemotron_h_8b/sft_lora",
            ["parallel.pipeline=8", "adapter.targets=[linear_qkv]"],
            ("are in no layer of pipeline stage 0 of 8",),
        ),
        # ranges
        (TINY, ["data.global_batch_size=0"], ("data.global_batch_size = 0 is below 1",)),
        (TINY, ["parallel.tensor=0"], ("parallel.tensor = 0 is below 1", "parallel.tensor has to be at least 1")),
        (TINY, ["optim.beta2=1"], ("optim.beta2 = 1.0 is not below 1",)),
        (TINY, ["checkpoint.keep=0"], ("checkpoint.keep = 0",)),
        # schedule
        (TINY, ["optim.warmup_tokens=1M"], ("optim.warmup_tokens (1,000,000) is not shorter than the run (655,360",)),
        (TINY, ["optim.final_lr=1"], ("optim.final_lr = 1.0 is not between 0 and optim.peak_lr", "3e-05")),
        (TINY, ["tokens=1.5"], ("tokens: '1.5' is not a token count",)),
        (NANO, ["optim.decay_tokens=null"], ("optim.decay_tokens is missing", "3.6T")),
        (
            NANO,
            ["optim.schedule=wsd_exponential", "optim.final_lr=0"],
            ("optim.final_lr is 0, which an exponential decay never reaches", "a 256th of the peak is"),
        ),
        (NANO, ["optim.decay_tokens=20T"], ("are longer than the run", "decay for 19,975,000,000,000 tokens or less")),
        # preferences and long conversations
        (DPO, ["preference.loss=rpo_bwd"], ("preference.loss = 'rpo_bwd'", "Did you mean rpo_bwd_kl?")),
        (DPO, ["preference.beta=0"], ("preference.beta = 0.0 is not above 0",)),
        (DPO, ["preference.reward_gap=1"], ("preference.reward_gap is unused: dpo reads no rewards", "rpo_bwd_kl")),
        (RPO, ["preference.gt_reward_scal=2"], ("unknown key preference.gt_reward_scal", "gt_reward_scale?")),
        (DPO, ["data.too_long=null"], ("data.too_long = ''", "Known: cut, drop")),
        (DPO, ["data.blend=sft_sample"], ("holds conversations, and stage preference reads pairs of answers",)),
        (SFT, ["data.blend=preference_sample"], ("holds pairs of answers, and stage sft reads conversations",)),
        (SFT, ["preference.loss=dpo"], ("preference is unused: stage is sft", "leave it out")),
        ("nemotron_h_8b/sft_512k", ["data.seq_length=8192"], ("shorter than the samples of source code_and_math",)),
        # layouts
        ("falcon_h1_7b", ["parallel.tensor=2"], ("parallel.tensor = 2", "mamba_num_groups = 1", "nearest: 1")),
        (LARGE, ["parallel.tensor=16"], ("parallel.tensor = 16", "mamba_num_groups = 8", "nearest: 8")),
        (
            LARGE,
            ["parallel.context=32"],
            (
                "parallel.context = 32 does not split the heads",
                "mamba_num_heads / parallel.tensor = 16 with mamba_num_groups / parallel.tensor = 1",
                "the largest is 16; sizes that fit: 1, 2, 4, 8, 16",
            ),
        ),
        (
            "nemotron_h_4b",
            ["parallel.tensor=4", "parallel.context=8"],
            ("the largest is 28; sizes that fit: 1, 2, 4,",),
        ),
        ("nemotron_t_8b", ["parallel.tensor=8", "parallel.context=8"], ("of model nemotron_t_8b: it has too few",)),
        (
            LARGE,
            ["parallel.tensor=1", "parallel.sequence=false", "data.seq_length=131072"],
            ("131,072 tokens of 18,560 values are more than 2^31 on a rank", "parallel.context=2"),
        ),
        (LARGE, ["parallel.context=4", "data.seq_length=8200"], ("parallel.context * parallel.tensor = 32", "is 8192")),
        (
            LARGE,
            ["parallel.context=2", "parallel.nodes=1"],
            ("parallel.tensor * parallel.pipeline * parallel.context = 16", "the nearest is 16"),
        ),
        (LARGE, ["parallel.pipeline=64"], ("parallel.pipeline = 64", "the 52 layers", "nearest: 52")),
        (LARGE, ["parallel.nodes=1", "parallel.devices=4"], ("nodes * parallel.devices = 4", "the nearest is 8")),
        (LARGE, ["data.seq_length=8190"], ("data.seq_length = 8190", "the nearest is 8192")),
        (LARGE, ["data.global_batch_size=1000"], ("micro_batch_size * data-parallel size (1 * 768)", "nearest is 768")),
        (TINY, ["data.micro_batch_size=5"], ("data.global_batch_size = 16 is not a multiple", "the nearest is 15")),
        # data and sources
        (TINY, ["data.blend=sample_smal"], ("data.blend = sample_smal", "Did you mean sample_small?")),
        (LARGE, ["tokens=100B", "optim.warmup_tokens=1B"], ("data.blend = nemotron_h: phase 'phase3'", "longer")),
    ],
)
def test_a_mistake_names_key_and_fix(name: str, overrides: list[str], expected: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        compose(name, overrides)
    for text in expected:
        assert text in str(caught.value)
    assert name in str(caught.value) or "override" in str(caught.value)


def test_a_file_of_ones_own_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "# @package _global_\ndefaults: [/nemotron_h_tiny/pretrain, _self_]\n"
        "name: mine\nsources: {optim.peak_lrr: tried}\n"
    )
    with pytest.raises(UserError) as caught:
        compose(str(file))
    assert str(file) in str(caught.value)
    assert "sources has 'optim.peak_lrr'" in str(caught.value)
    assert "Did you mean optim.peak_lr?" in str(caught.value)


def test_a_value_that_is_no_yaml_is_named() -> None:
    with pytest.raises(UserError, match=r"model\.pattern=\*-\*-"):
        compose("nemotron_t_8b", ["model.pattern=*-*-"])
