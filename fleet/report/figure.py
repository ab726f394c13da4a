"""A figure as data: what is drawn, in which units, with which look; defined once and rendered by three back ends.

`fleet.report.interactive` makes it a plotly figure, `fleet.report.drawing` an SVG and a PNG, `fleet.report.csv_file` a
table. Nothing here knows a drawing library. A mark is told apart by dash, marker or hatch first and by colour last, so
that a figure stays legible in greyscale.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from fleet.report.addresses import AddressMap

Values = npt.NDArray[np.float64]
Kind = Literal["line", "points", "bar"]

NO_MARKER = -1


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis; ``categories`` name the positions 0, 1, 2, ... of an axis that has no numbers."""

    label: str
    unit: str
    log: bool = False
    categories: tuple[str, ...] = ()
    limits: tuple[float, float] | None = None
    addresses: AddressMap | None = None
    """Numbers are places on this axis of addresses."""
    whole: bool = False
    """Numbers count something."""

    @property
    def title(self) -> str:
        """``throughput (M accesses/s)``."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


@dataclass(frozen=True, slots=True)
class Look:
    """How a series looks: numbers of a dash, a marker, a colour and a hatch (`fleet.report.style`), counted around."""

    dash: int = 0
    marker: int = 0
    colour: int = 0
    hatch: int = 0

    @classmethod
    def number(cls, index: int) -> "Look":
        """The look of the ``index``-th of several series: it differs from the others in everything."""
        return cls(index, index, index, index)


@dataclass(frozen=True, slots=True)
class Series:
    """One set of marks. Bars of one ``stack`` pile up; different stacks of a figure stand side by side."""

    name: str
    x: Values
    """float64[n]; positions where the axis has categories."""
    y: Values
    """float64[n]; NaN breaks a line."""
    look: Look
    kind: Kind = "line"
    low: Values | None = None
    """float64[n]: lower end of a range about y; ``high``: its upper end."""
    high: Values | None = None
    base: Values | None = None
    """float64[n]: where a bar that does not start at 0 starts."""
    stack: str = ""
    shown: bool = True
    """Whether it is drawn at first; else the page's legend brings it, and CSV has it."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """A heat map under the series."""

    x_edges: Values
    """float64[columns + 1]."""
    y_edges: Values
    """float64[rows + 1], rising."""
    values: Values
    """float64[rows, columns]; NaN: nothing there."""
    label: str
    unit: str
    log: bool = False

    @property
    def title(self) -> str:
        """Of the colour scale."""
        return f"{self.label} ({self.unit})"


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure. ``horizontal``: bars lie, so that ``x`` (their categories) goes up and ``y`` goes right."""

    key: str
    """Name of its files."""
    title: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    note: str = ""
    """How to read it, and what was left out or thinned."""
    matrix: Matrix | None = None
    horizontal: bool = False


@dataclass(frozen=True, slots=True)
class Absent:
    """A figure that is not there, and why."""

    title: str
    why: str


@dataclass(slots=True)
class Gallery:
    """Figures in their order, and those that cannot be drawn."""

    figures: list[Figure] = field(default_factory=list)
    absent: list[Absent] = field(default_factory=list)

    def add(self, *found: Figure | Absent) -> None:
        """Take in what a builder made."""
        for one in found:
            if isinstance(one, Figure):
                self.figures.append(one)
            else:
                self.absent.append(one)


def values(numbers: Sequence[float | None]) -> Values:
    """float64[n]; None becomes NaN."""
    return np.array([np.nan if number is None else number for number in numbers], np.float64)


def positions(count: int) -> Values:
    """0, 1, 2, ...: places of categories."""
    return np.arange(count, dtype=np.float64)
