"""fleet.sweep.results: rows, columns and digest, from cells that were made up."""

from pathlib import Path
from typing import Any

from fleet.sweep.results import numbers, overview, rows, sweep_digest, table
from fleet.sweep.store import Cell, Status


def cell(number: int, axes: dict[str, object], status: Status = "done", **vm: Any) -> Cell:
    summary = {
        "run": {"seed": 5, "version": "0", "commit": f"c{number}"},
        "digest": f"sha256:{number}",
        "elapsed": {"virtual_s": 1.5, "wall_s": 2.0},
        "vms": [{"id": n, "policy": "none", "workload": "gups", "outcome": "ok", "vcpus": 2} | vm for n in range(2)],
        "host": {"cpu": {"by_vm": [{"id": n, "measured_s": 0.5 + n} for n in range(2)]}, "tiers": [{"used": 7}]},
    }
    return Cell(f"{number:016x}", axes, 0, Path("nowhere"), None if status == "missing" else summary, status)


def test_a_row_per_vm_with_axes_figures_and_the_run() -> None:
    found = rows([cell(1, {"vms": 2, "policy.x": "1ms"}, access={"total": 9, "deep": {"er": 1.5}}, flag=True)])
    assert [row["vm"] for row in found] == [0, 1]
    assert found[1] == {
        "cell": f"{1:016x}", "repetition": 0, "seed": 5, "vms": 2, "policy.x": "1ms", "vm": 1, "policy": "none",
        "workload": "gups", "outcome": "ok", "vcpus": 2, "access.total": 9, "access.deep.er": 1.5,
        "host.cpu.by_vm.measured_s": 1.5, "elapsed.virtual_s": 1.5, "elapsed.wall_s": 2.0, "host.tiers.0.used": 7,
    }  # fmt: skip


def test_a_figure_whose_name_is_an_axis_steps_aside() -> None:
    (row, _) = rows([cell(1, {"vcpus": "2", "policy": "g-tpp"})])
    assert (row["vcpus"], row["vm.vcpus"], row["policy"], row["vm.policy"]) == ("2", 2, "g-tpp", "none")


def test_columns_of_mixed_values_are_text_and_absent_ones_null() -> None:
    cells = [cell(1, {"a": 1, "b": 1}, x=1), cell(2, {"a": 0.5, "b": "2GiB"}, y=2)]
    made = table(cells).to_pydict()
    assert (made["a"], made["b"]) == ([1.0, 1.0, 0.5, 0.5], ["1", "1", "2GiB", "2GiB"])
    assert (made["x"], made["y"]) == ([1, 1, None, None], [None, None, 2, 2])
    assert table([]).num_rows == 0


def test_only_done_cells_have_rows_and_the_rest_is_named() -> None:
    cells = [cell(1, {"a": 1}), cell(2, {"a": 2}, "failed"), cell(3, {"a": 2}, "missing")]
    assert {row["cell"] for row in rows(cells)} == {cells[0].hash}
    whole = overview("s", cells)
    assert whole["counts"] == {"done": 1, "failed": 1, "missing": 1}
    assert whole["axes"] == {"a": [1, 2]}
    assert [failure["cell"] for failure in whole["failures"]] == [cells[1].hash]
    assert [entry["commit"] for entry in whole["made_by"]] == ["c1", "c2"]


def test_the_digest_is_of_what_is_deterministic() -> None:
    cells = [cell(1, {"a": 1}), cell(2, {"a": 2})]
    slower = [
        one._replace(summary={**(one.summary or {}), "elapsed": {"virtual_s": 1.5, "wall_s": 9.0}}) for one in cells
    ]
    assert sweep_digest(cells) == sweep_digest(slower)
    assert sweep_digest(cells) != sweep_digest(cells[::-1])
    assert sweep_digest(cells) != sweep_digest([cells[0], cell(2, {"a": 2}, "missing")])
    assert sweep_digest(cells) != sweep_digest([cells[0], cell(2, {"a": 2}, "failed")])


def test_numbers_are_found_by_path() -> None:
    assert dict(numbers({"a": {"b": 1, "c": "text"}, "d": [1, 2], "e": False})) == {"a.b": 1}
