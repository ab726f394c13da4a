"""The compact form on the terminal: the results' table, sparklines of the series over time, where the rest is."""

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from fleet.figure import sparkline
from fleet.report.content import Report
from fleet.report.figure import Figure
from fleet.report.subject import is_run
from fleet.report.table import Table, shown
from fleet.table import print_summary

_SPARKS = 40
_NAMES = 34


def print_report(report: Report, page: Path, console: Console) -> None:
    """Print it; plain where the console is no terminal."""
    console.print(Text(report.title, style="bold"))
    run = report.cells[0].summary if is_run(report.cells) else None
    if run is not None:
        print_summary(run, console)
    else:
        for table in report.tables:
            if table.key in ("results", "errors", "sensitivity"):
                _print_table(table, console)
    for figure in report.gallery.figures:
        if figure.key in ("fast-share", "throughput"):
            _sparklines(figure, console)
    for absent in report.gallery.absent:
        console.print(Text(f"left out: {absent.title}: {absent.why}", style="dim"), soft_wrap=True)
    console.print(Text(f"report:   {page}"), soft_wrap=True)
    console.print(Text(f"figures:  {page.with_suffix('')}/*.svg, *.png, *.csv"), soft_wrap=True)


def _print_table(table: Table, console: Console) -> None:
    drawn = RichTable(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for place, column in enumerate(table.columns):
        number = any(isinstance(row[place], int | float) for row in table.rows)
        drawn.add_column(column.title, justify="right" if number else "left", overflow="fold")
    for row in table.rows:
        drawn.add_row(*(Text(shown(value)) for value in row))
    console.print(drawn)


def _sparklines(figure: Figure, console: Console) -> None:
    ascii_only = not (console.encoding or "").lower().startswith("utf")
    console.print(Text(f"{figure.title} ({figure.y.unit})"))
    drawn = [series for series in figure.series if series.shown and not series.name.startswith("oracle")]
    top = figure.y.limits[1] if figure.y.limits else max((np.nanmax(s.y) for s in drawn if len(s.y)), default=1.0)
    for series in drawn:
        numbers = series.y[~np.isnan(series.y)].tolist()
        if numbers:
            line = sparkline(numbers, _SPARKS, 0.0, float(top), ascii_only)
            text = f"  {series.name:<{_NAMES}.{_NAMES}} {numbers[0]:8.4g} {line} {numbers[-1]:8.4g}"
            console.print(Text(text), soft_wrap=True)
