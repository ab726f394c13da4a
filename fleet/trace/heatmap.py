"""Address by time: where in its memory a program is busy when, as text and as a figure.

Both axes are binned. Time is the number of the reference. Holes between regions are left out of the address axis; a
cell's value is page references per page and bin, so that cells of different height compare.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fleet.trace.info import REGION_GAP_PAGES, Region, TraceInfo, page_references
from proto.errors import TraceError
from proto.trace import regions
from proto.units import PAGE_SHIFT, format_bytes

_ASCII = " .:-=+*#%@"
_BLOCKS = " ░▒▓█"
_LABELS = 30
"""Address labels that fit on a figure."""


@dataclass(frozen=True, slots=True)
class HeatMap:
    """Bins over address (rows, rising) and time (columns)."""

    cells: npt.NDArray[np.float64]
    """float64[rows, columns]: page references per page of the row in that bin of time; 0 = none."""
    first_pages: npt.NDArray[np.uint64]
    """uint64[rows + 1]: page at which each row starts; the last one ends the last row."""
    region_rows: tuple[int, ...]
    """Rows at which a region starts."""
    labels: tuple[str, ...]
    """Name of each region."""
    references: int


def heat_map(info: TraceInfo, rows: int, columns: int) -> HeatMap:
    """A map of at most `rows` by `columns` cells. Regions too many for the rows are merged with their neighbours."""
    used, reference = page_references(info.trace)
    total = len(info.trace.address)
    columns = max(min(columns, total), 1)
    gap = REGION_GAP_PAGES
    areas = regions(info.pages, gap)
    while len(areas) > max(rows // 2, 1):
        gap *= 2
        areas = regions(info.pages, gap)
    heights = _heights([span for _, span in areas], rows)

    starts = [
        start + span * row // height
        for (start, span), height in zip(areas, heights, strict=True)
        for row in range(height)
    ]
    ends = [
        start + span * (row + 1) // height
        for (start, span), height in zip(areas, heights, strict=True)
        for row in range(height)
    ]
    row = np.searchsorted(np.array(starts, np.uint64), used, "right") - 1
    column = reference * columns // total
    cells = np.bincount(row * columns + column, minlength=len(starts) * columns).reshape(len(starts), columns)
    pages = np.array(ends, np.float64) - np.array(starts, np.float64)
    region_rows = tuple(np.cumsum([0, *heights[:-1]]).tolist())
    labels = tuple(_label(info.regions, start, span) for start, span in areas)
    edges = np.array([*starts, ends[-1]], np.uint64)
    return HeatMap(cells / pages[:, None], edges, region_rows, labels, total)


def _heights(spans: list[int], rows: int) -> list[int]:
    """Rows of each region: one, and of the others in proportion, but no more than it has pages."""
    others, total = max(rows - len(spans), 0), sum(spans)
    return [min(1 + others * span // total, span) for span in spans]


def _label(found: tuple[Region, ...], start: int, span: int) -> str:
    inside = [region for region in found if start <= region.first_page < start + span]
    return inside[0].name if len(inside) == 1 else f"{inside[0].name} to {inside[-1].name}"


def render_text(heat: HeatMap, ascii_only: bool) -> list[str]:
    """The map as lines of text, highest address first, shades on a logarithmic scale."""
    shades = _ASCII if ascii_only else _BLOCKS
    busy = heat.cells[heat.cells > 0]
    low, high = float(busy.min()), float(busy.max())
    levels = len(shades) - 1
    scale = np.log(np.maximum(heat.cells, low) / low) / np.log(high / low) if high > low else np.ones_like(heat.cells)
    level = np.where(heat.cells > 0, np.minimum(1 + (scale * levels).astype(np.int64), levels), 0)
    names = dict(zip(heat.region_rows, heat.labels, strict=True))
    width = max(map(len, heat.labels))
    bar = "|" if ascii_only else "│"
    lines = []
    for row in reversed(range(len(level))):
        text = "".join(shades[value] for value in level[row])
        lines.append(f"{int(heat.first_pages[row]) << PAGE_SHIFT:#16x} {names.get(row, ''):{width}} {bar}{text}{bar}")
        if row in names and row:
            lines.append(f"{'...':>16} {'':{width}} {bar}{' ' * len(text)}{bar}")
    columns = heat.cells.shape[1]
    end = f"{heat.references} references"
    lines.append(f"{'':16} {'':{width}}  0{end:>{max(columns - 1, len(end) + 1)}}")
    key = f"{shades[1]!r} {low:.3g} to {shades[-1]!r} {high:.3g}, log"
    lines.append(f"{'':16} {'':{width}}  references per page and column: {key}")
    return lines


def write_png(info: TraceInfo, path: Path, rows: int = 240, columns: int = 360) -> None:
    """The map as a PNG: dark is busy, also in greyscale. Raises TraceError if it cannot be written."""
    # A Figure of its own draws with Agg and leaves pyplot's global state alone.
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    heat = heat_map(info, rows, columns)
    cells = np.ma.masked_equal(heat.cells, 0)
    heights = _drawn_heights(heat)
    edges = np.concatenate(([0], np.cumsum(heights)))
    # The palest shades are left out: on white, a rare reference must still be seen.
    shades = ListedColormap(colormaps["magma_r"](np.linspace(0.15, 1, 256)))
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.add_subplot()
    mesh = axes.pcolormesh(
        np.linspace(0, heat.references, heat.cells.shape[1] + 1),
        edges,
        cells,
        cmap=shades,
        norm=LogNorm(float(cells.min()), max(float(cells.max()), float(cells.min()) * 1.001)),
        rasterized=True,
    )
    figure.colorbar(mesh, label="references per 4 KiB page and column (log)")
    for row in heat.region_rows[1:]:
        axes.axhline(edges[row], color="black", linewidth=0.6, linestyle="--")
    ticks, labels = _address_ticks(heat, edges)
    axes.set_yticks(ticks, labels, fontsize=8, family="monospace")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_xlabel("time (number of the reference)")
    axes.set_ylabel("address (dashed: a hole, left out)")
    size = format_bytes(len(info.pages) << PAGE_SHIFT)
    axes.set_title(f"{info.trace.meta.source or info.path}: {heat.references:,} references to {size}", fontsize=11)
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise TraceError(f"{path}: cannot write the figure: {error.strerror or error}") from error


def _drawn_heights(heat: HeatMap) -> npt.NDArray[np.float64]:
    """Height of each row: 1, but more in a region too small to be seen and labelled otherwise."""
    bounds = [*heat.region_rows, len(heat.cells)]
    least = len(heat.cells) / _LABELS
    return np.concatenate([np.full(end - start, max(least / (end - start), 1.0)) for start, end in pairwise(bounds)])


def _address_ticks(heat: HeatMap, edges: npt.NDArray[np.float64]) -> tuple[list[float], list[str]]:
    """A label at each region's start, and more of them in large regions."""
    bounds = [*heat.region_rows, len(heat.cells)]
    apart = len(heat.cells) / _LABELS
    ticks: list[float] = []
    labels: list[str] = []
    for (start, end), name in zip(pairwise(bounds), heat.labels, strict=True):
        for row in range(start, end, max(len(heat.cells) // 8, 1)):
            if row == start or edges[end] - edges[row] >= apart:
                ticks.append(float(edges[row]))
                labels.append(f"{name + ' ' if row == start else ''}{int(heat.first_pages[row]) << PAGE_SHIFT:#x}")
    return ticks, labels
