"""Lines over time: VMs of a run, cells of a sweep as the sum of their VMs."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fleet.experiment import Experiment
from fleet.outcome import FleetResult
from fleet.provenance import collect
from fleet.report.figure import Absent, Figure
from fleet.report.series_over_time import accuracy, fast_share, throughput, tracks
from fleet.results import RunDirectory, finish
from fleet.sweep.store import load


@pytest.fixture
def run(tmp_path: Path, experiment: Experiment, result: FleetResult) -> Path:
    directory = RunDirectory.create(tmp_path / "run", "n")
    directory.begin(experiment, collect([]))
    finish(directory, experiment, experiment.guests(), result, collect([]))
    return directory.path


@pytest.fixture
def sweep(run: Path, tmp_path: Path) -> Path:
    """A sweep of one cell, which is the run."""
    cell = tmp_path / "sweep" / "cells" / ("0" * 16)
    cell.parent.mkdir(parents=True)
    run.rename(cell)
    (cell / "DONE").touch()
    (cell / "cell.json").write_text(json.dumps({"cell": cell.name, "axes": {"vms": 2}, "repetition": 0, "seed": 7}))
    return tmp_path / "sweep"


def test_lines_of_a_run(run: Path) -> None:
    found, note = tracks(load(run))
    assert [track.label for track in found] == ["vm0 g-tpp gups", "vm1 hyperplace gups"]
    assert note == ""
    # Sampled at 0.1 to 1.1 s; what began before the memory was populated (the first two) is not of the run.
    assert found[0].time_s == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1])
    assert found[0].throughput_mops == pytest.approx([10.0] * 9)
    figure = throughput(found, note)
    assert isinstance(figure, Figure)
    assert [series.shown for series in figure.series] == [True, True]


def test_a_cell_is_the_sum_of_its_vms(sweep: Path) -> None:
    sums: dict[float, list[float]] = {}
    for row in pq.read_table(next(sweep.glob("cells/*/timeseries.parquet"))).to_pylist():
        if row["phase"] == "run":
            total = sums.setdefault(row["time_s"], [0.0, 0.0, 0.0])
            for place, name in enumerate(("throughput_mops", "access.fast", "access.total")):
                total[place] += row[name]
    (track,), _ = tracks(load(sweep))
    assert track.label == "2 VMs"
    assert track.throughput_mops == pytest.approx([rate for rate, _, _ in sums.values()])
    assert track.fast_ratio == pytest.approx([fast / total for _, fast, total in sums.values()])


def test_oracle_is_a_level_or_follows_the_time_series(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    for vm in summary["vms"]:
        vm["hotness"] = {"oracle_fast_ratio": 0.8}
    (run / "summary.json").write_text(json.dumps(summary))
    found, _ = tracks(load(run))
    figure = fast_share(found, "")
    assert isinstance(figure, Figure)
    assert [series.name for series in figure.series] == ["vm0 g-tpp gups", "vm1 hyperplace gups", "oracle"]
    assert figure.series[2].y == pytest.approx([80.0] * 9)
    assert isinstance(accuracy(found, ""), Absent)

    table = pq.read_table(run / "timeseries.parquet")
    for name, value in (("oracle_fast_ratio", 0.9), ("precision", 0.5), ("recall", 0.25)):
        known = pa.array([value if vm == 0 else None for vm in table["vm"].to_pylist()], pa.float64())
        table = table.drop_columns([f"hotness.{name}"]).append_column(f"hotness.{name}", known)
    pq.write_table(table, run / "timeseries.parquet")
    found, _ = tracks(load(run))
    assert found[0].oracle == pytest.approx([0.9] * 9)
    assert found[1].oracle == pytest.approx([0.8] * 9)
    figure = accuracy(found, "")
    assert isinstance(figure, Figure)
    assert [series.name for series in figure.series] == ["vm0 g-tpp gups (precision)", "vm0 g-tpp gups (recall)"]
    assert np.unique(figure.series[1].y).tolist() == [25.0]


def test_a_run_without_intervals_has_no_lines(run: Path) -> None:
    (run / "timeseries.parquet").unlink()
    found, note = tracks(load(run))
    assert isinstance(throughput(found, note), Absent)
    assert isinstance(fast_share(found, note), Absent)
