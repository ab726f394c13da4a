"""Long series, thinned for the screen: a page of a million marks helps nobody. CSV files keep every value.

A line keeps the first, lowest, highest and last point of each of equal stretches (the M4 aggregation, Jugel et al.,
VLDB 2014), so that no peak is lost; of single points every k-th is kept. Either is said in the figure's note.
"""

import dataclasses

import numpy as np
import numpy.typing as npt

from fleet.report.figure import Figure, Series, Values

MOST_LINE_POINTS = 2_000
"""Of one line."""
MOST_POINTS = 8_000
"""Of one set of single points."""


def thinned(figure: Figure) -> Figure:
    """The figure as it is drawn: itself where it is small."""
    series = [_thinned(one) for one in figure.series]
    fewer = [(old, new) for old, new in zip(figure.series, series, strict=True) if len(new.x) < len(old.x)]
    if not fewer:
        return figure
    before, after = sum(len(old.x) for old, _ in fewer), sum(len(new.x) for _, new in fewer)
    how = "lowest and highest point of each stretch" if fewer[0][0].kind == "line" else "every k-th point"
    said = f"Drawn: {after:,} of {before:,} points ({how}); the CSV file holds all."
    return dataclasses.replace(figure, series=tuple(series), note=f"{figure.note} {said}".strip())


def _thinned(series: Series) -> Series:
    count = len(series.x)
    border = bool(np.isnan(series.x).any())  # round something: each of its stretches is needed
    if series.kind == "line" and count > MOST_LINE_POINTS and not border:
        return _take(series, m4(series.y, MOST_LINE_POINTS // 4))
    if series.kind == "points" and count > MOST_POINTS:
        return _take(series, np.arange(0, count, -(-count // MOST_POINTS)))
    return series


def _take(series: Series, chosen: npt.NDArray[np.int64]) -> Series:
    def part(column: Values | None) -> Values | None:
        return None if column is None else column[chosen]

    return dataclasses.replace(
        series, x=series.x[chosen], y=series.y[chosen], low=part(series.low), high=part(series.high)
    )


def m4(y: Values, stretches: int) -> npt.NDArray[np.int64]:
    """Indices, rising: first, lowest (NaN most of all), highest and last point of each of ``stretches`` equal parts."""
    bounds = np.linspace(0, len(y), stretches + 1).astype(np.int64)
    chosen: set[int] = set()
    filled = np.where(np.isnan(y), -np.inf, y)
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        if end > start:
            part = filled[start:end]
            chosen |= {start, start + int(part.argmin()), start + int(part.argmax()), end - 1}
    return np.array(sorted(chosen), np.int64)
