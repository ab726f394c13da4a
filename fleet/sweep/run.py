"""Runs any list of experiments as a sweep: skips what is there, hands the rest to an engine, writes the results."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

from fleet.atomic import write_atomic
from fleet.experiment import Experiment
from fleet.sweep import estimate
from fleet.sweep.local import LocalEngine
from fleet.sweep.progress import Progress, Silent
from fleet.sweep.results import write_results
from fleet.sweep.spec import Point
from fleet.sweep.store import Cell, Store, find, load


class Engine(Protocol):
    """Where cells run: `LocalEngine`, `fleet.sweep.cluster.DaskEngine`."""

    def run(self, points: list[Point], store: Store, progress: Progress) -> None:
        """Run them all, each into the store."""


def run_cells(
    cells: Iterable[Point | tuple[Mapping[str, object], Experiment]],
    out: Path,
    *,
    jobs: int = 1,
    progress: Progress | None = None,
    rerun: Callable[[Cell], bool] = lambda failed: False,
    engine: Engine | None = None,
    name: str = "",
    text: str | None = None,
) -> list[Cell]:
    """Run what of ``cells`` is not yet in ``out``; all of them as `load` gives them, in their order.

    A cell is ``(axes, experiment)`` or a `Point`. Two equal experiments run once. A cell that fails is in the answer
    with status ``failed`` and costs no other; ``rerun``: whether one that failed before runs again. ``engine`` None: on
    this machine, ``jobs`` at once; ``text``: the sweep's spec, kept as ``sweep.toml``. Raises OutputError; on
    KeyboardInterrupt what was finished is kept and written.
    """
    points = [cell if isinstance(cell, Point) else Point(*cell) for cell in cells]
    watcher = progress or Silent()
    with Store(out) as store:
        if text is not None:
            write_atomic(out / "sweep.toml", text)
        store.plan(name or out.name, points)
        unique: dict[str, Point] = {}
        for point in points:
            unique.setdefault(point.hash, point)
        todo = [point for point in unique.values() if to_run(find(out, point), rerun)]
        rate = estimate.rate(load(out))
        watcher.begin(todo, [estimate.seconds(point.experiment, rate) for point in todo], len(unique) - len(todo))
        try:
            if todo:
                (engine or LocalEngine(jobs)).run(todo, store, watcher)
        finally:
            done = load(out)
            write_results(out, name or out.name, done)
    return done


def to_run(cell: Cell, rerun: Callable[[Cell], bool]) -> bool:
    """Whether a cell is not there, or failed and is to run again."""
    return cell.status == "missing" or (cell.status == "failed" and rerun(cell))
