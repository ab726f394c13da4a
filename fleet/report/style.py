"""Dashes, markers, hatches and colours in the words of both drawing libraries, matched one to one.

The colours are of different lightness and the fills are greys, so that a print in black and white tells them apart too
(house style of `fleet.figure`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from fleet.report.figure import NO_MARKER, Look


class Pair(NamedTuple):
    """The same thing for plotly and for matplotlib."""

    plotly: str
    matplotlib: Any


DASHES = (
    Pair("solid", "-"), Pair("dash", "--"), Pair("dot", ":"), Pair("dashdot", "-."),
    Pair("longdash", (0, (8, 3))), Pair("longdashdot", (0, (8, 2, 1, 2))),
)  # fmt: skip
MARKERS = (
    Pair("circle", "o"), Pair("square", "s"), Pair("triangle-up", "^"), Pair("triangle-down", "v"),
    Pair("diamond", "D"), Pair("x", "X"), Pair("cross", "P"), Pair("star", "*"), Pair("pentagon", "p"),
    Pair("hexagon", "h"), Pair("triangle-left", "<"), Pair("triangle-right", ">"),
)  # fmt: skip
HATCHES = (
    Pair("", ""), Pair("/", "//"), Pair(".", ".."), Pair("x", "xx"), Pair("\\", "\\\\"), Pair("|", "||"),
    Pair("-", "--"), Pair("+", "++"),
)  # fmt: skip
FILLS = ("#404040", "#8c8c8c", "#d9d9d9", "#f2f2f2", "#737373", "#a6a6a6", "#bfbfbf", "#e6e6e6")
COLOURS = ("#1b4f8a", "#c2571a", "#2e7d4f", "#7b3f98", "#a12b3a", "#5c5c2e")
EDGES = ("#000000", "#c2571a")
"""Outlines of bars, by the colour of their look."""


def dash(look: Look) -> Pair:
    """The line of a look."""
    return DASHES[look.dash % len(DASHES)]


def marker(look: Look) -> Pair | None:
    """The marker of a look, if it has one."""
    return None if look.marker == NO_MARKER else MARKERS[look.marker % len(MARKERS)]


def hatch(look: Look) -> Pair:
    """The hatch of a look's bars."""
    return HATCHES[look.hatch % len(HATCHES)]


def fill(look: Look) -> str:
    """The fill of a look's bars."""
    return FILLS[look.hatch % len(FILLS)]


def edge(look: Look) -> str:
    """The outline of a look's bars."""
    return EDGES[look.colour % len(EDGES)]


def colour(look: Look) -> str:
    """The colour of a look's line and markers."""
    return COLOURS[look.colour % len(COLOURS)]


def stacks(names: list[str]) -> dict[str, tuple[float, float]]:
    """Per stack of a bar figure, in the order in which they come: offset of its middle, and width of its bars."""
    order = list(dict.fromkeys(names))
    width = 0.8 / max(len(order), 1)
    return {name: (-0.4 + width * (index + 0.5), width * 0.94) for index, name in enumerate(order)}


def turned(categories: Sequence[str]) -> int:
    """Degrees by which the names of categories must be turned to stand beside each other."""
    return 55 if sum(map(len, categories)) > 90 else 0
