"""fleet.cells: runs that are made once and found again."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fleet.cells import cell_name, run_cell, run_cells
from fleet.errors import LimitError, OutputError
from fleet.spec import load

ROOT = Path(__file__).parent.parent.parent
SMALL = {"memory": "16MiB", "transactions": 5000, "policy": "g-tpp"}


class Seen:
    def __init__(self) -> None:
        self.cells: list[tuple[str, int, int]] = []
        self.shares: list[float] = []

    def begin(self, name: str, done: int, total: int) -> None:
        self.cells.append((name, done, total))

    def progress(self, share: float) -> None:
        self.shares.append(share)


@pytest.mark.timeout(300)  # the first run of a machine compiles
def test_a_cell_runs_once_and_is_read_again(tmp_path: Path) -> None:
    one, other = load(None, SMALL), load(None, SMALL | {"seed": 2})
    seen = Seen()
    first = run_cells({"one": one, "other": other}, tmp_path, seen)
    assert [summary["outcome"] for summary in first.values()] == ["ok", "ok"]
    assert first["one"]["digest"] != first["other"]["digest"]
    assert seen.cells == [("one", 0, 2), ("other", 1, 2)]
    assert all(0 <= share <= 1 for share in seen.shares)
    kept = tmp_path / "cells" / cell_name(one) / "summary.json"
    kept.write_text(json.dumps(first["one"] | {"outcome": "kept"}))
    assert run_cell(one, tmp_path)["outcome"] == "kept"


def test_an_unfinished_cell_runs_anew(tmp_path: Path) -> None:
    experiment = load(None, SMALL)
    started = tmp_path / "cells" / cell_name(experiment)
    started.mkdir(parents=True)
    (started / "spec.toml").write_text("")
    assert run_cell(experiment, tmp_path)["outcome"] == "ok"
    assert (started / "spec.toml").read_text() != ""


def test_what_is_not_the_experiment_is_not_in_its_name() -> None:
    experiment = load(None, SMALL)
    assert cell_name(load(None, SMALL | {"name": "other"})) == cell_name(experiment)
    assert cell_name(load(None, SMALL | {"seed": 2})) != cell_name(experiment)


def test_what_cannot_run_is_refused_before_anything_does(tmp_path: Path) -> None:
    huge = load(None, {"memory": "256GiB", "vms": 100})
    with pytest.raises(LimitError, match="huge: this machine"):
        run_cells({"small": load(None, SMALL), "huge": huge}, tmp_path, Seen())
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose another --out"):
        run_cell(load(None, SMALL), tmp_path / "file")


@pytest.mark.timeout(300)
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
        while not process.stderr.readline().startswith("[2/"):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate()
    assert (process.returncode, out) == (130, "")
    done = [path for path in (tmp_path / "out" / "cells").iterdir() if (path / "summary.json").exists()]
    assert done
    assert not (tmp_path / "out" / "sensitivity.json").exists()
