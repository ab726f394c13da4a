"""fleet.sweep.run, end to end through the command: resumed, killed, failed and interrupted sweeps."""

import json
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from fleet import spec
from fleet.errors import OutputError
from fleet.schema import check
from fleet.sweep import run_cells
from fleet.sweep.spec import load_sweep
from fleet.sweep.store import Store, load
from tests.fleet.sweep.conftest import CELLS, deterministic, family, fleet, has_guest, start, until

pytestmark = pytest.mark.timeout(600)  # the first run of a machine compiles


def results(directory: Path) -> Any:
    return json.loads((directory / "results.json").read_text())


def test_a_sweep_leaves_a_run_per_cell_and_a_table_of_all(tiny: Path, undisturbed: Path) -> None:
    points = load_sweep(tiny).points
    cells = load(undisturbed)
    assert [(cell.hash, cell.axes, cell.repetition) for cell in cells] == [
        (point.hash, dict(point.axes), 0) for point in points
    ]
    for cell, point in zip(cells, points, strict=True):
        assert (cell.status, cell.reason) == ("done", "")
        assert cell.summary is not None
        assert len(check(cell.summary).vms) == cell.axes["vms"]
        assert cell.summary["run"]["spec_digest"] == point.experiment.digest
        assert cell.info == {"cell": cell.hash, "axes": cell.axes, "repetition": 0, "seed": 1, "cpu_measured": "alone"}
        names = {path.name for path in cell.path.iterdir()}
        assert names == {
            "spec.toml", "provenance.json", "summary.json", "timeseries.parquet", "events.parquet", "log.jsonl",
            "cell.json", "DONE",
        }  # fmt: skip
    assert (undisturbed / "sweep.toml").read_text() == tiny.read_text()
    written = results(undisturbed)
    assert written["counts"] == {"done": CELLS, "failed": 0, "missing": 0}
    assert written["axes"] == {"vms": [1, 2], "policy": ["g-tpp", "none"]}
    assert not (undisturbed / ".work").exists()
    rows = deterministic(undisturbed)
    assert [(row["vms"], row["policy"], row["vm"]) for row in rows] == [
        (1, "g-tpp", 0),
        (1, "none", 0),
        (2, "g-tpp", 0),
        (2, "g-tpp", 1),
    ]
    for row in rows:
        cell = next(cell for cell in cells if cell.hash == row["cell"])
        assert cell.summary is not None
        assert row["access.total"] == cell.summary["vms"][row["vm"]]["access"]["total"]


def test_killed_halfway_and_resumed_it_is_as_if_undisturbed(tiny: Path, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    with start("sweep", tiny, "--out", out) as (sweep, stderr):
        assert any(line.startswith(f"1/{CELLS} ") for line in iter(stderr.readline, ""))
        process = psutil.Process(sweep.pid)
        until(lambda: has_guest(family(process)))
        everybody = family(process)
        sweep.kill()
        sweep.wait()
    assert psutil.wait_procs(everybody, timeout=60)[1] == []
    before = load(out)
    done = sum(cell.status == "done" for cell in before)
    assert 1 <= done < CELLS == done + sum(cell.status == "missing" for cell in before)
    assert len(list((out / "cells").iterdir())) == done
    resumed = fleet("sweep", tiny, "--out", out, "--json", "--jobs", "2")
    assert (resumed.returncode, "Traceback" in resumed.stderr) == (0, False)
    assert f"to run, {done} are there already" in resumed.stderr
    kept = {cell.hash: cell.summary for cell in before if cell.status == "done"}
    for cell in load(out):
        assert cell.summary is not None
        if cell.hash in kept:
            assert (cell.summary, cell.info["cpu_measured"]) == (kept[cell.hash], "alone")
        elif CELLS - done > 1:
            assert cell.info["cpu_measured"] == "shared"
    assert json.loads(resumed.stdout)["digest"] == results(undisturbed)["digest"]
    assert deterministic(out) == deterministic(undisturbed)


def test_a_failed_cell_costs_no_other_and_is_only_run_again_on_demand(tmp_path: Path) -> None:
    file = tmp_path / "crash.toml"
    # Legacy PEBS meets memory that nobody has touched yet: the VM dies of it.
    file.write_text(
        '[base]\npolicy = "hyperplace"\nmemory = "4GiB"\nscale = "1/256"\nseconds = 0.1\n'
        'set.policy.epoch_ms = 20\nset.guest.ds_prefault = false\n[axes]\nset.host.pebs = ["legacy", "ept-friendly"]\n'
    )
    out = tmp_path / "out"
    first = fleet("sweep", file, "--out", out)
    assert first.returncode == 1
    broken, fine = load(out)
    assert (broken.status, fine.status) == ("failed", "done")
    assert broken.summary is not None
    assert broken.summary["outcome"] == "failed"
    assert broken.reason
    assert f"FAILED {broken.label}: {broken.reason}" in first.stderr
    assert results(out)["failures"] == [
        {"cell": broken.hash, "axes": {"host.pebs": "legacy"}, "repetition": 0, "reason": broken.reason}
    ]
    digest = results(out)["digest"]
    stamp = (broken.path / "summary.json").stat().st_ino
    again = fleet("sweep", file, "--out", out)
    assert (again.returncode, (broken.path / "summary.json").stat().st_ino) == (1, stamp)
    assert "0 cells to run" in again.stderr
    rerun = fleet("sweep", file, "--out", out, "--rerun-failed")
    assert (rerun.returncode, (broken.path / "summary.json").stat().st_ino == stamp) == (1, False)
    assert "1 cell to run, 1 are there already" in rerun.stderr
    assert results(out)["digest"] == digest


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_cell_and_keeps_what_is_done(tmp_path: Path, signum: signal.Signals) -> None:
    out, file = tmp_path / "interrupted", tmp_path / "endless.toml"
    file.write_text('[base]\nmemory = "16MiB"\nseconds = 10000\n[axes]\nseed = [1, 2]\n')
    with start("sweep", file, "--out", out) as (sweep, stderr):
        process = psutil.Process(sweep.pid)
        until(lambda: has_guest(family(process)))
        everybody = family(process)
        sweep.send_signal(signum)
        said = stderr.read()
        assert sweep.wait() == 130
    assert "Traceback" not in said
    assert "interrupted: 0 of 2 cells are there" in said
    assert psutil.wait_procs(everybody, timeout=60)[1] == []
    assert results(out)["counts"] == {"done": 0, "failed": 0, "missing": 2}
    assert list((out / "cells").iterdir()) == []
    assert not (out / ".work").exists()


def test_equal_experiments_run_once_and_a_refused_one_says_why(tmp_path: Path) -> None:
    one = spec.load(None, {"memory": "16MiB", "seconds": 0.01})
    huge = spec.load(None, {"memory": "500GiB", "vms": 60_000})
    cells = run_cells([({"x": 1}, one), ({"x": 2}, huge), ({"x": 3}, one)], tmp_path / "out")
    assert [cell.axes for cell in cells] == [{"x": 1}, {"x": 2}, {"x": 3}]
    assert [cell.status for cell in cells] == ["done", "failed", "done"]
    assert cells[0].path == cells[2].path
    assert "this machine cannot hold the run" in cells[1].reason
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 2


def test_two_sweeps_cannot_write_to_one_directory(tmp_path: Path) -> None:
    with Store(tmp_path / "out"), pytest.raises(OutputError, match="another sweep is writing"):
        Store(tmp_path / "out")
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "mine.txt").write_text("")
    with pytest.raises(OutputError, match="holds no sweep"):
        Store(tmp_path / "else")
