"""A figure's numbers as CSV: a row per mark, under the axes' titles with their units; a heat map a row per cell."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from fleet.atomic import replacing
from fleet.report.figure import Axis, Figure, Values


def write_csv(figure: Figure, target: Path) -> None:
    """Write every value of ``figure``, also of series that are not drawn at first. Raises OSError."""
    with replacing(target) as temporary:
        pa_csv.write_csv(_cells(figure) if figure.matrix is not None else _marks(figure), temporary)


def _marks(figure: Figure) -> pa.Table:
    counts = [len(series.x) for series in figure.series]
    names = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    columns = {
        "series": pa.array([series.name for series in figure.series], pa.string()).take(pa.array(names)),
        figure.x.title or "what": _column(figure.x, np.concatenate([series.x for series in figure.series])),
        figure.y.title: _column(figure.y, np.concatenate([series.y for series in figure.series])),
    }
    for name, parts in (
        ("low", [series.low for series in figure.series]),
        ("high", [series.high for series in figure.series]),
        ("from", [series.base for series in figure.series]),
    ):
        if any(part is not None for part in parts):
            full = [np.full(n, np.nan) if part is None else part for part, n in zip(parts, counts, strict=True)]
            columns[name] = _numbers(np.concatenate(full))
    return pa.table(columns)


def _cells(figure: Figure) -> pa.Table:
    matrix = figure.matrix
    assert matrix is not None
    rows, columns = matrix.values.shape
    row, column = np.divmod(np.arange(rows * columns), columns)
    return pa.table(
        {
            f"{figure.x.title} from": _numbers(matrix.x_edges[column]),
            f"{figure.x.title} to": _numbers(matrix.x_edges[column + 1]),
            f"{figure.y.title} from": _column(figure.y, matrix.y_edges[row]),
            f"{figure.y.title} up to": _ends(figure.y, matrix.y_edges[row + 1]),
            matrix.title: _numbers(matrix.values.ravel()),
        }
    )


def _column(axis: Axis, numbers: Values) -> pa.Array:
    if axis.categories:
        return pa.array(axis.categories, pa.string()).take(pa.array(numbers.astype(np.int64)))
    if axis.addresses is not None:
        # The place before the gap of a broken line has no address.
        return pa.array(axis.addresses.address(np.nan_to_num(numbers)), mask=np.isnan(numbers))
    return _numbers(numbers)


def _ends(axis: Axis, edges: Values) -> pa.Array:
    """Where cells end: of the last one of a region that is not where the next region starts."""
    if axis.addresses is not None:
        return pa.array(axis.addresses.address(edges - 1) + 1)
    return _column(axis, edges)


def _numbers(numbers: Values) -> pa.Array:
    return pa.array(numbers, pa.float64(), from_pandas=True)
