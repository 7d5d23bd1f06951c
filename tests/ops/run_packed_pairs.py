"""Preference losses of packed pairs through mamba-ssm's kernels in Triton's interpreter, beside the same pairs apart.

Usage: python run_packed_pairs.py DIRECTORY-OF-THE-PACKAGE, as run_mamba_ssm_kernels.py. Prints the relative error of
every loss and the largest of any parameter's gradient (of DPO: in the interpreter a backward pass takes long), and the
same against the plain operations.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

from nemotron_h.runtime import cpu, quiet

quiet.hush()
cpu.install()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402
from run_mamba_ssm_kernels import load_kernels  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
from small_model import VOCABULARY, relative_error, small_config, small_model  # noqa: E402

from nemotron_h.data.preference_module import pair_window  # noqa: E402
from nemotron_h.model import mixer  # noqa: E402
from nemotron_h.ops import select  # noqa: E402
from nemotron_h.training.preference_loss import PreferenceLoss  # noqa: E402

SEQ, CHUNK = 48, 16
LENGTHS = [
    (13, 9),
    (12, 6),
]  # tokens of the chosen and rejected conversations: three ends inside of chunks, and padding
KINDS = ("dpo", "rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq")


def window(pairs, reference, gaps) -> dict[str, torch.Tensor]:
    """A batch of one window."""
    return {k: v.unsqueeze(0) for k, v in pair_window(pairs, reference, gaps, SEQ, pad_id=1).items()}


def losses_and_gradients(model, batch) -> dict[str, torch.Tensor]:
    """The loss of every kind, and the gradient of DPO's in every parameter."""
    tokens = model(input_ids=batch["tokens"], labels=batch["labels"], seq_idx=batch["seq_idx"])
    found = {}
    for kind in KINDS:
        reduction = PreferenceLoss(kind, 0.2, 1.0)
        reduction.setup(batch)
        found[kind] = reduction(tokens)[0]
    names, weights = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(found["dpo"], weights)
    return {**{kind: loss.detach() for kind, loss in found.items()}, **dict(zip(names, gradients, strict=True))}


def main() -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    kernels = load_kernels(Path(sys.argv[1]))
    used = select.Ops(
        ssd=functools.partial(select._kernel_ssd, kernels, chunk_size=CHUNK),
        gated_rms_norm=functools.partial(select._kernel_gated_rms_norm, kernels),
        origin="mamba-ssm in the interpreter",
    )
    draw = np.random.default_rng(0)
    pairs = []
    for both in LENGTHS:
        prompt = draw.integers(0, VOCABULARY, 4)
        sides = [np.concatenate([prompt, draw.integers(0, VOCABULARY, n - 4)]) for n in both]
        pairs.append([(ids, (np.arange(len(ids)) >= 4).astype(np.float32)) for ids in sides])
    reference, gaps = draw.normal(-20, 4, (2, 2)), draw.normal(size=2)

    plain = small_model(small_config(2, pattern="M*-"))
    mixer.select_ops = lambda: used
    model = small_model(small_config(2, pattern="M*-"))
    packed = losses_and_gradients(model, window(pairs, reference, gaps))
    ours = losses_and_gradients(plain, window(pairs, reference, gaps))
    apart = [
        losses_and_gradients(model, window([p], reference[n : n + 1], gaps[n : n + 1])) for n, p in enumerate(pairs)
    ]
    report = {
        "apart": {name: relative_error(value, sum(one[name] for one in apart)) for name, value in packed.items()},
        "plain": {name: relative_error(value, ours[name]) for name, value in packed.items()},
    }
    print()
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
