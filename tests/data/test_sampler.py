"""The sampler against brute force, the plan and itself."""

import os
import random
import subprocess
import sys
import textwrap
from collections import Counter

import numpy as np
import pytest

from nemotron_h.core.errors import UserError
from nemotron_h.data.feed.sampler import CIRCLE, STRIDE, BlendSampler, Segment, floor_sums, permute

PAPER_SHARES = [  # paper 2.2.3, per cent of tokens; phase 2 is printed with a sum of 99.1
    {"web": 59.0, "code": 20.0, "academic": 8.8, "multi": 5.0, "crawl": 4.0, "math": 2.9, "wiki": 0.3},
    {"web": 40.7, "code": 20.0, "academic": 12.0, "multi": 3.7, "crawl": 7.0, "math": 14.0, "wiki": 1.7},
    {"web": 32.7, "code": 20.0, "academic": 12.0, "multi": 3.7, "crawl": 7.0, "math": 10.8, "wiki": 1.1, "sft": 12.6},
    {"web": 13.5, "code": 20.0, "academic": 12.0, "multi": 3.7, "crawl": 7.0, "math": 10.8, "wiki": 1.1, "sft": 31.8},
]
TOKENS = {name: 1_000_003 * (n + 2) for n, name in enumerate(PAPER_SHARES[3])}


def four_phases(samples_per_phase: int) -> list[Segment]:
    return [
        Segment(f"phase{n}", n * samples_per_phase, (n + 1) * samples_per_phase, shares)
        for n, shares in enumerate(PAPER_SHARES)
    ]


def test_floor_sums_against_brute_force() -> None:
    rng = random.Random(1)
    for _ in range(300):
        modulus = rng.randrange(1, 200)
        stride, n = rng.randrange(modulus), rng.randrange(0, modulus + 1)
        offsets = np.array([rng.randrange(2 * modulus) for _ in range(7)], dtype=np.int64)
        expected = [sum((stride * j + int(c)) // modulus for j in range(n)) for c in offsets]
        assert floor_sums(n, stride, offsets, modulus).tolist() == expected


def test_floor_sums_with_the_largest_numbers_wrap_exactly() -> None:
    def exact(n: int, stride: int, offset: int, modulus: int) -> int:  # Python's integers do not overflow
        total = 0
        while n:
            total += n * (n - 1) // 2 * (stride // modulus) + n * (offset // modulus)
            stride, offset = stride % modulus, offset % modulus
            n, offset = divmod(stride * n + offset, modulus)
            stride, modulus = modulus, stride
        return total

    offsets = np.array([0, 1, CIRCLE, 2 * CIRCLE - 1], dtype=np.int64)
    for stride in (CIRCLE - 1, STRIDE, 3):
        got = floor_sums(CIRCLE, stride, offsets, CIRCLE)
        assert [int(g) % 2**64 for g in got] == [exact(CIRCLE, stride, int(c), CIRCLE) % 2**64 for c in offsets]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 100, 1009, 65_537])
def test_permute_is_a_permutation_that_depends_on_its_key(size: int) -> None:
    positions, sizes = np.arange(size), np.full(size, size)
    orders = [permute(positions, sizes, np.full(size, key, dtype=np.uint64)) for key in (1, 2**63 + 5)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(size))
    if size >= 100:
        assert (orders[0] == orders[1]).mean() < 0.1
        assert (np.diff(orders[0]) == 1).mean() < 0.1  # neighbours are torn apart
        assert abs(np.corrcoef(positions, orders[0])[0, 1]) < 0.3


def test_shares_are_within_a_thousandth_of_the_plan_in_every_phase_at_1e6_samples() -> None:
    size = 1_000_000
    sampler = BlendSampler(four_phases(size), TOKENS, 256, seed=7)
    for number, shares in enumerate(PAPER_SHARES):
        block = sampler.block(number * size, (number + 1) * size)
        assert (block.phase == number).all()
        realised = Counter(sampler.names[s] for s in block.source.tolist())
        total = sum(shares.values())
        for name, share in shares.items():
            # A thousandth of the source's own share, not of the whole.
            assert realised[name] / size == pytest.approx(share / total, rel=1e-3), (number, name)
        assert realised == sampler.consumed(4 * size)[number]


def test_every_short_stretch_is_close_to_the_plan() -> None:
    sampler = BlendSampler(four_phases(100_000), TOKENS, 256, seed=3)
    for first in range(0, 99_000, 7_001):
        block = sampler.block(first, first + 768)
        counts = np.bincount(block.source, minlength=len(sampler.names))
        planned = np.array([PAPER_SHARES[0].get(name, 0) / 100 * 768 for name in sampler.names])
        assert np.abs(counts - planned).max() < 6


def test_shares_stay_within_a_few_samples_of_the_plan_over_a_whole_run() -> None:
    size, rng = 1_000_000_000, random.Random(4)
    sampler = BlendSampler(four_phases(size), TOKENS, 256, seed=7)
    for _ in range(100):
        count = rng.randrange(10 ** rng.randrange(1, 10))
        total = sum(PAPER_SHARES[1].values())
        consumed = sampler.consumed(size + count)[1]
        for name, share in PAPER_SHARES[1].items():
            assert abs(consumed.get(name, 0) - share / total * count) < 12


def test_every_window_once_per_epoch_also_across_switches() -> None:
    tokens = {name: 16 * windows + 5 for windows, name in zip((7, 40, 97, 3, 11, 23, 5, 64), TOKENS, strict=True)}
    sampler = BlendSampler(four_phases(1111), tokens, 16, seed=11)
    seen: dict[tuple[str, int], list[int]] = {}
    starts: dict[tuple[str, int], set[int]] = {}
    phases: dict[tuple[str, int], set[int]] = {}
    for i in range(4444):
        sample = sampler[i]
        key = (sample.source, sample.epoch)
        seen.setdefault(key, []).append(sample.window)
        phases.setdefault(key, set()).add(sample.phase)
        starts.setdefault(key, set()).update((sample.start + t) % tokens[sample.source] for t in range(16))
    for (source, epoch), windows in seen.items():
        assert len(set(windows)) == len(windows), "a window came twice in an epoch"
        assert len(starts[source, epoch]) == 16 * len(windows), "windows of an epoch overlap"
        if (source, epoch + 1) in seen:
            assert sorted(windows) == list(range(sampler.windows(source)))
    assert any(len(p) > 1 for p in phases.values()), "no epoch went over a switch: the test tests nothing"
    last = {source: max(e for s, e in seen if s == source) for source in tokens}
    for source, position in sampler.positions(4444).items():
        assert position == last[source] * sampler.windows(source) + len(seen[source, last[source]])


def test_consumed_and_positions_agree_with_counting() -> None:
    sampler = BlendSampler(four_phases(300), TOKENS, 256, seed=5)
    counted = [Counter() for _ in range(4)]
    for i in range(1400):  # 200 samples past the planned end belong to the last phase
        if i % 37 == 0 or i in (300, 600, 900, 1200):
            assert sampler.consumed(i) == [dict(c) for c in counted]
            total = sum(counted, Counter())
            assert {k: v for k, v in sampler.positions(i).items() if v} == dict(total)
        sample = sampler[i]
        counted[sample.phase][sample.source] += 1
        assert sample.phase == min(i // 300, 3) == sampler.phase_of(i)


def test_a_sample_depends_on_its_number_alone() -> None:
    segments = four_phases(5000)
    straight = [BlendSampler(segments, TOKENS, 256, seed=5)[i] for i in (19_999, 0, 5000, 12_345)]
    sampler = BlendSampler(segments, TOKENS, 256, seed=5)
    every = [sampler[i] for i in range(20_000)]
    assert straight == [every[i] for i in (19_999, 0, 5000, 12_345)]
    assert [sampler[i] for i in reversed(range(20_000))] == every[::-1]
    reordered = {name: TOKENS[name] for name in reversed(TOKENS)}
    assert [BlendSampler(segments, reordered, 256, seed=5)[i] for i in range(99)] == every[:99]
    other_seed = BlendSampler(segments, TOKENS, 256, seed=6)
    assert sum(other_seed[i] == every[i] for i in range(1000)) < 5


def test_a_longer_run_only_moves_the_end_of_its_last_phase() -> None:
    shares = {"web": 1.0, "code": 3.0}
    short = BlendSampler([Segment("only", 0, 1000, shares)], TOKENS, 256, seed=5)
    long = BlendSampler([Segment("only", 0, 10**9, shares)], TOKENS, 256, seed=5)
    assert [short[i] for i in range(3000)] == [long[i] for i in range(3000)]


def test_given_positions_are_continued() -> None:
    tokens = {"a": 16 * 10, "b": 16 * 20}
    old = BlendSampler([Segment("old", 0, 100, {"a": 1.0, "b": 1.0})], tokens, 16, seed=1)
    new = BlendSampler([Segment("new", 25, 100, {"a": 3.0, "b": 1.0})], tokens, 16, seed=1, positions=old.positions(25))
    windows: dict[tuple[str, int], list[int]] = {}
    for sampler, numbers in ((old, range(25)), (new, range(25, 60))):
        for i in numbers:
            windows.setdefault((sampler[i].source, sampler[i].epoch), []).append(sampler[i].window)
    assert all(len(set(w)) == len(w) for w in windows.values())
    assert len(windows["a", 1]) == 10
    with pytest.raises(IndexError, match="24 is before"):
        new[24]


def test_errors_name_the_source() -> None:
    with pytest.raises(UserError, match=r"4,096: b \(4,000\)"):
        BlendSampler([Segment("p", 0, 9, {"a": 1.0, "b": 1.0})], {"a": 10**6, "b": 4000}, 4096, seed=0)
    with pytest.raises(UserError, match="share of b is less than one sample"):
        BlendSampler([Segment("p", 0, 9, {"a": 1.0, "b": 1e-12})], {"a": 10**6, "b": 10**6}, 4096, seed=0)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak memory from Linux's /proc")
def test_a_thousand_sources_and_20_trillion_tokens_open_in_two_seconds_and_300_megabytes() -> None:
    program = """
        import random, re, time
        from nemotron_h.data.feed.sampler import BlendSampler, Segment

        rng = random.Random(0)
        tokens = {f"source{n:04d}": rng.randrange(10**7, 10**11) for n in range(1000)}
        steps, batch = [0, 1_907_349, 2_543_132, 3_118_515, 3_178_914], 768
        start = time.perf_counter()
        segments = [
            Segment(f"p{n}", steps[n] * batch, steps[n + 1] * batch, {s: rng.expovariate(1.0) for s in tokens})
            for n in range(4)
        ]
        sampler = BlendSampler(segments, tokens, 8192, seed=1)
        sampler[0], sampler[steps[-1] * batch - 1]
        seconds = time.perf_counter() - start
        # Not getrusage's ru_maxrss: a child inherits the peak of the process that started it.
        print(seconds, re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
    """
    shown = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    seconds, peak = map(float, shown.stdout.split())
    assert seconds < 2
    assert peak * 1024 < 300e6
