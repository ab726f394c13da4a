"""Speed of the engine: accesses per second of one guest on one core, against a bare gather through the same tables.

The guest runs GUPS (uniform, and 9:1 on a hot set) with one vCPU under `none`, through both cores in one process
(`fleet.in_process`), so that barrier, generation and report of each quantum are in the figure. Its memory is populated
by its own first touches and lies in a memfd like a real run's. The yardstick is the least that any emulator of this
design must do: look up the GPT entry of a random page, the EPT entry of its frame, the stamp of that one's frame, and
write the new version to stamp and GPT entry; no TLB, no cost, no check. It runs over the guest's own tables, on blocks
of addresses from the guest's own generator: drawn inside the timed loop, as the engine draws them, or beforehand. Both
take turns. It is a plain loop without software prefetches, so that the processor alone overlaps its cache misses; the
engine, which prefetches, can be ahead of it where the tables fit no cache.
"""

import time
from collections.abc import Callable, Iterator

import numpy as np

from benchmarks.figures import Figure, figure, progress
from fleet.in_process import InProcessFleet, shared_memory
from fleet.spec import load
from guestd.guest import Guest
from guestd.jit import assume, kernel
from guestd.vcpu import BUFFER
from guestd.workloads.base import Buffer
from proto.arrays import Words
from proto.counters import C
from proto.entry import (
    ENTRY_VERSION_MASK,
    ENTRY_VERSION_ONE,
    FRAME_MASK,
    FRAME_SHIFT,
    STAMP_VERSION_MASK,
)
from proto.units import PAGE_SHIFT

TITLE = "Engine: one guest, one core, 4 KiB pages; M acc/s = million accesses per CPU-second unless it says wall"
SIZES = ("64MiB", "16GiB", "128GiB")
QUICK_SIZES = ("64MiB", "4GiB")
MIXES = {"uniform": ("workload.distribution=uniform",), "9:1": ()}
MEGA = 1e6


@kernel
def _gather(address: Words, gpt: Words, ept: Words, stamps: Words) -> int:
    """The bare three-level read-modify-write gather over a block of addresses (int64[n])."""
    total = 0
    for i in range(address.size):
        assume(address[i] >= 0)
        page = address[i] >> PAGE_SHIFT
        g = gpt[page]
        frame = (ept[(g & FRAME_MASK) >> FRAME_SHIFT] & FRAME_MASK) >> FRAME_SHIFT
        stamp = stamps[frame]
        total += stamp
        gpt[page] = (g & ~ENTRY_VERSION_MASK) | ((g + ENTRY_VERSION_ONE) & ENTRY_VERSION_MASK)
        stamps[frame] = (stamp & ~STAMP_VERSION_MASK) | ((stamp + 1) & STAMP_VERSION_MASK)
    return total


class Subject:
    """A populated guest and the ways to drive its tables. Each way returns (accesses, CPU-seconds, wall seconds)."""

    def __init__(self, memory: str, settings: tuple[str, ...], policy: str = "none", vcpus: int = 1) -> None:
        # Longer than any measurement; the run is left, not finished.
        flags = {"policy": policy, "workload": "gups", "memory": memory, "vcpus": vcpus, "seconds": 100_000}
        experiment = load(None, flags, settings)
        self.fleet = InProcessFleet(experiment.host_config(), experiment.guests(), make_memory=shared_memory)
        self.guest: Guest = self.fleet.guests[0]
        start = time.perf_counter()
        while self.guest.phase == "populate":
            self.fleet.step()
        self.populate_s = time.perf_counter() - start
        self._block = Buffer(np.zeros(BUFFER, np.int64), np.zeros(BUFFER, np.uint8), np.zeros(BUFFER, np.int32))

    def engine(self, accesses: int) -> tuple[int, float, float]:
        """The guest itself."""
        counters = self.guest.machine.counters
        before = int(counters[C.access__total])
        cpu, wall = time.thread_time(), time.perf_counter()
        while counters[C.access__total] - before < accesses:
            self.fleet.step()
        return int(counters[C.access__total]) - before, time.thread_time() - cpu, time.perf_counter() - wall

    def gather(self, accesses: int) -> tuple[int, float, float]:
        """The bare gather, with its addresses drawn inside the timed loop."""
        blocks = accesses // BUFFER
        cpu, wall = time.thread_time(), time.perf_counter()
        for _ in range(blocks):
            self.guest.workload.generate(0, self._block)
            self._gather()
        return blocks * BUFFER, time.thread_time() - cpu, time.perf_counter() - wall

    def gather_precomputed(self, accesses: int) -> tuple[int, float, float]:
        """The bare gather alone."""
        blocks = accesses // BUFFER
        cpu = wall = 0.0
        for _ in range(blocks):
            self.guest.workload.generate(0, self._block)
            before_cpu, before_wall = time.thread_time(), time.perf_counter()
            self._gather()
            cpu += time.thread_time() - before_cpu
            wall += time.perf_counter() - before_wall
        return blocks * BUFFER, cpu, wall

    def _gather(self) -> None:
        machine = self.guest.machine
        _gather(self._block.address, machine.gpt, machine.ept, machine.stamps)


def run(quick: bool) -> Iterator[Figure]:
    """All figures of the engine; ``quick``: small guests only, fewer repetitions."""
    repetitions, accesses = (3, 2_000_000) if quick else (7, 8_000_000)
    progress("engine: loading kernels (compiling them takes a minute the first time)")
    Subject("64MiB", ()).gather(BUFFER)
    for size in QUICK_SIZES if quick else SIZES:
        for mix, settings in MIXES.items():
            progress(f"engine: {size} {mix}")
            yield from _compare(f"{size} {mix}", Subject(size, settings), repetitions, accesses)


def _compare(label: str, subject: Subject, repetitions: int, accesses: int) -> Iterator[Figure]:
    ways: dict[str, Callable[[int], tuple[int, float, float]]] = {
        "engine": subject.engine,
        "bare gather": subject.gather,
        "bare gather, index precomputed": subject.gather_precomputed,
    }
    pages = int(np.count_nonzero(subject.guest.machine.gpt))
    yield figure(f"{label}: populating", "M pages/s", [pages / subject.populate_s / MEGA])
    subject.engine(accesses // 4)  # caches and page tables of this machine
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    wall: list[float] = []
    for _ in range(repetitions):
        for name, way in ways.items():
            done, cpu_s, wall_s = way(accesses)
            cpu[name].append(done / cpu_s / MEGA)
            if name == "engine":
                wall.append(done / wall_s / MEGA)
    for name, rates in cpu.items():
        yield figure(f"{label}: {name}", "M acc/s", rates)
    yield figure(f"{label}: engine, wall clock", "M acc/s", wall)
    for (_, engine), (name, bare) in ((next(iter(cpu.items())), item) for item in list(cpu.items())[1:]):
        yield figure(f"{label}: engine / {name}", "ratio", [e / b for e, b in zip(engine, bare, strict=True)])
