"""The directory of a sweep: what is planned, what is there, and how a cell gets in (docs/sweeps.md).

A cell is made in ``.work/``, given ``cell.json`` and ``DONE`` or ``FAILED``, and then renamed into ``cells/``: whatever
is there is whole. One process at a time writes, held off from others by a lock that the kernel drops at its death.
"""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fleet.atomic import write_atomic
from fleet.errors import OutputError
from fleet.sweep.spec import Point

Status = Literal["done", "failed", "missing"]

PLAN, CELLS, WORK, LOCK = "plan.json", "cells", ".work", ".lock"
DONE, FAILED = "DONE", "FAILED"


class Cell(NamedTuple):
    """A cell of a sweep as it lies on disk; a run of its own is one cell without axes."""

    hash: str
    axes: dict[str, object]
    """Values as given, by full key, in the order of the spec."""
    repetition: int
    path: Path
    """A run's directory."""
    summary: dict[str, Any] | None
    status: Status

    @property
    def info(self) -> dict[str, Any]:
        """``cell.json``, or {}."""
        return _read(self.path / "cell.json") or {}

    @property
    def reason(self) -> str:
        """Why it failed; empty if it did not."""
        file = self.path / FAILED
        return file.read_text("utf-8").strip() if file.is_file() else ""

    @property
    def label(self) -> str:
        """``vms=3 policy=g-tpp``."""
        parts = [f"{key}={value}" for key, value in self.axes.items()]
        return " ".join(parts + ([f"repetition={self.repetition}"] if self.repetition else [])) or self.path.name


def load(directory: Path) -> list[Cell]:
    """The cells of a sweep's directory, in the order of its plan, or of a run's directory. Raises OutputError."""
    directory = Path(directory)
    try:
        if (plan := _read(directory / PLAN)) is not None:
            return [_cell(directory / CELLS / entry["cell"], entry) for entry in plan["cells"]]
        if (directory / CELLS).is_dir():
            found = [(path, _read(path / "cell.json")) for path in sorted((directory / CELLS).iterdir())]
            return [_cell(path, entry) for path, entry in found if entry is not None]
        if (directory / "spec.toml").is_file():
            return [_run(directory)]
    except (KeyError, TypeError):
        raise OutputError(f"{directory}: its {PLAN} or a cell.json is not that of a sweep") from None
    raise OutputError(f"{directory} holds neither a sweep nor a run (no {PLAN}, no {CELLS}/, no spec.toml)")


def _run(directory: Path) -> Cell:
    summary = _summary(directory)
    digest = (_read(directory / "provenance.json") or {}).get("spec_digest", directory.name)
    status: Status = "missing" if summary is None else "done" if summary["outcome"] == "ok" else "failed"
    return Cell(digest.removeprefix("sha256:")[:16], {}, 0, directory, summary, status)


def find(directory: Path, point: Point) -> Cell:
    """The cell of a point, planned or not, as it lies in a sweep's directory. Raises OutputError."""
    return _cell(directory / CELLS / point.hash, entry(point))


def _cell(path: Path, entry: dict[str, Any]) -> Cell:
    status = _status(path)
    summary = None if status == "missing" else _summary(path)
    return Cell(path.name, entry["axes"], entry["repetition"], path, summary, status)


def _status(path: Path) -> Status:
    if (path / FAILED).is_file():
        return "failed"
    return "done" if (path / DONE).is_file() and (path / "summary.json").is_file() else "missing"


def _summary(run: Path) -> dict[str, Any] | None:
    summary = _read(run / "summary.json")
    if summary is not None and not {"outcome", "vms"} <= summary.keys():
        raise OutputError(f"{run / 'summary.json'}: is not the summary of a run")
    return summary


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise OutputError(f"{path}: is not a JSON object")
    return found


class Store:
    """The directory while a sweep writes to it. Use as a context; raises OutputError if it can't be used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if path.is_dir() and any(path.iterdir()) and not (path / PLAN).exists() and not (path / LOCK).exists():
                raise OutputError(f"{path} is not empty and holds no sweep; choose another --out")
            path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise OutputError(f"cannot use {path}: {error.strerror}; choose another --out") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise OutputError(f"another sweep is writing to {path}; wait for it, or choose another --out") from None
        (path / CELLS).mkdir(exist_ok=True)
        # What a killed sweep was about. A straggler of it may still write there, so the new one gets its own folder.
        shutil.rmtree(path / WORK, ignore_errors=True)
        (path / WORK).mkdir(exist_ok=True)
        self.work = Path(tempfile.mkdtemp(dir=path / WORK))
        """Where cells are made."""

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *ending: object) -> None:
        shutil.rmtree(self.path / WORK, ignore_errors=True)
        os.close(self._lock)

    def plan(self, name: str, points: Sequence[Point]) -> None:
        """Write what the sweep consists of."""
        cells = [entry(point) for point in points]
        write_atomic(self.path / PLAN, json.dumps({"name": name, "cells": cells}, indent=1) + "\n")

    def accept(self, point: Point, made: Path, reason: str, cpu_measured: str) -> None:
        """Take in a finished cell from ``made``, its run's directory: failed if there is a ``reason``."""
        target = self.path / CELLS / point.hash
        made.mkdir(exist_ok=True)
        write_atomic(made / "cell.json", json.dumps(entry(point) | {"cpu_measured": cpu_measured}, indent=2) + "\n")
        write_atomic(made / (FAILED if reason else DONE), reason + "\n" if reason else "")
        if target.exists():
            if _status(target) == DONE.lower():
                shutil.rmtree(made)  # it came twice; the first is as good
                return
            target.rename(self.work / f"{point.hash}.old")
        made.rename(target)


def entry(point: Point) -> dict[str, Any]:
    """A cell's identity, as in ``plan.json`` and ``cell.json``."""
    return {
        "cell": point.hash,
        "axes": dict(point.axes),
        "repetition": point.repetition,
        "seed": point.experiment.seed,
    }
