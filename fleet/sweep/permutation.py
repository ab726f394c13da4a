"""The stratified permutation test of a difference of means, and the confidence interval that it gives.

Observations lie in blocks (points of a sweep), in each some of A and some of B. Under the null hypothesis that the
labels in a block could have been drawn otherwise, the mean over blocks of (mean of B - mean of A) has the distribution
that relabelling gives. All relabellings are tried where they are few, else a sample with a fixed seed. The interval
holds every shift of B that the test would not reject (Ernst, "Permutation methods: a basis for exact inference",
Statistical Science 2004): it assumes a shift, no shape. Nothing is assumed normal.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Block = tuple[Sequence[float], Sequence[float]]
"""Observations of A and of B, each at least one."""

LEVEL = 0.05
"""Of the test; the interval has the complement."""
MOST = 20_000
"""Relabellings that are tried; more are sampled."""
_SEED = 1
_ULPS = 1e-9
"""Relative size below which two statistics count as equal: they are sums in another order."""


class Difference(NamedTuple):
    """Mean of A, mean of B, and how sure their difference is."""

    a: float
    b: float
    low: float
    """End of the 95 % interval of b - a; -inf where there are too few observations to say."""
    high: float
    p: float
    """Two-sided."""
    smallest_p: float
    """That any data of this shape could give."""

    @property
    def difference(self) -> float:
        """b - a."""
        return self.b - self.a


def compare(blocks: Sequence[Block]) -> Difference:
    """The difference over at least one block."""
    weights = _relabellings([(len(a), len(b)) for a, b in blocks])
    values = np.array([x for a, b in blocks for x in (*a, *b)], np.float64)
    is_b = np.array([label for a, b in blocks for label in (*[0.0] * len(a), *[1.0] * len(b))], np.float64)
    # Row 0 is the labelling that was observed.
    found, shift = weights @ values, weights @ is_b
    observed = float(found[0])
    scale = float(np.abs(values).max(initial=0.0)) * _ULPS
    p = float(np.mean(np.abs(found) >= abs(observed) - scale))
    low, high = _interval(found, shift, observed)
    a, b = _means(blocks)
    never = float(np.mean(np.abs(np.abs(shift) - 1.0) < _ULPS))
    return Difference(a, b, low, high, p, never)


def untested(blocks: Sequence[Block]) -> Difference:
    """The difference where nothing is up to chance: no interval, and no test."""
    return Difference(*_means(blocks), low=-math.inf, high=math.inf, p=1.0, smallest_p=1.0)


def _means(blocks: Sequence[Block]) -> tuple[float, float]:
    a, b = (float(np.mean([np.mean(block[side]) for block in blocks])) for side in (0, 1))
    return a, b


def _interval(found: Floats, shift: Floats, observed: float) -> tuple[float, float]:
    """Ends of the shifts d for which more than LEVEL of the relabellings have |found - d shift| >= |observed - d|.

    For one relabelling these d lie between the roots of (found - observed + d (1 - shift)) (found + observed - d (1 +
    shift)), which enclose ``observed``; where a factor does not depend on d, they are all numbers.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        first = np.where(np.abs(1 - shift) < _ULPS, np.nan, (observed - found) / (1 - shift))
        second = np.where(np.abs(1 + shift) < _ULPS, np.nan, (observed + found) / (1 + shift))
    bounded = ~(np.isnan(first) | np.isnan(second))
    lows = np.sort(np.where(bounded, np.minimum(first, second), -np.inf))
    highs = np.sort(np.where(bounded, np.maximum(first, second), np.inf))[::-1]
    place = math.floor(LEVEL * len(found))
    return float(lows[place]), float(highs[place])


def _relabellings(sizes: Sequence[tuple[int, int]]) -> Floats:
    """Weights (relabelling, observation) whose product with the values is the statistic; the observed one first."""
    total = math.prod(math.comb(a + b, a) for a, b in sizes)
    if total <= MOST:
        each = [_labels(a, b) for a, b in sizes]
        return np.array([np.concatenate(chosen) for chosen in itertools.product(*each)]) / len(sizes)
    random = np.random.Generator(np.random.PCG64(_SEED))
    rows = np.empty((MOST, sum(a + b for a, b in sizes)))
    start = 0
    for a, b in sizes:
        base = np.concatenate([np.full(a, -1 / a), np.full(b, 1 / b)])
        rows[:, start : start + a + b] = random.permuted(np.tile(base, (MOST, 1)), axis=1)
        rows[0, start : start + a + b] = base
        start += a + b
    return rows / len(sizes)


def _labels(a: int, b: int) -> list[Floats]:
    """Every choice of a observations to be A's; the first a of them first."""
    rows = []
    for chosen in itertools.combinations(range(a + b), a):
        row = np.full(a + b, 1 / b)
        row[list(chosen)] = -1 / a
        rows.append(row)
    return rows
