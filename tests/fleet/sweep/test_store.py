"""fleet.sweep.store: what counts as there, also in directories that others made."""

import json
from pathlib import Path

import pytest

from fleet import spec
from fleet.errors import OutputError
from fleet.sweep.spec import Point
from fleet.sweep.store import Store, load


def point(vms: int = 1) -> Point:
    return Point({"vms": vms, "policy": "none"}, spec.load(None, {"vms": vms, "memory": "16MiB"}))


def made(store: Store, cell: Point, mark: str) -> Path:
    path = store.work / cell.hash
    path.mkdir()
    (path / "summary.json").write_text(json.dumps({"outcome": "ok", "mark": mark}))
    return path


def mark(directory: Path) -> object:
    (cell,) = load(directory)
    assert cell.summary is not None
    return cell.summary["mark"]


def test_a_cell_comes_in_whole_and_only_once(tmp_path: Path) -> None:
    cell = point()
    with Store(tmp_path / "out") as store:
        store.plan("s", [cell])
        assert store.status(cell) == "missing"
        store.accept(cell, made(store, cell, "first"), "", "alone")
        assert store.status(cell) == "done"
        store.accept(cell, made(store, cell, "second"), "", "alone")
    assert mark(tmp_path / "out") == "first"


def test_a_failed_cell_gives_way(tmp_path: Path) -> None:
    cell = point()
    with Store(tmp_path / "out") as store:
        store.plan("s", [cell])
        store.accept(cell, made(store, cell, "broken"), "it broke", "alone")
        assert (store.status(cell), load(tmp_path / "out")[0].reason) == ("failed", "it broke")
        store.accept(cell, made(store, cell, "mended"), "", "alone")
    assert mark(tmp_path / "out") == "mended"
    assert load(tmp_path / "out")[0].reason == ""


def test_the_plan_says_which_cells_belong_to_the_sweep(tmp_path: Path) -> None:
    one, other = point(1), point(2)
    with Store(tmp_path / "out") as store:
        store.plan("s", [one])
        for cell in (one, other):
            store.accept(cell, made(store, cell, "x"), "", "alone")
        store.plan("s", [other, point(3)])
    assert [(cell.axes["vms"], cell.status) for cell in load(tmp_path / "out")] == [(2, "done"), (3, "missing")]
    (tmp_path / "out" / "plan.json").unlink()
    assert {cell.hash for cell in load(tmp_path / "out")} == {one.hash, other.hash}


def test_what_a_killed_sweep_was_about_is_swept_away(tmp_path: Path) -> None:
    cell = point()
    store = Store(tmp_path / "out")
    made(store, cell, "half")
    left = store.work
    with pytest.raises(OutputError, match="another sweep"):
        Store(tmp_path / "out")
    # Its lock goes with its process.
    import os

    os.close(store._lock)
    with Store(tmp_path / "out") as again:
        assert not left.exists()
        assert again.work.is_dir()
        assert again.status(cell) == "missing"


def test_a_run_is_a_cell_without_axes(tmp_path: Path) -> None:
    (tmp_path / "spec.toml").write_text("")
    (cell,) = load(tmp_path)
    assert (cell.axes, cell.status, cell.summary) == ({}, "missing", None)
    (tmp_path / "summary.json").write_text('{"outcome": "failed"}')
    assert load(tmp_path)[0].status == "failed"
    (tmp_path / "summary.json").write_text('{"outcome": "ok"}')
    (tmp_path / "provenance.json").write_text('{"spec_digest": "sha256:0123456789abcdef0123"}')
    (cell,) = load(tmp_path)
    assert (cell.hash, cell.status, cell.path) == ("0123456789abcdef", "done", tmp_path)


def test_anything_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="neither a sweep nor a run"):
        load(tmp_path)
    with pytest.raises(OutputError, match="neither a sweep nor a run"):
        load(tmp_path / "nowhere")
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(OutputError, match="cannot be read"):
        load(tmp_path)
