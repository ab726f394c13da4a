"""The heat map: where in its memory a VM is busy when, with the policy's hot set over it.

Drawn from ``heat.parquet`` (a row per VM, interval, address space and 2 MiB that was accessed) in the space that the
policy works in: gVA, or gPA for a host's. The hot set is the policy's as it acts: where pages lie that it promoted and
has not demoted since, by the events; a cell is in it with half of its pages or more. Pages that were in the fast tier
from the start are not.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fleet.report.addresses import CHUNK, Addresses, AddressMap
from fleet.report.figure import NO_MARKER, Absent, Axis, Figure, Look, Matrix, Series, Values
from fleet.report.series_over_time import TIME
from fleet.report.subject import chosen_vms
from fleet.sweep.store import Cell
from proto.units import PAGE_SIZE

MOST_ROWS = 400
MOST_COLUMNS = 400
_PROMOTED = ("promote",)
_DEMOTED = ("demote",)


def heat_maps(cells: Sequence[Cell]) -> Iterator[Figure | Absent]:
    """A map for each VM of `chosen_vms` whose heat was recorded."""
    drawn = 0
    for cell, vm, label in chosen_vms(cells):
        path = cell.path / "heat.parquet"
        if not path.is_file():
            continue
        space = address_space(vm)
        table = pq.read_table(path, filters=[("vm", "=", vm["id"]), ("space", "=", space)])
        if not table.num_rows:
            continue
        drawn += 1
        regions = AddressMap.of(table["address"].to_numpy().astype(np.int64))
        matrix, note = bin_heat(table, regions)
        inside = _hot_set(cell.path / "events.parquet", vm["id"], matrix, regions)
        series: tuple[Series, ...] = ()
        if inside.any():
            x, y = outline(inside, matrix.x_edges, matrix.y_edges)
            series = (Series("half of it promoted by the policy, and not demoted since", x, y, Look(0, NO_MARKER, 0)),)
        else:
            note += " Of no cell did the policy promote half of the pages."
        axis = Axis("gVA" if space == "gva" else "guest-physical address", "", addresses=regions)
        yield Figure(f"heat-{drawn}", f"Page heat: {label}", TIME, axis, series, note, matrix)
    if not drawn:
        yield Absent("Page heat", "no page heat was recorded (heat.parquet)")


def address_space(vm: Any) -> str:
    """``gva``, or ``gpa`` for a VM whose memory its host manages."""
    return "gpa" if vm.get("agent_cpu", {}).get("where") == "host" else "gva"


def bin_heat(table: pa.Table, regions: AddressMap) -> tuple[Matrix, str]:
    """The accesses of one VM in one space, on a grid of at most `MOST_ROWS` by `MOST_COLUMNS`; and a note.

    ``table``: columns time_s (end of an interval), address (of `CHUNK` bytes) and accesses.
    """
    time_s = table["time_s"].to_numpy(zero_copy_only=False).astype(np.float64)
    place = regions.place(table["address"].to_numpy(zero_copy_only=False).astype(np.int64))
    accesses = table["accesses"].to_numpy(zero_copy_only=False).astype(np.float64)
    ends, column = np.unique(time_s, return_inverse=True)
    first = max(0.0, 2 * ends[0] - ends[1]) if len(ends) > 1 else 0.0
    per_row, per_column = -(-regions.size // CHUNK // MOST_ROWS), -(-len(ends) // MOST_COLUMNS)
    height = per_row * CHUNK
    shape = (-(-regions.size // height), -(-len(ends) // per_column))
    cell = (place // height).astype(np.int64) * shape[1] + column // per_column
    cells = np.bincount(cell, accesses, shape[0] * shape[1]).reshape(shape)
    x_edges = np.concatenate([[first], ends[per_column - 1 : -1 : per_column], ends[-1:]])
    y_edges = height * np.arange(shape[0] + 1, dtype=np.float64)
    # Cells of different length compare only per second.
    rate = cells / np.maximum(np.diff(x_edges), 1e-12)
    each = "each sampling interval" if per_column == 1 else f"{per_column} sampling intervals"
    note = f"Dark is busy. A cell is {height >> 20} MiB by {each}; holes between regions are left out."
    return Matrix(x_edges, y_edges, np.where(rate > 0, rate, np.nan), "accesses per cell", "1/s", log=True), note


def _hot_set(path: Path, vm: int, matrix: Matrix, regions: AddressMap) -> npt.NDArray[np.bool_]:
    """bool[rows, columns]: cells of which, at the end of the interval, half of the pages are promoted."""
    shape = matrix.values.shape
    if not path.is_file():
        return np.zeros(shape, bool)
    table = pq.read_table(path, filters=[("vm", "=", vm)], columns=["time_s", "kind", "gva"])
    kind = table["kind"].cast(pa.string())
    moved = pc.or_(pc.is_in(kind, pa.array(_PROMOTED)), pc.is_in(kind, pa.array(_DEMOTED)))
    table = table.filter(moved)
    up = np.isin(table["kind"].cast(pa.string()).to_numpy(zero_copy_only=False).astype(str), _PROMOTED)
    return promoted_cells(
        table["time_s"].to_numpy().astype(np.float64), table["gva"].to_numpy().astype(np.int64), up, matrix, regions
    )


def promoted_cells(
    time_s: Values, address: Addresses, up: npt.NDArray[np.bool_], matrix: Matrix, regions: AddressMap
) -> npt.NDArray[np.bool_]:
    """The same, bool[rows, columns], from moves: a page counts from its promotion (``up``) to its next demotion."""
    rows, columns = matrix.values.shape
    row = np.searchsorted(matrix.y_edges, regions.place(address), "right") - 1
    column = np.searchsorted(matrix.x_edges[1:], time_s, "left")
    # Only a move after which the page's side differs from the one before counts; a page starts as not promoted.
    order = np.lexsort((np.arange(len(time_s)), time_s, address))
    page, side = address[order], up[order]
    first = np.ones(len(page), bool)
    first[1:] = page[1:] != page[:-1]
    before = np.where(first, False, np.roll(side, 1))
    change = (side.astype(np.int64) - before.astype(np.int64))[np.argsort(order, kind="stable")]
    inside = (row >= 0) & (row < rows) & (column < columns)
    grid = np.zeros((rows, columns), np.int64)
    np.add.at(grid, (row[inside], column[inside]), change[inside])
    pages = int(matrix.y_edges[1] - matrix.y_edges[0]) // PAGE_SIZE
    return 2 * np.cumsum(grid, axis=1) >= pages


def outline(inside: npt.NDArray[np.bool_], x_edges: Values, y_edges: Values) -> tuple[Values, Values]:
    """The border of the cells that are ``inside``, as one line with gaps (NaN): x and y, float64[3 * sides]."""
    padded = np.pad(inside, 1)
    row, column = np.nonzero(padded[1:, 1:-1] != padded[:-1, 1:-1])
    level = [(x_edges[column], x_edges[column + 1], y_edges[row], y_edges[row])]
    row, column = np.nonzero(padded[1:-1, 1:] != padded[1:-1, :-1])
    level.append((x_edges[column], x_edges[column], y_edges[row], y_edges[row + 1]))
    x = np.concatenate([np.stack([a, b, np.full(len(a), np.nan)], 1).ravel() for a, b, _, _ in level])
    y = np.concatenate([np.stack([c, d, np.full(len(c), np.nan)], 1).ravel() for _, _, c, d in level])
    return x, y
