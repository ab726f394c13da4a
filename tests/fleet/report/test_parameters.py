"""Every parameter is in the table, with where it comes from."""

from dataclasses import replace
from pathlib import Path

import pytest

from fleet import hosts
from fleet.errors import OutputError
from fleet.experiment import Experiment
from fleet.report.parameters import Parameter, parameters_table
from fleet.spec import load
from fleet.spec_params import ENGINE_PARAMS, GUEST_PARAMS, HOST_PARAMS
from fleet.sweep.store import Cell
from guestd.tiering.registry import policies, policy_of
from guestd.workloads.registry import workloads


def cell(tmp_path: Path, name: str, experiment: Experiment) -> Cell:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "spec.toml").write_text(experiment.to_toml())
    return Cell(name, {}, 0, folder, None, "done")


def parameters(*cells: Cell) -> dict[tuple[str, str], Parameter]:
    table = parameters_table(cells)
    rows = [Parameter(*row) for row in table.rows]  # type: ignore[arg-type]
    assert len(rows) == len({(row.parameter, row.of) for row in rows})
    return {(row.parameter, row.of): row for row in rows}


def test_every_declared_parameter_and_every_cost_is_there(tmp_path: Path) -> None:
    found = parameters(cell(tmp_path, "a", load(None, {"policy": "hyperplace"})))
    names = {name for name, _ in found}
    for space, declared in (
        ("policy", policies()["hyperplace"].params), ("workload", workloads()["gups"].params),
        ("guest", GUEST_PARAMS), ("host", HOST_PARAMS), ("engine", ENGINE_PARAMS),
    ):  # fmt: skip
        assert {f"{space}.{param.name}" for param in declared} <= names
        for param in declared:
            (row,) = [row for (name, _), row in found.items() if name == f"{space}.{param.name}"]
            assert (row.set, row.source, row.value) == (False, param.source, row.default)
    assert {f"host.{key}" for key in hosts.figure_keys()} <= names
    for row in found.values():
        assert row.source
        assert row.set is not True or row.parameter == "policy"
    figure = hosts.load_profile(hosts.DEFAULT_PROFILE).figures["invept"]
    row = found["host.invept", f"host {hosts.DEFAULT_PROFILE}"]
    assert (row.value, row.unit, row.grade, row.source) == (str(figure.value), figure.unit, figure.grade, figure.source)


def test_what_was_set_is_seen(tmp_path: Path) -> None:
    settings = ["host.invept=900ns", "guest.hz=1000", "host.pml=true", "host.llc_bytes=1MiB"]
    found = parameters(cell(tmp_path, "a", load(None, {"policy": "g-tpp", "fast_ratio": "1/5"}, settings)))
    by_name = {name: row for (name, _), row in found.items()}
    invept = by_name["host.invept"]
    assert (invept.value, invept.set, invept.grade) == ("900ns", True, None)
    assert invept.source is not None
    assert invept.source.startswith("chosen for this run")
    assert by_name["host.llc_bytes"].value == "1MiB"
    assert (by_name["guest.hz"].value, by_name["guest.hz"].default) == ("1000", "250")
    assert (by_name["host.pml"].value, by_name["host.pml"].set) == ("true", True)
    assert by_name["fast_ratio"].set is False  # 1/5 is 0.2


def test_stages_bring_their_parameters(tmp_path: Path) -> None:
    found = parameters(cell(tmp_path, "a", load(None, {"policy": "hyperplace", "tracker": "pebs-ksampled"})))
    declared = policy_of("hyperplace", {"tracker": "pebs-ksampled"}).params
    sources = {row.parameter: row.source for row in found.values() if row.of == "policy hyperplace"}
    assert sources == {f"policy.{param.name}": param.source for param in declared}
    assert found["tracker", "VMs"].value == "pebs-ksampled"


def test_cells_that_differ_share_a_row(tmp_path: Path) -> None:
    cells = [cell(tmp_path, str(vms), load(None, {"vms": str(vms), "policy": "g-tpp"})) for vms in range(1, 9)]
    row = parameters(*cells)["vms", "VMs"]
    assert (row.value, row.set) == ("1, 2, 3, 4, 5, 6, ... (8 values)", "varies")


def test_a_profile_that_is_gone_is_said_to_be(tmp_path: Path) -> None:
    found = parameters(cell(tmp_path, "a", replace(load(), host="mine")))
    row = found["host.invept", "host mine"]
    assert (row.value, row.source) == ("500ns", "a profile 'mine' that is not here")


def test_a_broken_spec_is_refused(tmp_path: Path) -> None:
    broken = cell(tmp_path, "a", load())
    (broken.path / "spec.toml").write_text("[")
    with pytest.raises(OutputError, match=r"spec\.toml: cannot be read"):
        parameters_table([broken])
