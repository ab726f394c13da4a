"""Runs that other commands make: each experiment once, its results kept under the digest of what decides them.

A cell's directory is named by its resolved experiment and by the sources of the emulator, so a later call with the same
of both finds the summary and runs nothing: that is all there is to resuming. One cell after another, as each is a fleet
of processes of its own.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from fleet import doctor
from fleet.errors import LimitError, OutputError
from fleet.experiment import Experiment
from fleet.launcher import run_fleet
from fleet.logs import launcher_log
from fleet.outcome import Outcome, Silent, VmProgress
from fleet.provenance import collect
from fleet.results import RunDirectory, finish

Summary = dict[str, Any]
_SOURCES = ("proto", "guestd", "hostd")
"""What computes a result, besides the experiment; `fleet` only carries it about."""


class Watcher(Protocol):
    """Who watches the cells."""

    def begin(self, name: str, done: int, total: int) -> None:
        """Cell ``name`` starts, ``done`` of ``total`` are over."""

    def progress(self, share: float) -> None:
        """The present cell is through by as much."""


class Unwatched:
    """Nobody does."""

    def begin(self, name: str, done: int, total: int) -> None: ...

    def progress(self, share: float) -> None: ...


class Lines:
    """A line a cell, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def begin(self, name: str, done: int, total: int) -> None:
        self._console.print(f"[{done + 1}/{total}] {name}", markup=False, soft_wrap=True)

    def progress(self, share: float) -> None: ...


class Bar:
    """One bar over all cells with the present one's name and the time left; a context manager."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.fields[count]}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"),
            TimeRemainingColumn(), TextColumn("{task.description}"), console=console, transient=True,
        )  # fmt: skip
        self._task = self._progress.add_task("", total=1.0, count="")
        self._done = 0

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def begin(self, name: str, done: int, total: int) -> None:
        self._done = done
        self._progress.update(
            self._task, description=name, total=float(total), completed=float(done), count=f"{done + 1}/{total}"
        )

    def progress(self, share: float) -> None:
        self._progress.update(self._task, completed=self._done + share)


class _InCell(Silent):
    def __init__(self, watcher: Watcher, vms: int) -> None:
        self._watcher = watcher
        self._shares = dict.fromkeys(range(vms), 0.0)

    def on_progress(self, vms: list[VmProgress]) -> None:
        self._shares |= {vm.vm: 1.0 if vm.phase in ("done", "lost") else vm.progress for vm in vms}
        self._watcher.progress(sum(self._shares.values()) / len(self._shares))


def run_cells(experiments: Mapping[str, Experiment], root: Path, watcher: Watcher) -> dict[str, Summary]:
    """The summary of each experiment, by name; those that ``root`` has already are read, the others run.

    A cell that fails has a summary that says so. Raises KeyboardInterrupt after an interrupted one, LimitError before
    anything runs if one is too large for this machine.
    """
    for name, experiment in experiments.items():
        if problems := doctor.check_run(experiment.guests()):
            raise LimitError(f"{name}: this machine cannot hold it: " + "; ".join(it.line() for it in problems))
    summaries = {}
    for done, (name, experiment) in enumerate(experiments.items()):
        watcher.begin(name, done, len(experiments))
        summaries[name] = run_cell(experiment, root, watcher)
    return summaries


def run_cell(experiment: Experiment, root: Path, watcher: Watcher | None = None) -> Summary:
    """One experiment's summary, read or run."""
    path = root / "cells" / cell_name(experiment)
    if (path / "summary.json").is_file():
        kept: Summary = json.loads((path / "summary.json").read_text())
        return kept
    try:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"cannot create {path}: {error.strerror}; choose another --out") from None
    directory = RunDirectory(path)
    provenance = collect()
    directory.begin(experiment, provenance)
    guests = experiment.guests(directory.log_path, directory.events_path)
    doctor.raise_file_limit(len(guests))
    observer = _InCell(watcher or Unwatched(), len(guests))
    with launcher_log(directory.log_path("launcher")):
        result = run_fleet(guests, experiment.host_config(directory.log_path("host")), path, observer)
    if result.outcome == Outcome.INTERRUPTED:
        shutil.rmtree(path, ignore_errors=True)
        raise KeyboardInterrupt
    return finish(directory, experiment, guests, result, provenance)


def cell_name(experiment: Experiment) -> str:
    """Name of the cell's directory: 20 hexadecimal digits."""
    return hashlib.sha256(f"{experiment.digest} {_sources_digest()}".encode()).hexdigest()[:20]


def default_watcher(console: Console) -> Lines | Bar:
    """A bar on a terminal, else lines."""
    return Bar(console) if console.is_terminal and not console.is_dumb_terminal else Lines(console)


@cache
def _sources_digest() -> str:
    digest = hashlib.sha256()
    for name in _SOURCES:
        package = sys.modules.get(name) or __import__(name)
        folder = Path(str(package.__file__)).parent
        for path in sorted(folder.rglob("*.py")):
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
