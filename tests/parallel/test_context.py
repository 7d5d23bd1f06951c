"""Context parallelism: losses, gradients and weights of one rank come out of two and four that split sequences."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from test_layouts import launch, relative

TWO_RANKS = (
    *("cp2", "cp2again", "cp2opt", "packed-cp2", "packed-cp2sum", "preference-cp2"),
    *("falcon_h1-cp2", "llama-cp2", "lora-cp2", "linear-cp2", "experts-cp2", "experts-cp2ep2opt"),
)
#: with four ranks a group of Mamba-2, and keys and values, are shared by two of them
FOUR_RANKS = ("cp4", "packed-cp4", "cp2tp2sp", "packed-cp2tp2", "cp2pp2", "packed-dp2cp2sum", "cp2tp2spopt")
FAMILIES = ("packed", "falcon_h1", "llama", "lora", "linear", "experts", "preference")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("context")
    one = ("one", *(f"{family}-one" for family in FAMILIES), "packed-onesum")
    return {
        **launch(1, folder / "one.pt", one),
        **launch(2, folder / "two.pt", TWO_RANKS),
        **launch(4, folder / "four.pt", FOUR_RANKS),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TWO_RANKS, *FOUR_RANKS])
def test_ranks_that_split_sequences_equal_one(results: dict[str, dict], name: str) -> None:
    family = name.partition("-")[0] + "-" if "-" in name else ""
    one, other = results[f"{family}one{'sum' if name.endswith('sum') else ''}"], results[name]
    assert other["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert one["losses"][0] != one["losses"][2], "the model did not train"
    if "opt" not in name:  # the distributed optimizer keeps each rank's share of the gradients only
        assert other["gradients"].keys() == one["gradients"].keys()
    for kind, least in (("gradients", 1e-5), ("weights", 1e-4)):
        for key, value in other[kind].items():
            assert not torch.isnan(value).any(), f"{kind} {key} has parts that no rank holds"
            assert relative(value, one[kind][key]) < least, f"{kind} {key}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["packed-one", *(name for name in (*TWO_RANKS, *FOUR_RANKS) if "packed" in name)])
def test_no_document_of_a_row_reaches_another(results: dict[str, dict], name: str) -> None:
    """Not by one bit, whether ranks split it, it begins where one does, or within a convolution's window."""
    reach = results[name]["reach"]
    assert len(reach) == 5 + 2 + 4 + 5
    assert all(own > 0 for own, _ in reach)
    assert all(others == 0 for _, others in reach)
