"""Speed of the generators: accesses per second that each workload emits on one core, apart from the engine.

A generator must not be what a run waits for: the engine handles some 20 million accesses a second. Each workload of the
registry fills one vCPU's buffer over and over; building its data structure is timed apart, per page that it touches.
"""

import time
from collections.abc import Iterator

import numpy as np

from benchmarks.figures import Figure, figure, progress
from fleet.spec import load
from guestd.vcpu import BUFFER
from guestd.workloads.base import Buffer, Workload
from guestd.workloads.registry import workloads

TITLE = "Workloads: one generator, one core; millions per CPU-second"
SIZES = ("64MiB", "1GiB", "16GiB")
QUICK_SIZES = ("64MiB", "1GiB")
ACCESSES = 10_000_000
MEGA = 1e6


def run(quick: bool) -> Iterator[Figure]:
    """All figures; ``quick``: small guests only, fewer repetitions."""
    for name in sorted(set(workloads()) - {"trace"}):
        progress(f"workloads: {name}")
        _populate(_create(name, "16MiB"))[0].generate(0, _buffer())
        for size in QUICK_SIZES if quick else SIZES:
            workload, pages, seconds = _populate(_create(name, size))
            yield figure(f"{name} {size}: populating", "M pages/s", [pages / seconds / MEGA])
            yield figure(f"{name} {size}: generating", "M acc/s",
                         [_generate(workload) / MEGA for _ in range(3 if quick else 7)])  # fmt: skip


def _create(name: str, memory: str) -> Workload:
    experiment = load(None, {"workload": name, "memory": memory, "seconds": 1}, ())
    return workloads()[name].create(experiment.guests()[0])


def _buffer() -> Buffer:
    return Buffer(np.zeros(BUFFER, np.int64), np.zeros(BUFFER, np.uint8), np.zeros(BUFFER, np.int32))


def _populate(workload: Workload) -> tuple[Workload, int, float]:
    """The workload, populated; pages touched, CPU-seconds."""
    buffer, pages, start = _buffer(), 0, time.thread_time()
    while count := workload.populate(0, buffer):
        pages += count
    return workload, pages, time.thread_time() - start


def _generate(workload: Workload) -> float:
    """Accesses per CPU-second."""
    buffer, count, start = _buffer(), 0, time.thread_time()
    while count < ACCESSES:
        count += workload.generate(0, buffer)
    return count / (time.thread_time() - start)
