"""What crossing a boundary costs on this machine: the hypercall, the hand-over between a guest's threads, the meter.

The EPT-fault round trip is what guests of real runs report (`hypercalls.rtt_us`): process to process over ZeroMQ, a
batch of faults each. The hand-over is that of a guest process (`guestd.threads.OsThreads`), there and back. The meter's
cost is that of two reads of a thread's CPU clock from compiled code, as `fleet run` books it under `meter_s`.
"""

import time
from collections.abc import Iterator

from benchmarks.cli import run_fleet
from benchmarks.figures import Figure, figure, progress
from guestd.meter import meter_cost_ns
from guestd.threads import OsThreads

TITLE = "Boundaries"
HAND_OVERS = 20_000


def _nothing() -> None: ...


def run(quick: bool) -> Iterator[Figure]:
    """All figures."""
    repetitions = 3 if quick else 5
    progress("hypercall: EPT faults of real runs")
    calls, per_call, p50, p99 = [], [], [], []
    for _ in range(repetitions):
        arguments = ("--vms", "1", "--policy", "none", "--memory", "512MiB", "--seconds", "0.01")
        vm = run_fleet(arguments).summary["vms"][0]
        count = vm["hypercalls"]["count"]["ept_fault"]
        calls.append(float(count))
        per_call.append(vm["populate"]["kvm"]["exits"]["ept_violation"] / count)
        p50.append(vm["hypercalls"]["rtt_us"]["p50"])
        p99.append(vm["hypercalls"]["rtt_us"]["p99"])
    yield figure("EPT-fault messages per run", "messages", calls)
    yield figure("EPT faults per message", "faults", per_call)
    yield figure("EPT-fault round trip, p50", "us", p50)
    yield figure("EPT-fault round trip, p99", "us", p99)
    progress("hypercall: hand-over between threads, meter")
    yield from _hand_over(repetitions)
    yield figure("meter: one metered call", "ns CPU", [meter_cost_ns() for _ in range(repetitions)])


def _hand_over(repetitions: int) -> Iterator[Figure]:
    threads = OsThreads()
    wall, agent = [], []
    for _ in range(repetitions):
        start, before = time.perf_counter_ns(), threads.agent_cpu_ns()
        for _ in range(HAND_OVERS):
            threads.on_agent(_nothing)
        wall.append((time.perf_counter_ns() - start) / HAND_OVERS)
        agent.append((threads.agent_cpu_ns() - before) / HAND_OVERS)
    threads.close()
    yield figure("hand-over to the agent's thread and back", "ns wall", wall)
    yield figure("of it on the agent's thread (floor per activation)", "ns CPU", agent)
