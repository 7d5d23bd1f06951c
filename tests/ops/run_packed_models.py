"""Losses of packed conversations through mamba-ssm's kernels in Triton's interpreter, beside the same ones alone.

Usage: python run_packed_models.py DIRECTORY-OF-THE-PACKAGE, as run_mamba_ssm_kernels.py. A small model is trained
whole and with LoRA, on one window of two pairs: answers alone (SFT), and the preference losses. Prints for
every model the relative error of every loss and of the gradient of every trained parameter (SFT's and DPO's), against
the conversations alone through the kernels (`alone`) and the same window through the plain operations (`plain`).
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

from nemotron_h.platform import cpu, quiet

quiet.hush()
cpu.install()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402
from run_mamba_ssm_kernels import load_kernels  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
from adapted_model import adapter, randomize_adapters  # noqa: E402
from small_model import VOCABULARY, relative_error, small_config, small_model  # noqa: E402

from nemotron_h.data.feed.preference_module import pair_window  # noqa: E402
from nemotron_h.model import mixer  # noqa: E402
from nemotron_h.ops import select  # noqa: E402
from nemotron_h.training.stages.preference.loss import PreferenceLoss  # noqa: E402

SEQ, CHUNK, PROMPT = 32, 16, 3
#: tokens of the chosen and rejected conversations: three ends inside of chunks, and padding
LENGTHS = [(13, 9), (6, 4)]
KINDS = ("dpo", "rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq")
#: model -> whether the mixer runs as one kernel, as in training on a GPU, or operation by operation
MODELS = {"whole": False, "whole, fused": True, "lora": True}

Values = dict[str, torch.Tensor]


def build(name: str):
    """The small model with few heads (the interpreter takes long for each), and drawn adapters."""
    kind = "lora" if name == "lora" else "none"
    settings = {} if kind == "none" else {"adapter": adapter(kind)}
    model = small_model(small_config(1, pattern="M*-", mamba_num_heads=2, **settings))
    randomize_adapters(model)
    return model


def token_losses(model, tokens: torch.Tensor, labels: torch.Tensor, seq_idx: torch.Tensor | None = None):
    """Cross entropies [windows, sequence]."""
    logits = model(input_ids=tokens, seq_idx=seq_idx)
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")


def of_window(model, batch: Values) -> Values:
    """The losses and gradients of a packed window."""
    tokens = token_losses(model, batch["tokens"], batch["labels"], batch["seq_idx"])
    losses = {"sft": (tokens * batch["loss_mask"]).sum()}
    for kind in KINDS:
        reduction = PreferenceLoss(kind, 0.2, 1.0)
        reduction.setup(batch)
        losses[kind] = reduction(tokens)[0]
    return with_gradients(model, losses)


def alone(model, pairs, reference: np.ndarray, gaps: np.ndarray) -> Values:
    """The same, each conversation in a batch of its own, without document numbers and padding."""
    losses: Values = dict.fromkeys(("sft", *KINDS), torch.zeros(()))
    for number, sides in enumerate(pairs):
        answers = []
        for ids, learnt in sides:
            ids = torch.from_numpy(ids)[None]
            answers.append((token_losses(model, ids[:, :-1], ids[:, 1:]) * torch.from_numpy(learnt[1:])).sum())
        losses["sft"] = losses["sft"] + sum(answers)
        one = {
            "reference": torch.from_numpy(reference[number])[None, None],
            "reward_gap": torch.from_numpy(gaps[number : number + 1])[None],
            "pairs": torch.tensor([1]),
            "loss_mask": torch.ones(1, 2),
            "seq_idx": torch.tensor([[0, 1]]),
        }
        for kind in KINDS:
            reduction = PreferenceLoss(kind, 0.2, 1.0)
            reduction.setup(one)
            losses[kind] = losses[kind] + reduction(torch.stack(answers)[None])[0]
    return with_gradients(model, losses)


def with_gradients(model, losses: Values) -> Values:
    """The losses, and the gradients of SFT's and DPO's in every trained parameter."""
    names, weights = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    found = {kind: loss.detach() for kind, loss in losses.items()}
    for kind in ("sft", "dpo"):
        gradients = torch.autograd.grad(losses[kind], weights, retain_graph=True)
        found |= {f"{kind} {name}": gradient for name, gradient in zip(names, gradients, strict=True)}
    return found


def errors(values: Values, expected: Values) -> dict[str, float]:
    assert values.keys() == expected.keys()
    return {name: relative_error(value, expected[name]) for name, value in values.items()}


def main() -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    kernels = load_kernels(Path(sys.argv[1]))
    separate = select.Ops(
        ssd=functools.partial(select._kernel_ssd, kernels, chunk_size=CHUNK),
        gated_rms_norm=functools.partial(select._kernel_gated_rms_norm, kernels),
        origin="mamba-ssm in the interpreter",
    )
    fused = select.Ops(fused_mixer=functools.partial(select._kernel_fused_mixer, kernels, chunk_size=CHUNK))
    mixer.fused_obstacle = lambda *_: ""  # that of causal-conv1d's CUDA kernel, which is stood in for here
    plain_ops = mixer.select_ops
    rng = np.random.default_rng(0)
    pairs = []
    for both in LENGTHS:
        prompt = rng.integers(0, VOCABULARY, PROMPT)
        sides = [np.concatenate([prompt, rng.integers(0, VOCABULARY, n - PROMPT)]) for n in both]
        pairs.append([(ids, (np.arange(len(ids)) >= PROMPT).astype(np.float32)) for ids in sides])
    reference, gaps = rng.normal(-20, 4, (2, 2)), rng.normal(size=2)
    window = {k: v.unsqueeze(0) for k, v in pair_window(pairs, reference, gaps, SEQ, pad_id=1).items()}

    report = {}
    for name, one_kernel in MODELS.items():
        mixer.select_ops = plain_ops
        plain = of_window(build(name), window)
        kernel_ops = fused if one_kernel else separate
        mixer.select_ops = lambda ops=kernel_ops: ops
        model = build(name)
        packed = of_window(model, window)
        report[name] = {
            "alone": errors(packed, alone(model, pairs, reference, gaps)),
            "plain": errors(packed, plain),
            "trained": sorted(n for n, p in model.named_parameters() if p.requires_grad),
        }
    print()
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
