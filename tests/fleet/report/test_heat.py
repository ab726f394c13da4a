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
from fleet.report.figure import Absent, Figure
from fleet.report.heat import MOST_COLUMNS, MOST_ROWS, bin_heat, heat_maps, outline
from fleet.sweep.store import Cell
from proto.units import PAGE_SIZE

BASE = 0x7F00_0000_0000


def table(times: list[float], addresses: list[int], accesses: list[int], hot_pages: list[int]) -> pa.Table:
    return pa.table({"time_s": times, "address": addresses, "accesses": accesses, "hot_pages": hot_pages})


@given(st.lists(st.tuples(st.integers(1, 2000), st.integers(0, 3000), st.integers(1, 1000)), min_size=1, max_size=50))
def test_no_access_is_lost(rows: list[tuple[int, int, int]]) -> None:
    addresses = np.array([BASE + chunk * CHUNK for _, chunk, _ in rows], np.int64)
    regions = AddressMap.of(addresses)
    heat = table([time / 10 for time, _, _ in rows], addresses.tolist(), [count for *_, count in rows],
                 [0] * len(rows))  # fmt: skip
    matrix, inside, _ = bin_heat(heat, regions)
    assert not inside.any()
    height, width = matrix.values.shape
    assert height <= MOST_ROWS
    assert width <= MOST_COLUMNS
    assert (np.diff(matrix.x_edges) >= 0).all()
    assert len(matrix.x_edges) == width + 1
    counts = np.nan_to_num(matrix.values) * np.maximum(np.diff(matrix.x_edges), 1e-12)
    assert counts.sum() == pytest.approx(sum(count for *_, count in rows))


@given(st.dictionaries(st.tuples(st.integers(0, 999), st.integers(0, 4)), st.integers(0, CHUNK // PAGE_SIZE)))
def test_a_cell_is_hot_with_half_of_its_pages_on_average(hot: dict[tuple[int, int], int]) -> None:
    """Of 1000 intervals and five chunks; each interval has a row, so that none is missing."""
    seen = {(interval, 0): 0 for interval in range(1000)} | {(0, chunk): 0 for chunk in range(5)} | hot
    addresses = [BASE + chunk * CHUNK for _, chunk in seen]
    regions = AddressMap.of(np.array(addresses, np.int64))
    heat = table([interval / 10 for interval, _ in seen], addresses, [1] * len(seen), list(seen.values()))
    _, inside, _ = bin_heat(heat, regions)
    expected = np.zeros((5, 1000))
    for (interval, chunk), pages in seen.items():
        expected[chunk, interval] = pages
    assert inside.shape == (5, 334)
    for column in range(inside.shape[1]):
        mean = expected[:, 3 * column : 3 * column + 3].mean(axis=1)
        assert inside[:, column].tolist() == (2 * mean >= CHUNK // PAGE_SIZE).tolist()


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=5))
def test_outline_is_where_inside_meets_outside(cells: list[list[bool]]) -> None:
    inside = np.array(cells)
    rows, columns = inside.shape
    x, y = outline(inside, np.arange(columns + 1.0), np.arange(rows + 1.0))
    drawn = set()
    for x0, x1, y0, y1 in np.stack([x, y], 1).reshape(-1, 3, 2)[:, :2].transpose(0, 2, 1).reshape(-1, 4).tolist():
        for step in range(int(max(x1 - x0, y1 - y0))):
            across, up = (step, 0) if x1 > x0 else (0, step)
            side = (x0 + across, y0 + up, x0 + across + (x1 > x0), y0 + up + (y1 > y0))
            assert side not in drawn
            drawn.add(side)
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
        {
            "id": 0,
            "policy": "g-tpp",
            "workload": "gups",
            "agent_cpu": {"where": "guest"},
            "hotness": {"hot_set": "policy"},
        },
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
        "hot_pages": [0, 0, 0, 256, 0],
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
    assert "Of no cell was half in the policy's hot set" in first.note
    assert [series.name for series in second.series] == ["half of it in fast memory (the policy names no hot set)"]
