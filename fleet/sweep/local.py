"""The local engine: cells as processes on this machine, as many at once as asked for and as memory allows.

A cell is admitted if its upper bound fits into what is free now and, with the bounds of those that run, into what was
free at the start: they may not have touched their memory yet. Measured CPU of cells that ran beside others is marked.
"""

import selectors
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fleet.doctor import free_memory
from fleet.sweep.estimate import memory_bytes
from fleet.sweep.process import CellProcess
from fleet.sweep.progress import Progress
from fleet.sweep.spec import Point
from fleet.sweep.store import Store


class Load(NamedTuple):
    """Memory at a moment, in bytes."""

    free_at_start: int
    free_now: int
    promised: int
    """To the cells that run."""

    def admits(self, needed: int) -> bool:
        """Whether another cell fits."""
        return needed <= self.free_now and self.promised + needed <= self.free_at_start


@dataclass
class _Running:
    point: Point
    process: CellProcess
    memory_bytes: int
    shared: bool


class LocalEngine:
    """Runs cells here, at most ``jobs`` at once."""

    def __init__(self, jobs: int = 1) -> None:
        self._jobs = jobs

    def run(self, points: Sequence[Point], store: Store, progress: Progress) -> None:
        """Run them all; each ends in the store. At an exception (Ctrl-C) what runs is ended and dropped."""
        waiting = list(points)
        running: dict[int, _Running] = {}
        free_at_start = free_memory()[0]
        with selectors.DefaultSelector() as selector:
            try:
                while waiting or running:
                    while len(running) < self._jobs and (place := _admit(waiting, running, free_at_start)) is not None:
                        point = waiting.pop(place)
                        process = CellProcess(point.experiment, point.hash, store.work)
                        for other in running.values():
                            other.shared = True
                        needed = memory_bytes(point.experiment)
                        running[process.pidfd] = _Running(point, process, needed, bool(running))
                        selector.register(process.pidfd, selectors.EVENT_READ)
                        progress.started(point)
                    for key, _ in selector.select():
                        selector.unregister(key.fd)
                        _finish(running.pop(key.fd), store, progress)
            finally:
                for ended in running.values():
                    ended.process.stop()


def _admit(waiting: Sequence[Point], running: dict[int, _Running], free_at_start: int) -> int | None:
    """Place of the first cell that fits. Alone every cell may try: whether it fits is then its own run's to judge."""
    if not running:
        return 0 if waiting else None
    load = Load(free_at_start, free_memory()[0], sum(other.memory_bytes for other in running.values()))
    fitting = (place for place, point in enumerate(waiting) if load.admits(memory_bytes(point.experiment)))
    return next(fitting, None)


def _finish(ended: _Running, store: Store, progress: Progress) -> None:
    ending = ended.process.wait()
    store.accept(ended.point, ended.process.directory, ending.reason, "shared" if ended.shared else "alone")
    progress.finished(ended.point, ending.reason)
