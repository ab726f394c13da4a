"""The heat map: where in its memory a VM is busy when, with the policy's hot set over it.

Drawn from ``heat.parquet`` (a row per VM, interval, address space and 2 MiB) in the space that the policy works in:
gVA, or gPA for a host's. A cell is in the hot set with half of its pages or more.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from fleet.report.addresses import CHUNK, AddressMap
from fleet.report.figure import NO_MARKER, Absent, Axis, Figure, Look, Matrix, Series, Values
from fleet.report.series_over_time import TIME
from fleet.report.subject import chosen_vms
from fleet.sweep.store import Cell
from proto.units import PAGE_SIZE

MOST_ROWS = 400
MOST_COLUMNS = 400


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
        matrix, inside, note = bin_heat(table, regions)
        own = vm.get("hotness", {}).get("hot_set") == "policy"
        what = "in the policy's hot set" if own else "in fast memory (the policy names no hot set)"
        series: tuple[Series, ...] = ()
        if inside.any():
            x, y = outline(inside, matrix.x_edges, matrix.y_edges)
            series = (Series(f"half of it {what}", x, y, Look(0, NO_MARKER, 0)),)
        else:
            note += f" Of no cell was half {what}."
        axis = Axis("gVA" if space == "gva" else "guest-physical address", "", addresses=regions)
        yield Figure(f"heat-{drawn}", f"Page heat: {label}", TIME, axis, series, note, matrix)
    if not drawn:
        yield Absent("Page heat", "no page heat was recorded (heat.parquet)")


def address_space(vm: Any) -> str:
    """``gva``, or ``gpa`` for a VM whose memory its host manages."""
    return "gpa" if vm.get("agent_cpu", {}).get("where") == "host" else "gva"


def bin_heat(table: pa.Table, regions: AddressMap) -> tuple[Matrix, npt.NDArray[np.bool_], str]:
    """The accesses of one VM in one space, on a grid of at most `MOST_ROWS` by `MOST_COLUMNS`, and a note.

    ``table``: columns time_s (end of an interval), address (of `CHUNK` bytes), accesses and hot_pages. The second is
    bool[rows, columns]: cells of which half of the pages are hot, on average over their intervals.
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
    hot_pages = table["hot_pages"].to_numpy(zero_copy_only=False).astype(np.float64)
    cells, hot = (np.bincount(cell, each, shape[0] * shape[1]).reshape(shape) for each in (accesses, hot_pages))
    x_edges = np.concatenate([[first], ends[per_column - 1 : -1 : per_column], ends[-1:]])
    y_edges = height * np.arange(shape[0] + 1, dtype=np.float64)
    # Cells of different length compare only per second.
    rate = cells / np.maximum(np.diff(x_edges), 1e-12)
    each = "each sampling interval" if per_column == 1 else f"{per_column} sampling intervals"
    note = f"Dark is busy. A cell is {height >> 20} MiB by {each}; holes between regions are left out."
    intervals = np.diff(np.append(np.arange(0, len(ends), per_column), len(ends)))
    inside = 2 * hot >= height // PAGE_SIZE * intervals
    matrix = Matrix(x_edges, y_edges, np.where(rate > 0, rate, np.nan), "accesses per cell", "1/s", log=True)
    return matrix, inside, note


def outline(inside: npt.NDArray[np.bool_], x_edges: Values, y_edges: Values) -> tuple[Values, Values]:
    """The border of the cells that are ``inside``, as one line with gaps (NaN): x and y, float64[3 * stretches]."""
    padded = np.pad(inside, 1)
    row, begin, end = _stretches(padded[1:, 1:-1] != padded[:-1, 1:-1])
    level = [(x_edges[begin], x_edges[end], y_edges[row], y_edges[row])]
    column, begin, end = _stretches((padded[1:-1, 1:] != padded[1:-1, :-1]).T)
    level.append((x_edges[column], x_edges[column], y_edges[begin], y_edges[end]))
    x = np.concatenate([np.stack([a, b, np.full(len(a), np.nan)], 1).ravel() for a, b, _, _ in level])
    y = np.concatenate([np.stack([c, d, np.full(len(c), np.nan)], 1).ravel() for _, _, c, d in level])
    return x, y


def _stretches(sides: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int64], ...]:
    """Runs of True in the rows of bool[m, n]: their row, where they begin, and where they end."""
    padded = np.pad(sides, ((0, 0), (1, 1)))
    row, begin = np.nonzero(padded[:, 1:-1] & ~padded[:, :-2])
    _, last = np.nonzero(padded[:, 1:-1] & ~padded[:, 2:])
    return row, begin, last + 1
