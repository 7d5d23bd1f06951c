"""Record what Transformer Engine computes in FP8, for `tests/precision/test_te_agreement.py`.

On a GPU of compute capability 9.0 or higher: `python tests/gpu/fp8_reference.py te_reference.safetensors`, then put
the file into `tests/precision/`. A case that fails is reported and left out; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "precision"))

from te_cases import CASES, Case, digest, inputs, sample

RECIPES = ("fp8_current_scaling", "fp8_blockwise")
#: tensor -> is it a gradient, is it a weight
OPERANDS = {"x": (False, False), "weight": (False, True), "dy": (True, False)}


def te_recipe(name: str) -> Any:
    """Transformer Engine's recipe of this name, as megatron-core makes it."""
    from transformer_engine.common import recipe

    if name == "fp8_current_scaling":
        return recipe.Float8CurrentScaling(fp8_format=recipe.Format.HYBRID)
    return recipe.Float8BlockScaling(fp8_format=recipe.Format.E4M3)


def quantizer(name: str, gradient: bool, weight: bool) -> Any:
    """The quantizer that the recipe gives an operand."""
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer

    if name == "fp8_current_scaling":
        dtype = tex.DType.kFloat8E5M2 if gradient else tex.DType.kFloat8E4M3
        return Float8CurrentScalingQuantizer(dtype, device=torch.device("cuda"))
    params = te_recipe(name)
    part = (
        params.fp8_quant_bwd_grad if gradient else params.fp8_quant_fwd_weight if weight else params.fp8_quant_fwd_inp
    )
    return Float8BlockQuantizer(
        tex.DType.kFloat8E4M3,
        rowwise=True,
        columnwise=True,
        amax_epsilon=part.amax_epsilon,
        force_pow_2_scales=part.power_2_scale,
        block_scaling_dim=2 if weight else 1,
    )


def scales_and_values(name: str, tensors: dict[str, torch.Tensor], verbose: bool) -> dict[str, torch.Tensor]:
    """Inverse scales (whole) and float8 bytes (samples) of each operand, laid out as Transformer Engine does."""
    found = {}
    for operand, (gradient, weight) in OPERANDS.items():
        quantized = quantizer(name, gradient, weight)(tensors[operand].cuda())
        if verbose:
            held = {k: tuple(v.shape) for k, v in vars(quantized).items() if torch.is_tensor(v)}
            print(f"    {operand}: {type(quantized).__name__} holds {held}")
        for attribute in (
            "_scale_inv",
            "_data",
            "_rowwise_scale_inv",
            "_rowwise_data",
            "_columnwise_scale_inv",
            "_columnwise_data",
        ):
            value = getattr(quantized, attribute, None)
            if torch.is_tensor(value):
                kept = value.detach() if attribute.endswith("scale_inv") else sample(value.view(torch.uint8))
                found[f"{operand}{attribute}"] = kept.cpu().contiguous()
    return found


def layer(name: str, case: Case, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Samples of output and gradients of Transformer Engine's layer."""
    import transformer_engine.pytorch as te

    options = {"bias": False, "params_dtype": torch.bfloat16, "device": "cuda"}
    if case.norm:
        module = te.LayerNormLinear(case.inputs, case.outputs, normalization="RMSNorm", eps=1e-5, **options)
        with torch.no_grad():
            module.layer_norm_weight.copy_(tensors["norm"])
    else:
        module = te.Linear(case.inputs, case.outputs, **options)
    with torch.no_grad():
        module.weight.copy_(tensors["weight"])
    x = tensors["x"].cuda().requires_grad_()
    with te.fp8_autocast(enabled=True, fp8_recipe=te_recipe(name)):
        y = module(x)
    y.backward(tensors["dy"].cuda())
    found = {"y": y, "dx": x.grad, "dw": module.weight.grad}
    if case.norm:
        found["dnorm"] = module.layer_norm_weight.grad
    return {key: sample(value).cpu().contiguous() for key, value in found.items()}


def main() -> int:
    """Record every case; 1 when any failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="where to write the safetensors file")
    out = parser.parse_args().out
    import transformer_engine

    kept: dict[str, torch.Tensor] = {}
    about = {
        "transformer_engine": str(transformer_engine.__version__),
        "torch": str(torch.__version__),
        "gpu": torch.cuda.get_device_name(),
    }
    failed = []
    for name in RECIPES:
        for number, case in enumerate(CASES):
            tensors = inputs(case)
            about[f"{case.name}/inputs"] = digest(tensors)
            for part, record in (
                ("quantizers", lambda n=name, t=tensors, v=number == 0: scales_and_values(n, t, v)),
                ("layer", lambda n=name, c=case, t=tensors: layer(n, c, t)),
            ):
                if part == "quantizers" and case.norm:
                    continue
                try:
                    found = record()
                except Exception as error:  # a shape that this release refuses; the others are still worth having
                    failed.append(f"{name}, {case.name}, {part}: {type(error).__name__}: {error}".splitlines()[0])
                    traceback.print_exc()
                    continue
                kept.update({f"{name}/{case.name}/{key}": value for key, value in found.items()})
                print(f"{name}, {case.name}, {part}: {', '.join(found)}", flush=True)
    save_file(kept, out, metadata=about)
    print(f"\n{len(kept)} tensors, {out.stat().st_size / 1024:.0f} KiB in {out}")
    print(f"{about['gpu']}, Transformer Engine {about['transformer_engine']}, torch {about['torch']}")
    print("\n".join(["FAILED:", *failed]) if failed else "every case was recorded")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
