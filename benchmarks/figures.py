"""What a benchmark reports: a named figure with unit, median and spread, as a table or as JSON.

The spread is the smallest and the largest of the repetitions. Two things that are compared are measured in one run, in
turns, so that a busy machine slows both.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Figure:
    """Median of ``runs`` repetitions and their extremes; all in ``unit``."""

    name: str
    unit: str
    median: float
    low: float
    high: float
    runs: int

    def line(self) -> str:
        """One line of the table."""
        spread = f"({_short(self.low)} - {_short(self.high)}, n={self.runs})" if self.runs > 1 else "(n=1)"
        return f"  {self.name:<54} {_short(self.median):>9} {self.unit:<12} {spread}"


def figure(name: str, unit: str, values: Sequence[float]) -> Figure:
    """The figure of some repetitions (at least one)."""
    return Figure(name, unit, median(values), min(values), max(values), len(values))


def print_figures(title: str, figures: Iterable[Figure]) -> None:
    """A section of the readable output."""
    print(f"\n{title}")
    for item in figures:
        print(item.line())


def to_builtins(figures: Iterable[Figure]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(item) for item in figures]


def progress(text: str) -> None:
    """A line on standard error."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
