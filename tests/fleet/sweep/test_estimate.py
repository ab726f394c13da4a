"""fleet.sweep.estimate: from virtual length and rate to wall time."""

import json
from pathlib import Path

import pytest

from fleet import spec
from fleet.sweep import estimate
from fleet.sweep.store import Cell


def test_vcpu_seconds_of_a_time_and_of_a_number_of_accesses() -> None:
    assert estimate.vcpu_seconds(spec.load(None, {"vms": 3, "vcpus": 2, "seconds": 4})) == pytest.approx(24)
    counted = spec.load(None, {"vms": 2, "transactions": 96_000_000, "scale": "1/16", "memory": "1GiB"})
    assert estimate.vcpu_seconds(counted) == pytest.approx(2 * 6_000_000 / estimate.ACCESSES_PER_VCPU_S)


def test_the_rate_is_assumed_until_undisturbed_cells_are_there(tmp_path: Path) -> None:
    assert estimate.rate([]) == (estimate.ASSUMED_RATE, "assumed")
    summary = {"elapsed": {"wall_s": 6.0}, "vms": [{"virtual_s": 2.0, "vcpus": 4}]}
    cell = Cell("x", {}, 0, tmp_path, summary, "done")
    (tmp_path / "cell.json").write_text(json.dumps({"cpu_measured": "shared"}))
    assert estimate.rate([cell]).source == "assumed"
    (tmp_path / "cell.json").write_text(json.dumps({"cpu_measured": "alone"}))
    assert estimate.rate([cell, cell]) == (0.75, "measured on 2 cells")
    assert estimate.rate([cell._replace(status="failed")]).source == "assumed"


def test_a_cell_takes_its_start_and_its_work() -> None:
    one = spec.load(None, {"vms": 1, "vcpus": 2, "seconds": 5})
    assert estimate.seconds(one, estimate.Rate(2.0, "")) == pytest.approx(estimate.START_S + 20)
    many = spec.load(None, {"vms": 4, "vcpus": 2, "seconds": 5})
    expected = estimate.START_S + 80 / estimate.parallel(4)
    assert estimate.seconds(many, estimate.Rate(2.0, "")) == pytest.approx(expected)
