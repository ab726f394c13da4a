"""A hundred small guests through the real command line: time to ready, private memory of each, clean end.

Ready is when the last guest has said hello, counted from the first fork. Private memory is what a guest shares with
nobody (smaps_rollup, Private_*): by its own look at the end of the run, and the most that was seen from outside (which
the kernel shows to root only). The pages of its segment, mapped by the host too, are not in it.
"""

from collections.abc import Iterator

from benchmarks.cli import run_fleet
from benchmarks.figures import Figure, figure, progress

TITLE = "Fleet: 100 guests of 64 MiB, fleet run --vms 100 --memory 64MiB"
VMS = 100
MIB = 1 << 20


def run(quick: bool) -> Iterator[Figure]:
    """All figures."""
    ready, wall, own, outside, left, mismatches = [], [], [], [], [], []
    for repetition in range(1 if quick else 3):
        progress(f"fleet: run {repetition + 1}")
        arguments = ("--vms", str(VMS), "--memory", "64MiB", "--policy", "g-tpp", "--seconds", "0.05")
        result = run_fleet(arguments, watch=True)
        vms = result.summary["vms"]
        ready.append(result.summary["elapsed"]["ready_s"])
        wall.append(result.wall_s)
        own += [vm["memory"]["private_bytes"] / MIB for vm in vms]
        outside += [peak / MIB for peak in result.private_bytes.values()]
        left.append(float(result.left_behind + sum(vm["outcome"] != "ok" for vm in vms)))
        mismatches.append(float(sum(vm["integrity"]["mismatches"] for vm in vms)))
    yield figure("time to ready", "s wall", ready)
    yield figure("the whole command, 0.05 virtual seconds", "s wall", wall)
    yield figure("private memory per guest, its own last look", "MiB", own)
    if outside:
        yield figure("private memory per guest, most seen from outside", "MiB", outside)
    yield figure("guests that did not end well, processes left behind", "", left)
    yield figure("integrity mismatches", "", mismatches)
