"""The heat map and the hot set over it, against plain references."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.report.addresses import CHUNK, AddressMap
from fleet.report.figure import Absent, Figure, Matrix
from fleet.report.heat import MOST_COLUMNS, MOST_ROWS, bin_heat, heat_maps, outline, promoted_cells
from fleet.sweep.store import Cell
from proto.units import PAGE_SIZE

BASE = 0x7F00_0000_0000
MOVES = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 2), st.integers(0, 3), st.booleans()), max_size=80
)  # tenths of a second, chunk, page of the chunk (of four parts), up


def table(times: list[float], addresses: list[int], accesses: list[int]) -> pa.Table:
    return pa.table({"time_s": times, "address": addresses, "accesses": accesses})


@given(st.lists(st.tuples(st.integers(1, 2000), st.integers(0, 3000), st.integers(1, 1000)), min_size=1, max_size=50))
def test_no_access_is_lost(rows: list[tuple[int, int, int]]) -> None:
    addresses = np.array([BASE + chunk * CHUNK for _, chunk, _ in rows], np.int64)
    regions = AddressMap.of(addresses)
    heat = table([time / 10 for time, _, _ in rows], addresses.tolist(), [count for *_, count in rows])
    matrix, _ = bin_heat(heat, regions)
    height, width = matrix.values.shape
    assert height <= MOST_ROWS
    assert width <= MOST_COLUMNS
    assert (np.diff(matrix.x_edges) >= 0).all()
    assert len(matrix.x_edges) == width + 1
    counts = np.nan_to_num(matrix.values) * np.maximum(np.diff(matrix.x_edges), 1e-12)
    assert counts.sum() == pytest.approx(sum(count for *_, count in rows))


@given(MOVES)
def test_hot_set_is_what_was_promoted_and_not_demoted(moves: list[tuple[int, int, int, bool]]) -> None:
    moves = sorted(moves, key=lambda move: move[0])
    regions = AddressMap.of(np.arange(BASE, BASE + 3 * CHUNK, CHUNK))
    x_edges, quarter = np.arange(0.0, 1.1, 0.25), CHUNK // PAGE_SIZE // 4
    matrix = Matrix(x_edges, CHUNK * np.arange(4.0), np.ones((3, 4)), "", "")
    rows = [
        (time / 10, BASE + chunk * CHUNK + (part * quarter + page) * PAGE_SIZE, up)
        for time, chunk, part, up in moves
        for page in range(quarter)
    ]
    found = promoted_cells(
        np.array([row[0] for row in rows]), np.array([row[1] for row in rows], np.int64),
        np.array([row[2] for row in rows], bool), matrix, regions,
    )  # fmt: skip
    expected = np.zeros((3, 4), bool)
    for column, end in enumerate(x_edges[1:]):
        inside: set[tuple[int, int]] = set()
        for time, chunk, part, up in moves:
            if time / 10 <= end:
                (inside.add if up else inside.discard)((chunk, part))
        for chunk in range(3):
            expected[chunk, column] = sum(one == chunk for one, _ in inside) >= 2
    assert (found == expected).all()


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=5))
def test_outline_is_where_inside_meets_outside(cells: list[list[bool]]) -> None:
    inside = np.array(cells)
    rows, columns = inside.shape
    x, y = outline(inside, np.arange(columns + 1.0), np.arange(rows + 1.0))
    drawn = {tuple(side) for side in np.stack([x, y], 1).reshape(-1, 3, 2)[:, :2].reshape(-1, 4).tolist()}
    sides: list[tuple[float, ...]] = []
    for row in range(rows):
        for column in range(columns):
            if inside[row, column]:
                sides += [
                    (column, row, column + 1, row), (column, row + 1, column + 1, row + 1),
                    (column, row, column, row + 1), (column + 1, row, column + 1, row + 1),
                ]  # fmt: skip
    assert drawn == {side for side in sides if sides.count(side) == 1}


def test_maps_are_of_the_space_that_the_policy_works_in(tmp_path: Path) -> None:
    vms: list[dict[str, Any]] = [
        {"id": 0, "policy": "g-tpp", "workload": "gups", "agent_cpu": {"where": "guest"}},
        {"id": 1, "policy": "h-tpp", "workload": "gups", "agent_cpu": {"where": "host"}},
        {"id": 2, "policy": "none", "workload": "gups", "agent_cpu": {"where": "guest"}},
    ]
    cell = Cell("c", {}, 0, tmp_path, {"vms": vms}, "done")
    assert [type(one) for one in heat_maps([cell])] == [Absent]
    heat = {
        "vm": pa.array([0, 0, 1, 1, 2], pa.int32()),
        "time_s": [0.1, 0.2, 0.1, 0.1, 0.1],
        "space": ["gva", "gva", "gva", "gpa", "gva"],
        "address": [BASE, BASE + CHUNK, BASE, 0, BASE],
        "accesses": [5, 6, 7, 8, 9],
    }
    pq.write_table(pa.table(heat), tmp_path / "heat.parquet")
    first, second = heat_maps([cell])
    assert isinstance(first, Figure)
    assert isinstance(second, Figure)
    assert (first.key, second.key) == ("heat-1", "heat-2")
    assert first.matrix is not None
    assert second.matrix is not None
    assert first.matrix.values.shape == (2, 2)
    assert second.matrix.values.shape == (1, 1)
    assert second.y.title == "guest-physical address"
    assert "Of no cell" in first.note
