"""A figure as SVG and PNG, drawn by matplotlib in the house style of `fleet.figure`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fleet.atomic import replacing
from fleet.report import style
from fleet.report.figure import Figure, Matrix, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

DPI = 110


def draw(figure: Figure, folder: Path) -> None:
    """Write ``<key>.svg`` and ``<key>.png`` into ``folder``. Raises OSError."""
    from matplotlib import rc_context

    canvas = _canvas(figure)
    # A fixed salt: the same figure is the same file.
    with rc_context({"svg.hashsalt": figure.key, "svg.fonttype": "none"}):
        for form in ("svg", "png"):
            with replacing(folder / f"{figure.key}.{form}") as temporary:
                metadata = {"Date": None} if form == "svg" else {}
                canvas.savefig(temporary, format=form, dpi=DPI, metadata=metadata)
            # Once laid out is enough, and laying out is what takes long.
            canvas.set_layout_engine("none")


def _canvas(figure: Figure) -> "Canvas":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    drawn = [series for series in figure.series if series.shown]
    tall = max(5.0, 0.3 * len(figure.x.categories) + 1.5) if figure.horizontal else 6.0 if len(drawn) > 8 else 5.0
    canvas = Canvas(figsize=(9.5, tall), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.add_subplot()
    axes.set_title(figure.title, fontsize=11)
    if figure.matrix is not None:
        _heat(axes, figure.matrix, canvas)
    _bars(axes, figure, [series for series in drawn if series.kind == "bar"])
    for series in drawn:
        if series.kind != "bar":
            _marks(axes, series)
    _dress(axes, figure)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        canvas.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, fontsize=8)
    return canvas


def _marks(axes: "Axes", series: Series) -> None:
    shape = style.marker(series.look)
    points = series.kind == "points"
    options: dict[str, Any] = {
        "color": style.colour(series.look),
        "label": series.name,
        "linestyle": "none" if points else style.dash(series.look).matplotlib,
        "marker": shape.matplotlib if shape else None,
        "markersize": 3 if points and len(series.x) > 500 else 5,
        "linewidth": 1.4,
    }
    if series.low is not None and series.high is not None:
        around = np.nan_to_num(np.abs(np.stack([series.y - series.low, series.high - series.y])))
        axes.errorbar(series.x, series.y, around, capsize=3, elinewidth=1, **options)
    else:
        axes.plot(series.x, series.y, markevery=max(1, 0 if points else len(series.x) // 12), **options)


def _bars(axes: "Axes", figure: Figure, bars: list[Series]) -> None:
    places = style.stacks([series.stack for series in figure.series if series.kind == "bar"])
    tops: dict[str, Any] = {}
    for series in bars:
        offset, width = places[series.stack]
        if series.base is None:
            base = tops.get(series.stack, np.zeros(max(len(figure.x.categories), 1)))
            places_of = series.x.astype(np.int64)
            start, length = base[places_of].copy(), np.nan_to_num(series.y)
            base[places_of] += length
            tops[series.stack] = base
        else:
            start, length = series.base, series.y - series.base
        options: dict[str, Any] = {
            "color": style.fill(series.look), "hatch": style.hatch(series.look).matplotlib,
            "edgecolor": style.edge(series.look), "linewidth": 0.8, "label": series.name,
        }  # fmt: skip
        if figure.horizontal:
            axes.barh(series.x + offset, length, width, start, **options)
        else:
            axes.bar(series.x + offset, length, width, start, **options)


def _heat(axes: "Axes", matrix: Matrix, canvas: "Canvas") -> None:
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, LogNorm, Normalize

    cells = np.ma.masked_invalid(np.where(matrix.values > 0, matrix.values, np.nan) if matrix.log else matrix.values)
    low, high = float(cells.min()), float(cells.max())
    norm = LogNorm(low, max(high, low * 1.001)) if matrix.log else Normalize(low, high)
    # The palest shades are left out: on white, a rare access must still be seen.
    shades = ListedColormap(colormaps["magma_r"](np.linspace(0.12, 1, 256)))
    mesh = axes.pcolormesh(matrix.x_edges, matrix.y_edges, cells, cmap=shades, norm=norm, rasterized=True)
    canvas.colorbar(mesh, ax=axes, label=matrix.title)


def _plain(value: float, place: int | None = None) -> str:
    """``200`` rather than 2 x 10^2."""
    del place
    return f"{value:g}"


def _dress(axes: "Axes", figure: Figure) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    across, upward = (figure.y, figure.x) if figure.horizontal else (figure.x, figure.y)
    axes.set_xlabel(across.title)
    axes.set_ylabel(upward.title)
    if across.log:
        axes.set_xscale("log")
    if upward.log:
        axes.set_yscale("log")
    for scale, axis in ((axes.xaxis, across), (axes.yaxis, upward)):
        if axis.whole:
            scale.set_major_locator(MaxNLocator(integer=True))
        if axis.log:
            scale.set_major_formatter(FuncFormatter(_plain))
            scale.set_minor_formatter(FuncFormatter(_plain))
            scale.set_minor_locator(LogLocator(subs=(2, 5)))
    if across.limits:
        axes.set_xlim(*across.limits)
    if upward.limits:
        axes.set_ylim(*upward.limits)
    elif not upward.log and not upward.categories and upward.addresses is None and figure.matrix is None:
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    if across.categories:
        angle = style.turned(across.categories)
        turned: dict[str, Any] = {"rotation": angle, "ha": "right", "rotation_mode": "anchor"} if angle else {}
        axes.set_xticks(range(len(across.categories)), across.categories, fontsize=8, **turned)
        axes.set_xlim(-0.6, len(across.categories) - 0.4)
    if upward.categories:
        axes.set_yticks(range(len(upward.categories)), upward.categories, fontsize=8)
        axes.invert_yaxis()
    if upward.addresses is not None:
        axes.set_ylim(0, upward.addresses.size)
        ticks = upward.addresses.ticks()
        axes.set_yticks([place for place, _ in ticks], [label for _, label in ticks], fontsize=8, family="monospace")
    if figure.matrix is None:
        axes.grid(
            axis="both" if not figure.x.categories else "x" if figure.horizontal else "y", color="0.88", linewidth=0.6
        )
        axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
