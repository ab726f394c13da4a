"""fleet.cells: runs that are made once and found again."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fleet.cells import folder, run_cells
from fleet.errors import LimitError, OutputError
from fleet.spec import load
from fleet.sweep.spec import Point

ROOT = Path(__file__).parent.parent.parent
SMALL = {"memory": "16MiB", "transactions": 5000, "policy": "g-tpp"}


def test_a_cell_runs_once_and_is_read_again(tmp_path: Path) -> None:
    cells = {"one": load(None, SMALL), "other": load(None, SMALL | {"seed": 2})}
    first = run_cells(cells, tmp_path, jobs=2)
    assert list(first) == ["one", "other"]
    assert [summary["outcome"] for summary in first.values()] == ["ok", "ok"]
    assert first["one"]["digest"] != first["other"]["digest"]
    kept = folder(tmp_path) / "cells" / Point({}, cells["one"]).hash / "summary.json"
    kept.write_text(json.dumps(first["one"] | {"outcome": "kept"}))
    again = run_cells({"again": cells["one"]}, tmp_path)
    assert again["again"]["outcome"] == "kept"


def test_a_cell_that_fails_says_so_and_costs_no_other(tmp_path: Path) -> None:
    lazy = ["policy.load_period=29", "policy.load_latency_ns=3", "policy.epoch_ms=20"]
    killed = load(None, SMALL | {"policy": "hyperplace"}, [*lazy, "host.pebs=legacy", "guest.ds_prefault=false"])
    found = run_cells({"killed": killed, "well": load(None, SMALL)}, tmp_path)
    assert found["killed"]["errors"][0]["kind"] == "pebs_ept_violation"
    assert found["well"]["outcome"] == "ok"


def test_what_cannot_run_is_refused_before_anything_does(tmp_path: Path) -> None:
    huge = load(None, {"memory": "256GiB", "vms": 100})
    with pytest.raises(LimitError, match="huge: this machine"):
        run_cells({"small": load(None, SMALL), "huge": huge}, tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose another --out"):
        run_cells({"small": load(None, SMALL)}, tmp_path / "file")


def test_an_interrupt_ends_it_cleanly_and_what_was_done_is_kept(tmp_path: Path) -> None:
    (tmp_path / "spec.toml").write_text('memory = "16MiB"\ntransactions = 5000\n')
    words = [
        "sensitivity",
        str(tmp_path / "spec.toml"),
        "--metric",
        "elapsed.virtual_s",
        "--out",
        str(tmp_path / "out"),
    ]
    command = [sys.executable, "-m", "fleet", *words]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while not process.stderr.readline().startswith("1/"):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate()
    assert (process.returncode, out) == (130, "")
    done = list((folder(tmp_path / "out") / "cells").iterdir())
    assert done
    assert all((path / "summary.json").exists() for path in done)
    assert not (tmp_path / "out" / "sensitivity.json").exists()
