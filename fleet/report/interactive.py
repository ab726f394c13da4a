"""A figure as plotly draws it: plain data for plotly.js, with hover, zoom and a legend that toggles.

Nothing of plotly is imported; the tests hold the data to plotly's own schema. Only trace types that draw SVG are used:
those for WebGL compile code from text, which the page's content policy forbids.
"""

from typing import Any

import numpy as np

from fleet.report import style
from fleet.report.figure import Axis, Figure, Matrix, Series, Values

CONFIG: dict[str, Any] = {
    "displaylogo": False,
    "responsive": True,
    "scrollZoom": False,
    "plotlyServerURL": "",
    "topojsonURL": "",
    "showSendToCloud": False,
    "showEditInChartStudio": False,
    "showLink": False,
    "toImageButtonOptions": {"format": "svg"},
}
"""What plotly.js is started with: it has nobody to ask, and no link leads away."""

_GREYS = [[0.0, "#e8e8e8"], [0.35, "#fdae6b"], [0.7, "#a63603"], [1.0, "#1a0a00"]]
"""Falls in lightness all the way: dark is busy, in greyscale too."""

_MOST_ABOVE = 12
"""Series whose names fit above a figure; the legend of more stands beside it, and scrolls."""
_LEGEND_ABOVE = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"}
_LEGEND_BESIDE = {"orientation": "v", "x": 1.05, "y": 1, "yanchor": "top", "traceorder": "normal"}


def plotly_figure(figure: Figure) -> dict[str, Any]:
    """``{"data": [...], "layout": {...}}`` for ``Plotly.newPlot``; numbers that are none are null."""
    places = style.stacks([series.stack for series in figure.series if series.kind == "bar"])
    data = [_heat(figure.matrix, figure)] if figure.matrix is not None else []
    data += [
        _bars(series, figure, places) if series.kind == "bar" else _marks(series, figure) for series in figure.series
    ]
    x, y = _axis(figure.x, figure), _axis(figure.y, figure)
    if figure.horizontal:
        x, y = y, x | {"range": x["range"][::-1]}
    heat, many = figure.matrix is not None, len(figure.series) > _MOST_ABOVE
    layout = {
        "xaxis": x,
        "yaxis": y,
        "barmode": "overlay" if any(series.base is not None for series in figure.series) else "stack",
        "hovermode": "closest",
        "showlegend": bool(figure.series),
        "legend": _LEGEND_BESIDE if many else _LEGEND_ABOVE,
        "modebar": {"orientation": "h" if many else "v"},
        "margin": {"l": 80, "r": 40, "t": 40 if many else 20, "b": 60},
        "height": 560 if heat or many or len(figure.x.categories) > 16 else 440,
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#111111"},
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
    }
    return {"data": data, "layout": layout}


def _axis(axis: Axis, figure: Figure) -> dict[str, Any]:
    form: dict[str, Any] = {
        "title": {"text": axis.title},
        "gridcolor": "#e0e0e0",
        "zeroline": False,
        "automargin": True,
        "showline": True,
        "linecolor": "#606060",
        "ticks": "outside",
        "type": "log" if axis.log else "linear",
    }
    if axis.categories:
        form |= {"tickvals": list(range(len(axis.categories))), "ticktext": list(axis.categories), "showgrid": False}
        form |= {"range": [-0.6, len(axis.categories) - 0.4]}
        if not figure.horizontal:
            form["tickangle"] = -style.turned(axis.categories)
    if axis.whole:
        form |= {"tickformat": ",d", "minallowed": 0} | (
            {} if axis.log else {"dtick": 1} if _span(figure) <= 20 else {}
        )
    if axis.addresses is not None:
        ticks = axis.addresses.ticks()
        form |= {"tickvals": [place for place, _ in ticks], "ticktext": [label for _, label in ticks]}
        form["range"] = [0, axis.addresses.size]
    if axis.limits:
        form["range"] = list(axis.limits)
    elif axis is figure.y and not axis.log and axis.addresses is None:
        form["rangemode"] = "tozero"
    return form


def _span(figure: Figure) -> float:
    xs = np.concatenate([series.x for series in figure.series])
    return float(np.ptp(xs)) if len(xs) else 0.0


def _marks(series: Series, figure: Figure) -> dict[str, Any]:
    shape = style.marker(series.look)
    colour = style.colour(series.look)
    points = series.kind == "points"
    mode = "markers" if points else "lines+markers" if shape and len(series.x) <= 200 else "lines"
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": mode,
        "name": series.name,
        "x": _list(series.x),
        "y": _list(series.y),
        "visible": True if series.shown else "legendonly",
        "line": {"dash": style.dash(series.look).plotly, "color": colour, "width": 1.8},
        "hovertemplate": f"%{{x}}<br>%{{y:.6g}}<extra>{_escaped(series.name)}</extra>",
    }
    if figure.y.addresses is not None and points:
        trace["text"] = [f"{address:#x}" for address in figure.y.addresses.address(series.y).tolist()]
        trace["hovertemplate"] = f"%{{x:.6g}} s<br>%{{text}}<extra>{_escaped(series.name)}</extra>"
    if shape:
        trace["marker"] = {"symbol": shape.plotly, "color": colour, "size": 9 if points and len(series.x) <= 200 else 6}
    if series.low is not None and series.high is not None:
        trace["error_y"] = {
            "type": "data", "symmetric": False, "thickness": 1.2, "color": colour,
            "array": _list(series.high - series.y), "arrayminus": _list(series.y - series.low),
        }  # fmt: skip
    return trace


def _bars(series: Series, figure: Figure, places: dict[str, tuple[float, float]]) -> dict[str, Any]:
    offset, width = places[series.stack]
    across, along = _list(series.x + offset), _list(series.y if series.base is None else series.y - series.base)
    names = [figure.x.categories[int(place)] if figure.x.categories else f"{place:g}" for place in series.x]
    trace: dict[str, Any] = {
        "type": "bar",
        "name": series.name,
        "x": along if figure.horizontal else across,
        "y": across if figure.horizontal else along,
        "orientation": "h" if figure.horizontal else "v",
        "width": width,
        "visible": True if series.shown else "legendonly",
        "text": [f"{name}<br>{value:.6g}" for name, value in zip(names, series.y, strict=True)],
        "textposition": "none",
        "hovertemplate": f"%{{text}} {_escaped(figure.y.unit)}<extra>{_escaped(series.name)}</extra>",
        "marker": {
            "color": style.fill(series.look),
            "line": {"color": style.edge(series.look), "width": 1.2},
            "pattern": {"shape": style.hatch(series.look).plotly, "fgcolor": "#000000", "fillmode": "overlay",
                        "size": 7, "solidity": 0.25},
        },
    }  # fmt: skip
    if series.base is not None:
        trace["base"] = _list(series.base)
    return trace


def _heat(matrix: Matrix, figure: Figure) -> dict[str, Any]:
    shown = np.log10(np.where(matrix.values > 0, matrix.values, np.nan)) if matrix.log else matrix.values
    bar: dict[str, Any] = {"title": {"text": matrix.title, "side": "right"}}
    if matrix.log:
        low, high = np.nanmin(shown), np.nanmax(shown)
        ticks = [float(tick) for tick in np.linspace(low, high, 5)]
        bar |= {"tickvals": ticks, "ticktext": [f"{10**tick:.3g}" for tick in ticks]}
    starts = matrix.y_edges[:-1]
    names = [f"{start:g}" for start in starts]
    if figure.y.addresses is not None:
        names = [f"{address:#x}" for address in figure.y.addresses.address(starts).tolist()]
    rows = [[name] * matrix.values.shape[1] for name in names]
    return {
        "type": "heatmap",
        "x": _list(matrix.x_edges),
        "y": _list(matrix.y_edges),
        "z": [_list(row) for row in shown],
        "customdata": [_list(row) for row in matrix.values],
        "text": rows,
        "colorscale": _GREYS,
        "colorbar": bar,
        "hovertemplate": f"%{{x:.4g}} {figure.x.unit}<br>%{{text}}<br>%{{customdata:.6g}} {matrix.unit}<extra></extra>",
        "hoverongaps": False,
    }


def _list(numbers: Values) -> list[float | None]:
    # NaN and infinity are no JSON.
    return [float(number) if finite else None for number, finite in zip(numbers, np.isfinite(numbers), strict=True)]


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("%{", "% {")
