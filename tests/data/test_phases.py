"""Phase switches: exact steps."""

from fractions import Fraction

import pytest

from nemotron_h.core.errors import UserError
from nemotron_h.data.blend import Phase, Until
from nemotron_h.data.phases import Horizon, phase_spans

PAPER_STEP = 8192 * 768  # paper 2.4
PAPER_PHASES = [  # paper 2.2.3
    Phase("diversity", {"web": 100.0}, Until(fraction=0.6)),
    Phase("quality", {"web": 100.0}, Until(fraction=0.8)),
    Phase("quality_sft", {"web": 100.0}, Until(last_tokens="380B")),
    Phase("final", {"web": 100.0}),
]


@pytest.mark.parametrize(
    ("tokens", "switches", "steps"),
    [
        (15 * 10**12, [1_430_511, 1_907_349, 2_323_786], 2_384_186),
        (20 * 10**12, [1_907_349, 2_543_132, 3_118_515], 3_178_914),
    ],
    ids=["8B", "56B"],
)
def test_switches_of_the_paper(tokens: int, switches: list[int], steps: int) -> None:
    spans = phase_spans(PAPER_PHASES, Horizon(tokens, PAPER_STEP))
    assert [span.first_step for span in spans] == [0, *switches]
    assert [span.end_step for span in spans] == [*switches, steps]


def test_spans_cover_every_step_once() -> None:
    for steps in (7, 10, 99, 1000):
        phases = [
            Phase("a", until=Until(fraction=0.3)),
            Phase("b", until=Until(last_tokens=2 * 64)),
            Phase("c"),
        ]
        spans = phase_spans(phases, Horizon.from_steps(steps, 64))
        assert [s for span in spans for s in range(span.first_step, span.end_step)] == list(range(steps))
        assert spans[-1].steps == 2


def test_halves_round_up_and_fractions_are_decimal() -> None:
    assert Horizon(250, 100).steps == 3
    assert Horizon(249, 100).steps == 2
    assert Horizon(1000, 100).step_at(Fraction(5, 2) * 100) == 3
    # 0.29 in binary floating point is a little less than 0.29: 0.29 * 50 steps must still be 14.5 -> 15.
    spans = phase_spans([Phase("a", until=Until(fraction=0.29)), Phase("b")], Horizon.from_steps(50, 64))
    assert spans[1].first_step == 15


@pytest.mark.parametrize(
    ("until", "steps"), [(Until(fraction=0.01), 10), (Until(tokens="1M"), 10), (Until(last_tokens="1M"), 10)]
)
def test_an_empty_phase_is_an_error_that_names_it(until: Until, steps: int) -> None:
    with pytest.raises(UserError, match="phase 'a'"):
        phase_spans([Phase("a", until=until), Phase("b")], Horizon.from_steps(steps, 1000))
    with pytest.raises(UserError, match="less than a step"):
        phase_spans([Phase("b")], Horizon(10, 1000))
