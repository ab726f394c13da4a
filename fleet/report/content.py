"""What a report says about a directory: its tables and figures, in their order."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleet.errors import OutputError
from fleet.report import counters, cpu, series_over_time, tornado
from fleet.report.figure import Gallery
from fleet.report.heat import heat_maps
from fleet.report.moves import move_traces
from fleet.report.parameters import parameters_table
from fleet.report.provenance_table import errors_table, provenance_table
from fleet.report.results_table import cells_table, results_table
from fleet.report.subject import is_run, subjects
from fleet.report.table import Table
from fleet.sweep.store import CELLS, PLAN, Cell, load


@dataclass(frozen=True)
class Report:
    """All of it, as data."""

    directory: Path
    title: str
    cells: list[Cell]
    """Empty for a sensitivity analysis."""
    tables: list[Table]
    gallery: Gallery

    def plain(self) -> dict[str, Any]:
        """What ``--json`` prints: the tables' data, the figures' names, and why others are not there."""
        return {
            "directory": str(self.directory),
            "title": self.title,
            "tables": {table.key: table.plain() for table in self.tables},
            "figures": [{"key": one.key, "title": one.title, "note": one.note} for one in self.gallery.figures],
            "absent": [{"title": one.title, "why": one.why} for one in self.gallery.absent],
        }


def read(directory: Path) -> Report:
    """The report of the directory of a run, a sweep or a sensitivity analysis. Raises OutputError."""
    varied = tornado.sensitivity_table(directory)
    if varied is not None and not any((directory / name).exists() for name in ("spec.toml", PLAN, CELLS)):
        return _sensitivity(directory, varied)
    cells = load(directory)
    if not any(cell.summary is not None for cell in cells):
        raise OutputError(f"{directory} holds no finished run yet (no summary.json); let it finish, then report")
    found = subjects(cells)
    tables = [results_table(cells, found), errors_table(cells), varied]
    tables += [None if is_run(cells) else cells_table(cells), parameters_table(cells), provenance_table(cells)]
    lines, note = series_over_time.tracks(cells)
    gallery = Gallery()
    gallery.add(cpu.cores_by_vms(found), cpu.by_stage(found))
    gallery.add(series_over_time.throughput(lines, note), series_over_time.fast_share(lines, note))
    gallery.add(series_over_time.accuracy(lines, note), *heat_maps(cells))
    gallery.add(counters.flushes(found), counters.latency(found), counters.occupancy(found))
    gallery.add(*move_traces(cells), *tornado.tornadoes(directory))
    there = [table for table in tables if table is not None]
    return Report(directory, _title(directory, cells), cells, there, gallery)


def _sensitivity(directory: Path, varied: Table) -> Report:
    """An analysis by itself: its runs are means to it, and no results of their own."""
    gallery = Gallery()
    gallery.add(*tornado.tornadoes(directory))
    return Report(directory, f"Sensitivity analysis {directory.resolve().name}", [], [varied], gallery)


def _title(directory: Path, cells: list[Cell]) -> str:
    if is_run(cells):
        return f"Run {(cells[0].summary or {})['run']['name']}"
    done = sum(cell.status == "done" for cell in cells)
    plan = directory / PLAN
    name = json.loads(plan.read_text("utf-8"))["name"] if plan.is_file() else directory.resolve().name
    return f"Sweep {name}: {done} of {len(cells)} cells"
