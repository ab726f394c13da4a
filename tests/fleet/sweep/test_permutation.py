"""fleet.sweep.permutation against a plain reference that relabels and shifts by hand."""

import itertools
import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.sweep.permutation import LEVEL, Block, compare

SMALL = st.lists(st.integers(-20, 20).map(float), min_size=1, max_size=4)
BLOCKS = st.lists(st.tuples(SMALL, SMALL), min_size=1, max_size=2)


def mean(values: list[Fraction]) -> Fraction:
    return sum(values, Fraction(0)) / len(values)


def relabelled(blocks: list[Block], shift: Fraction) -> Iterator[Fraction]:
    """The statistic under every labelling, after B was moved down by ``shift``; the first is the observed one."""
    each = []
    for a, b in blocks:
        pool = [Fraction(x) for x in a] + [Fraction(x) - shift for x in b]
        choices = []
        for chosen in itertools.combinations(range(len(pool)), len(a)):
            left = [pool[place] for place in chosen]
            right = [pool[place] for place in range(len(pool)) if place not in chosen]
            choices.append(mean(right) - mean(left))
        each.append(choices)
    for chosen_differences in itertools.product(*each):
        yield mean(list(chosen_differences))


def p_value(blocks: list[Block], shift: Fraction = Fraction(0)) -> Fraction:
    found = list(relabelled(blocks, shift))
    return Fraction(sum(abs(one) >= abs(found[0]) for one in found), len(found))


@given(BLOCKS)
def test_p_is_the_share_of_relabellings_that_are_as_far_off(blocks: list[Block]) -> None:
    found = compare(blocks)
    assert found.p == pytest.approx(float(p_value(blocks)))
    assert found.difference == pytest.approx(float(next(relabelled(blocks, Fraction(0)))), abs=1e-9)
    assert found.smallest_p <= found.p + 1e-12


@given(BLOCKS, st.integers(-400, 400))
def test_the_interval_holds_what_the_test_would_not_reject(blocks: list[Block], tenths: int) -> None:
    found = compare(blocks)
    assert found.low <= found.difference + 1e-9 and found.difference <= found.high + 1e-9
    shift = Fraction(tenths, 7)
    inside = found.low < float(shift) < found.high
    # At its very ends a shift is neither in nor out to floating point.
    if min(abs(float(shift) - found.low), abs(float(shift) - found.high)) > 1e-6:
        assert inside == (p_value(blocks, shift) > Fraction(LEVEL).limit_denominator(100))


@given(BLOCKS, st.integers(1, 50), st.integers(-50, 50))
def test_it_moves_with_the_data(blocks: list[Block], factor: int, offset: int) -> None:
    plain = compare(blocks)
    moved = compare([([x * factor for x in a], [x * factor + offset for x in b]) for a, b in blocks])
    swapped = compare([(b, a) for a, b in blocks])
    if math.isfinite(plain.low):
        assert moved.low == pytest.approx(plain.low * factor + offset, abs=1e-6)
        assert moved.high == pytest.approx(plain.high * factor + offset, abs=1e-6)
        assert [swapped.low, swapped.high] == pytest.approx([-plain.high, -plain.low])
    else:
        assert not math.isfinite(moved.low)
    assert swapped.p == pytest.approx(plain.p)


def test_three_a_side_can_never_tell_and_four_can() -> None:
    three = compare([([1, 2, 3], [101, 102, 103])])
    assert (three.smallest_p, three.p) == (0.1, 0.1)
    assert (three.low, three.high) == (-math.inf, math.inf)
    four = compare([([1, 2, 3, 4], [101, 102, 103, 104])])
    assert four.p == four.smallest_p == pytest.approx(2 / 70)
    assert 95 < four.low < 100 < four.high < 105


def test_it_rejects_what_is_equal_as_often_as_its_level_says() -> None:
    random = np.random.Generator(np.random.PCG64(5))
    trials = 400
    values = random.exponential(size=(trials, 10))
    rejected = [compare([(row[:5].tolist(), row[5:].tolist())]) for row in values]
    share = sum(found.p <= LEVEL for found in rejected) / trials
    assert share <= LEVEL + 3 * math.sqrt(LEVEL * (1 - LEVEL) / trials)
    assert [found.low <= 0 <= found.high for found in rejected] == [found.p > LEVEL for found in rejected]


def test_many_relabellings_are_sampled_the_same_each_time() -> None:
    random = np.random.Generator(np.random.PCG64(6))
    blocks = [(random.normal(0, 1, 10).tolist(), random.normal(1.5, 1, 12).tolist()) for _ in range(2)]
    found = compare(blocks)
    assert found == compare(blocks)
    assert found.p < 0.01
    assert 0.3 < found.low < found.difference < found.high < 2.7
