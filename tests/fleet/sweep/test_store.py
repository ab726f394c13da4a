"""fleet.sweep.store: what counts as there, also in directories that others made."""

import json
from pathlib import Path

import pytest

from fleet import spec
from fleet.errors import OutputError
from fleet.sweep.spec import Point
from fleet.sweep.store import Store, find, load


def point(vms: int = 1) -> Point:
    return Point({"vms": vms, "policy": "none"}, spec.load(None, {"vms": vms, "memory": "16MiB"}))


def made(store: Store, cell: Point, mark: str) -> Path:
    path = store.work / cell.hash
    path.mkdir()
    (path / "summary.json").write_text(json.dumps({"outcome": "ok", "vms": [], "mark": mark}))
    return path


def mark(directory: Path) -> object:
    (cell,) = load(directory)
    assert cell.summary is not None
    return cell.summary["mark"]


def test_a_cell_comes_in_whole_and_only_once(tmp_path: Path) -> None:
    cell = point()
    with Store(tmp_path / "out") as store:
        store.plan("s", [cell])
        assert find(tmp_path / "out", cell).status == "missing"
        store.accept(cell, made(store, cell, "first"), "", "alone")
        assert find(tmp_path / "out", cell).status == "done"
        store.accept(cell, made(store, cell, "second"), "", "alone")
    assert mark(tmp_path / "out") == "first"


def test_a_failed_cell_gives_way(tmp_path: Path) -> None:
    cell = point()
    with Store(tmp_path / "out") as store:
        store.plan("s", [cell])
        store.accept(cell, made(store, cell, "broken"), "it broke", "alone")
        assert (find(tmp_path / "out", cell).status, load(tmp_path / "out")[0].reason) == ("failed", "it broke")
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
        assert find(tmp_path / "out", cell).status == "missing"


def test_a_run_is_a_cell_without_axes(tmp_path: Path) -> None:
    (tmp_path / "spec.toml").write_text("")
    (cell,) = load(tmp_path)
    assert (cell.axes, cell.status, cell.summary) == ({}, "missing", None)
    (tmp_path / "summary.json").write_text('{"outcome": "failed", "vms": []}')
    assert load(tmp_path)[0].status == "failed"
    (tmp_path / "summary.json").write_text('{"outcome": "ok", "vms": []}')
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


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("plan.json", "{}", "not that of a sweep"),
        ("plan.json", '{"cells": 1}', "not that of a sweep"),
        ("plan.json", '{"cells": [{"cell": "x", "repetition": 0}]}', "not that of a sweep"),
        ("plan.json", "[]", "not a JSON object"),
        ("summary.json", "{}", "not the summary of a run"),
    ],
)
def test_the_files_of_others_are_refused(tmp_path: Path, file: str, text: str, says: str) -> None:
    (tmp_path / "spec.toml").write_text("")
    (tmp_path / file).write_text(text)
    with pytest.raises(OutputError, match=says):
        load(tmp_path)


def test_a_directory_in_which_a_sweep_was_killed_at_its_start_can_be_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").touch()
    with Store(tmp_path / "out") as store:
        assert store.work.is_dir()
