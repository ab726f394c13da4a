"""The sensitivity tornado: how far each cost of the host profile moves a metric over its plausible range.

Drawn from ``sensitivity.json``, a list of {cost, unit, low, default, high, metric, at_low, at_default, at_high, grade,
source, failed}: for each cost the metric with the cost at the ends of its range (null: that run failed, or no engine
can have a cost of that value) and at its default.
"""

import json
from pathlib import Path
from typing import Any

from fleet.errors import OutputError
from fleet.report.figure import Absent, Axis, Figure, Look, Series, positions, values
from fleet.report.table import Column, Table

FILE = "sensitivity.json"
MOST_COSTS = 30

Row = dict[str, Any]
_KEYS = (
    "metric", "cost", "unit", "low", "default", "high", "at_low", "at_default", "at_high", "grade", "source",
    "failed",
)  # fmt: skip
_TYPES: dict[str, Any] = (
    dict.fromkeys(("metric", "cost", "unit", "grade", "source"), str)
    | dict.fromkeys(("at_low", "at_high"), float | int | None)
    | {"failed": bool}
)


def tornadoes(directory: Path) -> list[Figure | Absent]:
    """A figure per metric, widest bar on top. Raises OutputError for a file of another form."""
    rows = _read(directory)
    if not rows:
        return [Absent("Sensitivity", f"no cost was varied (fleet sensitivity writes {FILE})")]
    by_metric: dict[str, list[Row]] = {}
    for row in rows:
        by_metric.setdefault(row["metric"], []).append(row)
    return [_tornado(metric, group, number) for number, (metric, group) in enumerate(by_metric.items(), 1)]


def sensitivity_table(directory: Path) -> Table | None:
    """Every cost that was varied, the one that moves its metric most first. Raises OutputError."""
    rows = sorted(_read(directory), key=lambda row: (row["metric"], -_width(row), row["cost"]))
    columns = tuple(map(Column, _KEYS))
    note = "at_low and at_high: the metric with the cost at that end of its range; - where there is no such run."
    found = tuple(tuple(row[key] for key in _KEYS) for row in rows)
    return Table("sensitivity", "Sensitivity", columns, found, note) if rows else None


def _read(directory: Path) -> list[Row]:
    """The file's list, [] if there is no file."""
    path = directory / FILE
    if not path.is_file():
        return []
    try:
        rows = json.loads(path.read_text("utf-8"))
        for row in rows:
            bad = [key for key in _KEYS if not isinstance(row[key], _TYPES.get(key, float | int))]
            if bad:
                raise ValueError(f"{bad[0]} of {row['cost']} is {row[bad[0]]!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{path}: not a list of varied costs: {type(error).__name__}: {error}") from None
    return list(rows)


def _width(row: Row) -> float:
    """How far the cost moves the metric."""
    met = [value for name in ("at_low", "at_default", "at_high") if (value := row[name]) is not None]
    return max(met) - min(met)


def _tornado(metric: str, rows: list[Row], number: int) -> Figure | Absent:
    rows = sorted(rows, key=lambda row: (-_width(row), row["cost"]))
    most, still = [row for row in rows if _width(row)][:MOST_COSTS], sum(_width(row) == 0 for row in rows)
    failed = [row["cost"] for row in rows if row["failed"]]
    if not most:
        return Absent(f"Sensitivity of {metric}", f"none of {len(rows)} costs moves it")
    base = values([row["at_default"] for row in most])
    places = positions(len(most))
    series = (
        Series("cost at the low end of its range", places, values([row["at_low"] for row in most]), Look(hatch=2),
               "bar", base=base),
        Series("cost at the high end", places, values([row["at_high"] for row in most]), Look(hatch=1),
               "bar", base=base),
    )  # fmt: skip
    labels = tuple(f"{r['cost']} {r['low']:g}..{r['high']:g} {r['unit']} [{r['grade']}]" for r in most)
    note = f"Bars start at the metric with every cost at its default. {still} of {len(rows)} costs do not move it."
    if failed:
        note += f" Failed at an end of its range: {', '.join(failed)}."
    if len(rows) - still > len(most):
        note += f" The {len(most)} widest are drawn."
    key = "tornado" if number == 1 else f"tornado-{number}"
    return Figure(
        key,
        f"Sensitivity of {metric}",
        Axis("", "", categories=labels),
        Axis(metric, "", limits=_limits(most)),
        series,
        note,
        horizontal=True,
    )


def _limits(rows: list[Row]) -> tuple[float, float]:
    """What is met of the metric, with a margin: how far it is from 0 is not the question."""
    met = [row[name] for row in rows for name in ("at_low", "at_default", "at_high") if row[name] is not None]
    margin = 0.06 * (max(met) - min(met))
    return min(met) - margin, max(met) + margin
