"""One rank = two ranks = four: losses, gradients and final weights of every layout, from the same seed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from forks import FORKS

#: of attention logits, as the worker has it
LIMIT = 4.0
WORKER = Path(__file__).with_name("worker.py")
TWO_RANKS = ("tp2", "tp2sp", "tp2spagain", "pp2again", "dp2", "dp2opt", "tp2spopt")
PURE = ("mamba2-tp2sp", "mamba2-pp2")
PAIRS = ("preference-tp2sp", "preference-pp2", "preference-dp2")
ADAPTED = ("lora-tp2", "lora-pp2", "dora-tp2sp", "dora-tp2spopt")
FALCON = (*(f"falcon_h1-{layout}" for layout in ("tp2", "tp2spagain", "pp2", "dp2")), "falconlora-tp2sp")
LLAMA = tuple(f"llama-{layout}" for layout in ("tp2spagain", "pp2", "tp2spopt"))
EXPERTS = tuple(f"experts-{layout}" for layout in ("ep2", "dp2", "tp2sp", "pp2", "tp2spep2again", "tp2spopt", "ep2opt"))
EXPERT_ADAPTERS = tuple(
    f"experts{layout}" for layout in ("lora-ep2", "lora-dp2opt", "lora-tp2spep2again", "dora-ep2opt", "dora-tp2sp")
)
VISION = ("vision-tp2spagain", "vision-pp2")
LINEAR = ("linear-tp2spagain", "lineardora-tp2sp")
#: of these, those whose states are sharded
SHARED_ADAPTERS = tuple(name for name in EXPERT_ADAPTERS if name.endswith("opt"))
KINDS = ("mamba2", "preference", "lora", "dora", "expertslora", "expertsdora", "linear", "lineardora", "vision")
FOUR_RANKS = ("tp2pp2", "tp2dp2opt")
#: sequences that ranks split; with four, two of them share each group of Mamba-2, and keys and values
CONTEXT = (
    *("cp2again", "packed-cp2", "packed-cp2sum", "preference-cp2", "lora-cp2", "llama-cp2again", "falcon_h1-cp2"),
    *("experts-cp2", "experts-cp2ep2opt", "vision-cp2again"),
)
CONTEXT_OF_FOUR = ("packed-cp4", "packed-cp2tp2", "cp2tp2sp", "cp2pp2", "packed-dp2cp2sum", "padded-cp4")
MUON = (
    *(f"{layout}optmuon" for layout in ("dp2", "tp2sp", "pp2", "cp2")),
    "experts-ep2optmuon",
    "experts-tp2spoptmuon",
    "falcon_h1-tp2optmuon",
    "linear-tp2spoptmuon",
)
MUON_OF_FOUR = ("tp2dp2optmuon",)


def launch(ranks: int, out: Path, names: tuple[str, ...]) -> dict[str, dict]:
    """Train the layouts on this many ranks; what rank 0 saved."""
    FORKS.launch(WORKER, str(out), *names, folder=out.parent, ranks=ranks, seconds=600)
    return torch.load(out)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("layouts")
    return {
        **launch(
            1,
            folder / "one.pt",
            (
                *(
                    "one",
                    "oneopt",
                    *(f"{family}-one" for family in (*KINDS, "falcon_h1", "falconlora", "llama", "experts")),
                ),
                *("oneoptmuon", "experts-oneoptmuon", "falcon_h1-oneoptmuon", "linear-oneoptmuon"),
                *("packed-one", "packed-onesum", "padded-one"),
            ),
        ),
        **launch(
            2,
            folder / "two.pt",
            (
                *TWO_RANKS,
                *PURE,
                *PAIRS,
                *ADAPTED,
                *FALCON,
                *LLAMA,
                *EXPERTS,
                *EXPERT_ADAPTERS,
                *LINEAR,
                *VISION,
                *MUON,
                *CONTEXT,
            ),
        ),
        **launch(4, folder / "four.pt", (*FOUR_RANKS, *MUON_OF_FOUR, *CONTEXT_OF_FOUR)),
    }


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("oneopt", *TWO_RANKS, *PURE, *PAIRS, *ADAPTED, *FALCON, *LLAMA, *EXPERTS, *EXPERT_ADAPTERS, *LINEAR, *VISION),
        *FOUR_RANKS,
    ],
)
def test_layout_equals_one_rank(results: dict[str, dict], name: str) -> None:
    family = name.partition("-")[0] + "-" if "-" in name else ""
    one, other = results[f"{family}one"], results[name]
    rel = 1e-5 if name in VISION else 1e-4
    assert torch.tensor(other["losses"]) == pytest.approx(torch.tensor(one["losses"]), rel=rel)
    assert one["losses"][0] != one["losses"][2], "the model did not train"
    for kind in ("gradients", "weights"):
        if not other[kind]:  # the distributed optimizer keeps each rank's share of the gradients only
            continue
        assert other[kind].keys() == one[kind].keys()
        for key, value in one[kind].items():
            assert not torch.isnan(other[kind][key]).any(), f"{kind} {key} has parts that no rank holds"
            # branches are summed in another order than by one rank: Adam makes steps of gradients that round to about 0
            least = 1e-3 if (family, kind) == ("falcon_h1-", "weights") else 1e-4
            if kind == "gradients" and key.startswith(("vision.", "projector.")):
                least = 1e-5
            assert relative(other[kind][key], value) < least, f"{kind} {key}"


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CONTEXT, *CONTEXT_OF_FOUR])
def test_ranks_that_split_sequences_equal_one(results: dict[str, dict], name: str) -> None:
    family = name.partition("-")[0] + "-" if "-" in name else ""
    one, other = results[f"{family}one{'sum' if name.endswith('sum') else ''}"], results[name]
    assert other["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert one["losses"][0] != one["losses"][2], "the model did not train"
    if "opt" not in name:
        assert other["gradients"].keys() == one["gradients"].keys()
    for kind, least in (("gradients", 1e-5), ("weights", 1e-4)):
        for key, value in other[kind].items():
            assert not torch.isnan(value).any(), f"{kind} {key} has parts that no rank holds"
            assert relative(value, one[kind][key]) < least, f"{kind} {key}"


@pytest.mark.slow
def test_context_parallel_ranks_share_the_tiles(results: dict[str, dict]) -> None:
    whole, share = (results[name]["tiles"] for name in ("vision-one", "vision-cp2again"))
    assert share == [-(-tiles // 2) for tiles in whole]
    assert set(share) < set(whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cp2again", "falcon_h1-cp2", "packed-cp4", "packed-cp2tp2", "padded-cp4"])
def test_ranks_send_each_other_what_is_planned(results: dict[str, dict], name: str) -> None:
    sent, planned = results[name]["sent"]
    assert sent == planned > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["packed-one", "packed-cp2", "packed-cp4", "packed-cp2tp2"])
def test_no_document_of_a_row_reaches_another(results: dict[str, dict], name: str) -> None:
    """Not by one bit, whether ranks split it, it begins where one does, or within a convolution's window."""
    reach = results[name]["reach"]
    assert len(reach) == 5 + 2 + 4 + 4
    assert all(own > 0 for own, _ in reach)
    assert all(others == 0 for _, others in reach)


@pytest.mark.slow
def test_both_branches_of_a_parallel_layer_are_summed_at_once(results: dict[str, dict]) -> None:
    """A sum over the ranks for the embedding and for each of three P and three S layers."""
    assert results["falcon_h1-one"]["sums"] == 0
    assert results["falcon_h1-tp2"]["sums"] == 1 + 3 + 3


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MUON, *MUON_OF_FOUR])
def test_muon_of_several_ranks_is_that_of_one(results: dict[str, dict], name: str) -> None:
    """Gradients are summed in other orders, and rounding them to bfloat16 is amplified, to some 3 % of a step."""
    one, other = results[f"{name.partition('-')[0]}-oneoptmuon" if "-" in name else "oneoptmuon"], results[name]
    assert torch.tensor(other["losses"]) == pytest.approx(torch.tensor(one["losses"]), rel=1e-4)
    assert other["weights"].keys() == one["weights"].keys()
    for key, value in one["weights"].items():
        assert relative(other["weights"][key], value) < 2e-4, key
    assert other["logits"] == pytest.approx(one["logits"], rel=1e-2)
    assert one["logits"][0] > LIMIT, "no logit was clipped"
    for mine, theirs in zip(one["sizes"], other["sizes"], strict=True):
        assert theirs == pytest.approx(mine, rel=1e-2)
        assert all(0.85 * 0.2 < size < 1.15 * 0.2 for size in mine.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["oneoptmuon", "experts-oneoptmuon", "oneopt", *SHARED_ADAPTERS, *MUON, *MUON_OF_FOUR])
def test_moments_are_as_large_as_planned(results: dict[str, dict], name: str) -> None:
    states = results[name]["states"]
    assert sum(states) == pytest.approx(results[name]["planned"], rel=2e-3)  # a vocabulary is padded
    if "pp" not in name:  # stages have other weights
        assert max(states) < 1.3 * sum(states) / len(states)
