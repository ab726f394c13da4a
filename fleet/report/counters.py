"""Figures of counters at the end of a run: flushes by instruction, latency percentiles, memory by tier."""

from collections.abc import Sequence

from fleet.report.figure import NO_MARKER, Absent, Axis, Figure, Kind, Look, Series, positions, values
from fleet.report.subject import Subject

INSTRUCTIONS = (
    "invlpg", "invpcid_0", "mov_cr3", "invvpid_ctx", "invept_global",
)  # fmt: skip
PERCENTILES = ("p50", "p90", "p99")
_MIB = 1 << 20


def flushes(found: Sequence[Subject]) -> Figure | Absent:
    """TLB instructions as executed, stacked."""
    title = "TLB flushes by instruction"
    having = [subject for subject in found if subject.total(f"instructions.{INSTRUCTIONS[0]}") is not None]
    if not having:
        return Absent(title, "no VM counted its TLB instructions")
    series: list[Series] = []
    for name in INSTRUCTIONS:
        counts = [s.mean if (s := subject.total(f"instructions.{name}")) else 0.0 for subject in having]
        if any(counts):
            look = Look(hatch=len(series), colour=int(name.startswith("inve")))
            series.append(Series(name, positions(len(having)), values(counts), look, "bar"))
    if not series:
        return Absent(title, "not one TLB instruction was executed in the run phase")
    note = "As executed, all VMs together. Orange outline: INVEPT, which a host's own remapping needs."
    x = Axis("", "", categories=tuple(subject.label for subject in having))
    return Figure("flushes", title, x, Axis("executed in the run phase", "instructions"), tuple(series), note)


def latency(found: Sequence[Subject]) -> Figure | Absent:
    """Percentiles of the access latency."""
    title = "Latency percentiles"
    having = [subject for subject in found if subject.mean("access.latency_ns.p50") is not None]
    if not having:
        return Absent(title, "no VM has a latency histogram")
    series = [
        Series(
            name,
            positions(len(having)),
            values([s.mean if (s := subject.mean(f"access.latency_ns.{name}")) else None for subject in having]),
            Look.number(number),
            "points",
        )
        for number, name in enumerate(PERCENTILES)
    ]
    several = any(len(fleet) > 1 for subject in having for fleet in subject.fleets)
    note = "Of all accesses of the run phase, walks included." + (" Mean over the VMs' percentiles." if several else "")
    x = Axis("", "", categories=tuple(subject.label for subject in having))
    return Figure("latency", title, x, Axis("access latency", "ns", log=True), tuple(series), note)


def occupancy(found: Sequence[Subject]) -> Figure | Absent:
    """What of each tier a VM has, and what of its memory it ever wrote to."""
    title = "Tier occupancy per VM"
    if not found:
        return Absent(title, "no VM left a summary")
    series = [_sizes("fast tier", "memory.fast_bytes", found, Look(hatch=0), "bar")]
    series.append(_sizes("slow tier", "memory.slow_bytes", found, Look(hatch=2), "bar"))
    for number, (name, path) in enumerate(_MARKS):
        if any(s.high > 0 for subject in found if (s := subject.total(path)) is not None):
            series.append(_sizes(name, path, found, Look(NO_MARKER, number, number + 1), "points"))
    note = "Bars: the guest's memory on each tier (mean over VMs); marks: what of it the host backed, and what is huge."
    x = Axis("", "", categories=tuple(subject.label for subject in found))
    return Figure("occupancy", title, x, Axis("memory of a VM", "MiB"), tuple(series), note)


_MARKS = (("backed by the host at most", "memory.backed_bytes"), ("in huge pages", "memory.huge_bytes"))


def _sizes(name: str, path: str, found: Sequence[Subject], look: Look, kind: Kind) -> Series:
    sizes = [s.mean / _MIB if (s := subject.mean(path)) else None for subject in found]
    return Series(name, positions(len(found)), values(sizes), look, kind)
