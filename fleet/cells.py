"""Runs that other commands make, by name: a sweep without axes, kept apart by the state of the emulator.

`fleet.sweep` runs them and skips what is there, which is all there is to resuming. As these commands compare results
over days of work on the emulator, results of other sources of it are never mistaken for these: they lie in a folder of
their own.
"""

import hashlib
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fleet import doctor
from fleet.errors import LimitError
from fleet.experiment import Experiment
from fleet.sweep import run as sweep
from fleet.sweep.progress import Progress
from fleet.sweep.spec import Point
from fleet.sweep.store import Cell

Summary = dict[str, Any]
_SOURCES = ("proto", "guestd", "hostd", "fleet")
"""What computes a result, besides the experiment's own spec ..."""
_ASIDE = ("report", "sweep", "validate")
"""... and packages of `fleet` that only choose what runs, or show what came of it."""
_NAME = "cell"


def run_cells(
    experiments: Mapping[str, Experiment], root: Path, *, jobs: int = 1, progress: Progress | None = None
) -> dict[str, Summary]:
    """The summary of each experiment, by name, in their order; those that ``root`` has already are read.

    A cell that failed has a summary that says so; one that failed for what this machine did, and not in the emulated
    fleet, runs again. Raises LimitError before anything runs if one is too large for this machine, OutputError; on
    KeyboardInterrupt what was finished is kept.
    """
    for name, experiment in experiments.items():
        if problems := doctor.check_run(experiment.guests()):
            raise LimitError(f"{name}: this machine cannot hold it: " + "; ".join(it.line() for it in problems))
    points = [Point({_NAME: name}, experiment) for name, experiment in experiments.items()]
    done = sweep.run_cells(points, folder(root), jobs=jobs, progress=progress, rerun=_by_this_machine)
    return {name: _summary(cell) for name, cell in zip(experiments, done, strict=True)}


def failure(summary: Summary) -> str:
    """Why a run is not ok, in words."""
    return str(summary["errors"][0]["message"] if summary["errors"] else summary["outcome"])


def label(name: str) -> str:
    """How progress calls the cell of this name."""
    return f"{_NAME}={name}"


def folder(root: Path) -> Path:
    """Where the cells of this state of the emulator lie."""
    return root / f"emulator-{_sources_digest()[:12]}"


def _summary(cell: Cell) -> Summary:
    """The cell's; where it has none, or one that says nothing of its failure, one that does."""
    if cell.summary is not None and (cell.status == "done" or cell.summary["outcome"] != "ok"):
        return cell.summary
    reason = cell.reason or "it left no results"
    return {"outcome": "failed", "errors": [{"kind": "cell", "message": reason}], "vms": []}


def _by_this_machine(cell: Cell) -> bool:
    """Whether a failed cell was killed or interrupted: another time it may well succeed."""
    return cell.summary is None or cell.summary["outcome"] == "interrupted"


@cache
def _sources_digest() -> str:
    digest = hashlib.sha256()
    for name in _SOURCES:
        package = sys.modules.get(name) or __import__(name)
        top = Path(str(package.__file__)).parent
        for path in sorted(top.rglob("*.py")):
            inside = path.relative_to(top)
            if name != "fleet" or inside.parts[0] not in _ASIDE:
                digest.update(str(inside).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
