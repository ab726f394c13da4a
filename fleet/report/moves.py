"""The move trace: which page went where, when (events.parquet)."""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fleet.report.cells import Cell
from fleet.report.figure import Absent, Axis, Figure, Look, Series
from fleet.report.series_over_time import TIME, typical
from fleet.report.subject import cell_label, is_run, vm_label

MOST_FIGURES = 4
"""Traces of more VMs or cells than this are in their own reports."""
_MOVES = ("promote", "demote", "exchange", "split")
_LOOKS = (Look(marker=2, colour=0), Look(marker=3, colour=1), Look(marker=5, colour=2), Look(marker=4, colour=3))


def move_traces(cells: Sequence[Cell]) -> Iterator[Figure | Absent]:
    """A figure for each kind of VM of a run, or for the first VM of a sweep's typical cells, that moved anything."""
    title = "Move trace"
    run = is_run(cells)
    drawn = 0
    for cell in cells if run else typical(cells):
        path = cell.path / "events.parquet"
        if cell.summary is None or not path.is_file():
            continue
        kinds: set[tuple[str, str]] = set()
        for vm in cell.summary["vms"] if run else cell.summary["vms"][:1]:
            kind = (vm["policy"], vm["workload"])
            if kind in kinds or drawn == MOST_FIGURES:
                continue
            label = vm_label(vm) if run else f"{cell_label(cell)}, vm{vm['id']}"
            series = _series(path, vm["id"])
            if series:
                kinds.add(kind)
                drawn += 1
                yield Figure(
                    f"moves-{drawn}", f"{title}: {label}", TIME, Axis(_address(vm), "bytes", hexadecimal=True),
                    tuple(series), "Every page that was moved; up: to the fast tier.",
                )  # fmt: skip
    if not drawn:
        yield Absent(title, "no page was moved (events.parquet)")


def _address(vm: dict[str, object]) -> str:
    agent = vm.get("agent_cpu")
    where = agent.get("where") if isinstance(agent, dict) else None
    return "guest-physical address of the page" if where == "host" else "gVA of the page"


def _series(path: object, vm: int) -> list[Series]:
    table = pq.read_table(path, filters=[("vm", "=", vm)], columns=["time_s", "kind", "gva"])
    kinds = table["kind"].cast("string")
    found = []
    for kind, look in zip(_MOVES, _LOOKS, strict=True):
        part = table.filter(pc.equal(kinds, kind))
        if part.num_rows:
            time_s = part["time_s"].to_numpy().astype(np.float64)
            found.append(Series(kind, time_s, part["gva"].to_numpy().astype(np.float64), look, "points"))
    return found
