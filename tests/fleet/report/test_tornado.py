"""The tornado of sensitivity.json."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fleet.errors import OutputError
from fleet.report.content import read
from fleet.report.figure import Absent, Figure
from fleet.report.terminal import print_report
from fleet.report.tornado import tornadoes
from fleet.report.write import write


def row(cost: str, at_low: float | None, at_high: float | None, metric: str = "throughput") -> dict[str, Any]:
    return {
        "cost": cost, "unit": "ns", "low": 1, "default": 2, "high": 3, "metric": metric, "at_low": at_low,
        "at_default": 10.0, "at_high": at_high, "grade": "estimated", "source": "a guess",
        "failed": None in (at_low, at_high),
    }  # fmt: skip


def test_widest_is_on_top_and_what_moves_nothing_is_counted(tmp_path: Path) -> None:
    rows = [row("small", 9.5, 10.5), row("still", 10.0, 10.0), row("lost", None, 12.0), row("wide", 5.0, 11.0)]
    (tmp_path / "sensitivity.json").write_text(json.dumps(rows))
    (figure,) = tornadoes(tmp_path)
    assert isinstance(figure, Figure)
    assert [label.split()[0] for label in figure.x.categories] == ["wide", "lost", "small"]
    assert figure.series[0].y.tolist()[0] == 5.0
    assert figure.series[1].base is not None
    assert figure.series[1].base.tolist() == [10.0] * 3
    assert "1 of 4 costs do not move it" in figure.note
    assert "Failed at an end of its range: lost" in figure.note
    assert figure.y.limits is not None
    low, high = figure.y.limits
    assert (low < 5.0, high > 12.0) == (True, True)


def test_a_figure_for_each_metric(tmp_path: Path) -> None:
    rows = [row("a", 9.0, 11.0), row("a", 10.0, 10.0, "flushes"), row("b", 8.0, 10.0, "time")]
    (tmp_path / "sensitivity.json").write_text(json.dumps(rows))
    first, second, third = tornadoes(tmp_path)
    assert isinstance(second, Absent)
    assert isinstance(first, Figure)
    assert isinstance(third, Figure)
    assert (first.key, third.key) == ("tornado", "tornado-3")


def test_an_analysis_by_itself_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "sensitivity.json").write_text(json.dumps([row("small", 9.5, 10.5), row("wide", None, 11.0)]))
    report = read(tmp_path)
    assert [figure.key for figure in report.gallery.figures] == ["tornado"]
    (table,) = report.tables
    assert [line[1] for line in table.rows] == ["small", "wide"]
    write(report)
    console = Console(file=io.StringIO(), width=200)
    print_report(report, tmp_path / "report.html", console)
    assert "wide" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "Sensitivity of throughput" in (tmp_path / "report.html").read_text()


def test_absent_and_malformed(tmp_path: Path) -> None:
    (absent,) = tornadoes(tmp_path)
    assert isinstance(absent, Absent)
    for text in ("{", '{"a": 1}', '[{"cost": "a"}]', "[3]", json.dumps([row("a", 1.0, 2.0) | {"at_default": None}])):
        (tmp_path / "sensitivity.json").write_text(text)
        with pytest.raises(OutputError, match=r"sensitivity\.json: not a list of varied costs"):
            tornadoes(tmp_path)
