"""fleet.cells: runs that are made once and found again."""

import json
from pathlib import Path

import pytest

from fleet.cells import cell_name, run_cell, run_cells
from fleet.errors import LimitError, OutputError
from fleet.spec import load

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
