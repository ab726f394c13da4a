"""What each mechanism of the emulated hardware costs the emulator: speed with it over speed without it.

One guest runs GUPS 9:1 through both cores in one process. Each variant has a guest of its own, and all take turns, each
right after the plain engine. A ratio below 1 is a mechanism that slows the emulator down. What a mechanism costs the
emulated VM is another matter, and in the run's summary.
"""

from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.engine import MEGA, Subject
from benchmarks.figures import Figure, figure, progress

TITLE = "Mechanisms: accesses per CPU-second, as a ratio to the plain engine's"
SIZE, QUICK_SIZE = "4GiB", "256MiB"


class Variant(NamedTuple):
    """What differs from the plain engine: one vCPU, `none`, 4 levels, no PML, no PEBS."""

    settings: tuple[str, ...] = ()
    policy: str = "none"
    vcpus: int = 1


VARIANTS = {
    "the smallest walk caches: one set each": Variant((
        "host.pde_cache_entries=4", "host.ept_pde_cache_entries=4", "host.nested_tlb_entries=4",
    )),
    "an STLB a quarter as large": Variant(("host.stlb_entries=512",)),
    "5 levels in GPT and EPT": Variant(("guest.page_table_levels=5", "host.ept_levels=5")),
    "no last-level cache": Variant(("host.llc_bytes=1",)),
    "PML, drained every 100 ms": Variant(("host.pml=true", "host.pml_harvest=100")),
    "PEBS at 1 in 4093, and hyperplace's agent": Variant(policy="hyperplace"),
    "PEBS at 1 in 64, a PMI per record": Variant(
        ("policy.load_period=64", "policy.large_pebs=false"), policy="hyperplace"
    ),
    "2 vCPUs": Variant(vcpus=2),
    "2 vCPUs on one physical CPU": Variant(("host.pcpus=1",), vcpus=2),
}  # fmt: skip


def run(quick: bool) -> Iterator[Figure]:
    """All ratios; ``quick``: a small guest, fewer repetitions."""
    repetitions, accesses, size = (3, 1_000_000, QUICK_SIZE) if quick else (5, 4_000_000, SIZE)
    progress(f"mechanisms: populating {1 + len(VARIANTS)} guests of {size}")
    plain = Subject(size, ())
    others = {name: Subject(size, variant.settings, variant.policy, variant.vcpus)
              for name, variant in VARIANTS.items()}  # fmt: skip
    for subject in (plain, *others.values()):
        subject.engine(accesses)
    speeds: list[float] = []
    ratios: dict[str, list[float]] = {name: [] for name in others}
    for number in range(repetitions):
        progress(f"mechanisms: round {number + 1} of {repetitions}")
        for name, subject in others.items():
            speeds.append(_speed(plain, accesses))
            ratios[name].append(_speed(subject, accesses) / speeds[-1])
    yield figure("plain engine", "M acc/s", speeds)
    for name, values in ratios.items():
        yield figure(name, "ratio", values)


def _speed(subject: Subject, accesses: int) -> float:
    """Million accesses per CPU-second."""
    done, cpu_s, _ = subject.engine(accesses)
    return done / cpu_s / MEGA
