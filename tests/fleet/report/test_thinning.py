"""Thinning keeps every peak, and says that it thinned."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fleet.report.figure import Axis, Figure, Kind, Look, Series
from fleet.report.thinning import MOST_LINE_POINTS, MOST_POINTS, m4, thinned

AXIS = Axis("x", "s")


def figure(y: np.ndarray, kind: Kind) -> Figure:
    return Figure("k", "t", AXIS, AXIS, (Series("a", np.arange(len(y), dtype=float), y, Look(), kind),), "Note.")


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=400), st.integers(1, 20))
def test_extremes_of_each_stretch_stay(numbers: list[float], stretches: int) -> None:
    y = np.array(numbers)
    chosen = m4(y, stretches)
    assert (np.diff(chosen) > 0).all()
    assert len(chosen) <= 4 * stretches
    assert {0, len(y) - 1} <= set(chosen.tolist())
    bounds = [len(y) * part // stretches for part in range(stretches + 1)]
    for start, end in pairwise(bounds):
        if end > start:
            kept = y[chosen[(chosen >= start) & (chosen < end)]]
            assert (kept.min(), kept.max()) == (y[start:end].min(), y[start:end].max())


def test_short_series_stay_themselves() -> None:
    one = figure(np.zeros(MOST_LINE_POINTS), "line")
    assert thinned(one) is one


def test_long_ones_are_thinned_and_say_so() -> None:
    y = np.zeros(100_000)
    y[77_777] = 5.0
    line = thinned(figure(y, "line"))
    assert len(line.series[0].x) <= MOST_LINE_POINTS
    assert line.series[0].y.max() == 5.0
    assert line.note.startswith("Note. Drawn:")
    assert "of 100,000 points" in line.note
    points = thinned(figure(y, "points"))
    assert MOST_POINTS / 2 < len(points.series[0].x) <= MOST_POINTS
    assert "every k-th" in points.note
