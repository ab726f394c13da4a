"""Sums, means and their ranges over VMs and repetitions; labels; which cells stand for the others."""

from pathlib import Path
from typing import Any

import pytest

from fleet.report.cpu import cores_by_vms
from fleet.report.figure import Figure
from fleet.report.subject import Spread, axes_label, cell_label, chosen_vms, subjects, typical
from fleet.sweep.store import Cell, Status


def vm(number: int, policy: str, cores: float | None) -> dict[str, Any]:
    agent = {} if cores is None else {"agent_cpu": {"measured_cores": cores}}
    return {"id": number, "policy": policy, "workload": "gups"} | agent


def cell(
    root: Path, axes: dict[str, object], cores: list[float | None], repetition: int = 0, status: Status = "done"
) -> Cell:
    folder = root / f"{axes} {repetition}"
    folder.mkdir()
    (folder / "cell.json").write_text("{}")
    vms = [vm(number, str(axes.get("policy", "g-tpp")), one) for number, one in enumerate(cores)]
    return Cell(folder.name, axes, repetition, folder, {"vms": vms}, status)


def test_repetitions_of_a_point_are_one_subject(tmp_path: Path) -> None:
    axes: dict[str, object] = {"vms": 2, "policy": "h-tpp"}
    cells = [cell(tmp_path, axes, [1.0, 2.0]), cell(tmp_path, axes, [3.0, 4.0], 1)]
    (subject,) = subjects([*cells, cell(tmp_path, {"vms": 3}, [9.0], status="failed")])
    assert subject.label == "2 VMs h-tpp"
    assert subject.total("agent_cpu.measured_cores") == Spread(5.0, 3.0, 7.0)
    assert subject.mean("agent_cpu.measured_cores") == Spread(2.5, 1.5, 3.5)
    assert subject.total("agent_cpu.modelled_cores") is None
    assert cell_label(cells[1]) == "2 VMs h-tpp #2"


def test_a_vm_without_a_figure_counts_for_nothing(tmp_path: Path) -> None:
    (subject,) = subjects([cell(tmp_path, {"vms": 2}, [1.0, None])])
    assert subject.mean("agent_cpu.measured_cores") == Spread(1.0, 1.0, 1.0)


def test_a_run_is_its_vms(tmp_path: Path) -> None:
    run = Cell("r", {}, 0, tmp_path, {"vms": [vm(0, "g-tpp", 1.0), vm(1, "h-tpp", 2.0)]}, "done")
    assert [subject.label for subject in subjects([run])] == ["vm0 g-tpp gups", "vm1 h-tpp gups"]


@pytest.mark.parametrize(
    ("axes", "label"),
    [
        ({"vms": 1, "policy": "g-tpp"}, "1 VM g-tpp"),
        ({"policy": "none", "set.policy.scan_size_mb": 64}, "none scan_size_mb=64"),
        ({}, "all"),
    ],
)
def test_labels(axes: dict[str, object], label: str) -> None:
    assert axes_label(axes) == label


def test_the_largest_cell_of_each_policy_is_typical(tmp_path: Path) -> None:
    cells = [
        cell(tmp_path, {"vms": vms, "policy": policy}, [1.0] * vms) for vms in (1, 3, 2) for policy in ("none", "h-tpp")
    ]
    cells.append(cell(tmp_path, {"vms": 4, "policy": "h-tpp"}, [1.0] * 4, status="failed"))
    assert [cell_label(one) for one in typical(cells)] == ["3 VMs none", "3 VMs h-tpp"]
    # A VM without a policy moves nothing and has no hot set.
    assert [label for *_, label in chosen_vms(cells)] == ["3 VMs h-tpp, vm0"]


def test_an_axis_that_is_zipped_with_the_number_of_vms_is_no_line_of_its_own(tmp_path: Path) -> None:
    cells = [
        cell(tmp_path, {"vms": vms, "memory": f"{12 // vms}GiB", "policy": policy, "seed": seed}, [0.5] * vms)
        for vms in (1, 2, 3) for policy in ("g-tpp", "h-tpp") for seed in (1, 2)
    ]  # fmt: skip
    figure = cores_by_vms(subjects(cells))
    assert isinstance(figure, Figure)
    assert [series.name for series in figure.series] == [
        f"{policy} seed={seed} (measured)" for policy in ("g-tpp", "h-tpp") for seed in (1, 2)
    ]
    assert subjects(cells)[0].label == "1 VM g-tpp seed=1"
    assert all(series.x.tolist() == [1, 2, 3] and series.y.tolist() == [0.5, 1, 1.5] for series in figure.series)
