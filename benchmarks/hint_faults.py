"""Hint faults of g-tpp in compiled code against the same through the policy's stages in Python.

Two guests run GUPS 9:1 under a scanner that never rests; one has its compiled form taken away. Both do the same
accesses and faults, in turns. On one thread, so that hand-over (`hypercall`) is in neither.
"""

from collections.abc import Iterator

from benchmarks.engine import MEGA, Subject
from benchmarks.figures import Figure, figure, progress
from guestd.hint_faults import new_hints
from proto.counters import C

TITLE = "Hint faults: accesses per CPU-second under g-tpp"
SCAN = ("policy.scan_delay_ms=0", "policy.scan_period_min_ms=1", "policy.scan_size_mb=64",
        "policy.adapt_scan_period=false")  # fmt: skip


def run(quick: bool) -> Iterator[Figure]:
    """All figures; ``quick``: a small guest, fewer repetitions."""
    repetitions, accesses, size = (3, 200_000, "256MiB") if quick else (7, 1_000_000, "4GiB")
    progress(f"hint faults: populating 2 guests of {size}")
    compiled, staged = (Subject(size, SCAN, "g-tpp", 2) for _ in range(2))
    guest = staged.guest
    guest._hints = new_hints(None, guest.config.costs, guest.view.hint_fault_ps, guest.meter)
    speeds: dict[str, list[float]] = {"compiled": [], "by stages": []}
    for _ in range(repetitions + 1):
        for values, subject in zip(speeds.values(), (compiled, staged), strict=True):
            done, cpu_s, _ = subject.engine(accesses)
            values.append(done / cpu_s / MEGA)
    counters = compiled.guest.machine.counters
    yield figure("accesses per hint fault", "accesses",
                 [counters[C.access__total] / counters[C.vmstat__numa_hint_faults]])  # fmt: skip
    fast, slow = speeds.values()
    for name, values in speeds.items():
        yield figure(name, "M acc/s", values[1:])
    yield figure("compiled / by stages", "ratio", [a / b for a, b in zip(fast[1:], slow[1:], strict=True)])
