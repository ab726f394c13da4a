"""The picture of a run and its sparklines."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fleet.experiment import Experiment
from fleet.figure import MOST_LINES, chosen_vms, draw, read_series, sparkline, sparklines
from fleet.outcome import FleetResult
from fleet.provenance import collect
from fleet.results import RunDirectory, finish


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "run", "n")


@pytest.fixture
def summary(directory: RunDirectory, experiment: Experiment, result: FleetResult) -> dict[str, Any]:
    return finish(directory, experiment, experiment.guests(), result, collect([]))


def test_series_hold_the_run_phase_only(directory: RunDirectory, summary: dict[str, Any]) -> None:
    series = read_series(directory.path / "timeseries.parquet", "throughput_mops")
    assert sorted(series) == [0, 1]
    times, values = series[0]
    # Sampled at 0.1 to 1.1 s; what began before the memory was populated (the first two) is not of the run.
    assert times == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1])
    assert values == pytest.approx([10.0] * 9)


def test_picture_shows_both_vms(directory: RunDirectory, summary: dict[str, Any]) -> None:
    draw(summary, directory.path / "timeseries.parquet", directory.figure_path)
    with Image.open(directory.figure_path) as image:
        assert image.size == (1210, 935)
        pixels = np.asarray(image.convert("L"))
    assert pixels.min() < 64
    assert pixels.max() == 255
    assert not list(directory.path.glob("*.tmp"))


def test_a_run_in_which_nobody_lived_has_a_picture(
    directory: RunDirectory, experiment: Experiment, result: FleetResult
) -> None:
    result.reports, result.samples = {}, []
    summary = finish(directory, experiment, experiment.guests(), result, collect([]))
    draw(summary, directory.path / "timeseries.parquet", directory.figure_path)
    assert directory.figure_path.stat().st_size > 0
    assert sparklines(summary, directory.path / "timeseries.parquet") == []


def test_sparklines_say_first_and_last(directory: RunDirectory, summary: dict[str, Any]) -> None:
    lines = sparklines(summary, directory.path / "timeseries.parquet", ascii_only=True)
    assert len(lines) == 2
    # The share of an interval: accesses rise by 10**6, those to the fast tier by the difference of 30 + step per cent.
    assert lines[0].split()[:3] == ["vm0", "g-tpp", "gups"]
    assert lines[0].isascii()
    series = read_series(directory.path / "timeseries.parquet", "fast_ratio")[0][1]
    assert lines[0].split()[3] == f"{100 * series[0]:.1f}"
    assert lines[0].split()[-2] == f"{100 * series[-1]:.1f}"


def test_many_vms_are_drawn_by_their_kind() -> None:
    vms = [{"id": i, "policy": "ab"[i % 2], "workload": "gups"} for i in range(MOST_LINES + 1)]
    assert [vm["id"] for vm in chosen_vms(vms, MOST_LINES)] == [0, 1]
    assert chosen_vms(vms[:3], MOST_LINES) == vms[:3]


@given(st.lists(st.floats(0.0, 1.0), max_size=200), st.integers(1, 80), st.booleans())
def test_sparkline(values: list[float], width: int, ascii_only: bool) -> None:
    line = sparkline(values, width, 0.0, 1.0, ascii_only)
    assert len(line) == min(width, len(values))
    assert line.isascii() or not ascii_only
    rising = sparkline(sorted(values), width, 0.0, 1.0)
    assert rising == "".join(sorted(rising))


def test_sparkline_of_a_range_without_extent() -> None:
    assert sparkline([1.0, 1.0], 5, 1.0, 1.0, ascii_only=True) == "__"
