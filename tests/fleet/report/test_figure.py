"""One figure, three back ends: plotly gets what is plotly's, CSV has every number, pictures are repeatable."""

import json
from pathlib import Path

import numpy as np
import plotly.graph_objects as go  # type: ignore[import-untyped]
import pyarrow.csv as pa_csv
import pytest
from PIL import Image

from fleet.report.addresses import CHUNK, AddressMap
from fleet.report.csv_file import write_csv
from fleet.report.drawing import draw
from fleet.report.figure import NO_MARKER, Axis, Figure, Look, Matrix, Series, positions, values
from fleet.report.interactive import plotly_figure

TIME, RATE = Axis("time", "s"), Axis("rate", "1/s")


def lines() -> Figure:
    x = np.arange(4.0)
    return Figure(
        "lines", "Lines <b>", TIME, RATE,
        (
            Series("a", x, np.array([1.0, np.nan, 3.0, 2.0]), Look.number(0)),
            Series("b", x, x + 1, Look.number(1), low=x, high=x + 2),
            Series("c", x, x * 2, Look(2, NO_MARKER, 2), shown=False),
        ),
    )  # fmt: skip


def bars(horizontal: bool) -> Figure:
    three = positions(3)
    series = tuple(
        Series(f"{stage} ({kind})", three, values([1.0, None, 2.0]), Look(hatch=number, colour=edge), "bar", stack=kind)
        for edge, kind in enumerate(("measured", "modelled"))
        for number, stage in enumerate(("track", "move"))
    )
    return Figure(
        "bars", "Bars", Axis("", "", categories=("x", "y", "z")), Axis("CPU", "s"), series, horizontal=horizontal
    )


def floating() -> Figure:
    series = Series("low", positions(2), values([1.0, 9.0]), Look(), "bar", base=values([5.0, 5.0]))
    return Figure(
        "floating", "F", Axis("", "", categories=("x", "y")), Axis("m", "", limits=(0, 10)), (series,), horizontal=True
    )


def heat() -> Figure:
    regions = AddressMap.of(np.array([0, 1000 * CHUNK], np.int64))
    matrix = Matrix(np.arange(3.0), CHUNK * np.arange(3.0), np.array([[1.0, np.nan], [100.0, 5.0]]), "n", "1", log=True)
    border = Series("hot", np.array([0.0, 1.0, np.nan]), np.array([CHUNK, CHUNK, np.nan]), Look(0, NO_MARKER))
    return Figure("heat", "Heat", TIME, Axis("gVA", "", addresses=regions), (border,), matrix=matrix)


def logarithmic() -> Figure:
    points = Series("p99", positions(2), np.array([20.0, 3000.0]), Look(), "points")
    return Figure("log", "Log", Axis("", "", categories=("x", "y")), Axis("latency", "ns", log=True), (points,))


EVERY = [lines(), bars(False), bars(True), floating(), heat(), logarithmic()]


@pytest.mark.parametrize("figure", EVERY, ids=lambda figure: f"{figure.key}-{figure.horizontal}")
def test_every_kind_is_rendered_by_all(figure: Figure, tmp_path: Path) -> None:
    plain = json.loads(json.dumps(plotly_figure(figure), allow_nan=False))
    checked = go.Figure(plain)  # raises for what plotly does not know
    assert len(checked.data) == len(figure.series) + (figure.matrix is not None)
    titles = {checked.layout.xaxis.title.text or "", checked.layout.yaxis.title.text or ""}
    assert titles == {figure.x.title, figure.y.title}
    draw(figure, tmp_path)
    svg = (tmp_path / f"{figure.key}.svg").read_text()
    assert figure.y.title in svg
    with Image.open(tmp_path / f"{figure.key}.png") as image:
        grey = np.asarray(image.convert("L"))
    assert (grey.min() < 64, grey.max() > 250) == (True, True)
    draw(figure, tmp_path)
    assert (tmp_path / f"{figure.key}.svg").read_text() == svg
    write_csv(figure, tmp_path / "f.csv")
    rows = sum(len(series.x) for series in figure.series)
    assert pa_csv.read_csv(tmp_path / "f.csv").num_rows == (
        rows if figure.matrix is None else figure.matrix.values.size
    )


def test_csv_of_lines(tmp_path: Path) -> None:
    write_csv(lines(), tmp_path / "f.csv")
    table = pa_csv.read_csv(tmp_path / "f.csv").to_pydict()
    assert list(table) == ["series", "time (s)", "rate (1/s)", "low", "high"]
    assert table["series"] == ["a"] * 4 + ["b"] * 4 + ["c"] * 4
    assert table["rate (1/s)"][:6] == [1.0, None, 3.0, 2.0, 1.0, 2.0]
    assert table["high"] == [None] * 4 + [2.0, 3.0, 4.0, 5.0] + [None] * 4


def test_csv_names_categories_and_addresses(tmp_path: Path) -> None:
    write_csv(bars(False), tmp_path / "f.csv")
    assert pa_csv.read_csv(tmp_path / "f.csv")["what"].to_pylist() == ["x", "y", "z"] * 4
    write_csv(heat(), tmp_path / "f.csv")
    table = pa_csv.read_csv(tmp_path / "f.csv").to_pydict()
    assert table["gVA from"] == [0, 0, 1000 * CHUNK, 1000 * CHUNK]
    assert table["gVA up to"] == [CHUNK, CHUNK, 1001 * CHUNK, 1001 * CHUNK]
    assert table["n (1)"] == [1.0, None, 100.0, 5.0]


def test_looks_differ_without_colour() -> None:
    marks = plotly_figure(lines())["data"]
    assert len({(one["line"]["dash"], one.get("marker", {}).get("symbol")) for one in marks}) == 3
    stages = plotly_figure(bars(False))["data"]
    assert len({(one["marker"]["pattern"]["shape"], one["marker"]["color"]) for one in stages}) == 2
    assert marks[2]["visible"] == "legendonly"
