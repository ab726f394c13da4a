"""Writes a report beside the results: ``report.html``, and each figure as SVG, PNG and CSV in ``report/``."""

import shutil
from pathlib import Path

from fleet.atomic import write_atomic
from fleet.errors import OutputError
from fleet.report.content import Report
from fleet.report.csv_file import write_csv
from fleet.report.drawing import draw
from fleet.report.page import page
from fleet.report.thinning import thinned

PAGE = "report.html"
FOLDER = "report"


def write(report: Report) -> Path:
    """Write everything anew; the path of the page. Raises OutputError if the disk does not take it."""
    target, folder = report.directory / PAGE, report.directory / FOLDER
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        for number, figure in enumerate(report.gallery.figures):
            write_csv(figure, folder / f"{figure.key}.csv")
            report.gallery.figures[number] = thinned(figure)
            draw(report.gallery.figures[number], folder)
        write_atomic(target, page(report))
    except OSError as error:
        raise OutputError(f"cannot write the report to {report.directory}: {error.strerror}") from error
    return target
