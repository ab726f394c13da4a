"""Where a guest process's CPU and memory went, by its own clocks: `process_cpu` and part of `memory` of the summary.

vCPU engine, agent, control (the main thread) and runtime (every other thread: ZeroMQ's) are clocked each on its own,
so that their sum can be held against what wait4 reports (architecture 3.3). What a process does after the last look at
its clocks is in no ledger of its own: the end of the main thread is read by the zygote before it reaps.
"""

import os

from proto import clocks


def process_cpu(vcpu_tid: int, agent_tid: int) -> dict[str, float]:
    """CPU-seconds of each thread of this process: vcpu_s, agent_s, control_s, runtime_s."""
    main = os.getpid()
    runtime_ns = sum(clocks.thread_cpu_ns(tid) for tid in clocks.thread_ids() if tid not in (main, vcpu_tid, agent_tid))
    return {
        "vcpu_s": clocks.thread_cpu_ns(vcpu_tid) / 1e9,
        "agent_s": clocks.thread_cpu_ns(agent_tid) / 1e9,
        "control_s": clocks.thread_cpu_ns(main) / 1e9,
        "runtime_s": runtime_ns / 1e9,
    }


def process_memory() -> dict[str, int]:
    """Bytes of this process: rss_bytes (highest so far) and private_bytes (now; what it shares with no one)."""
    status = _fields("/proc/self/status")
    rollup = _fields("/proc/self/smaps_rollup")
    return {
        "rss_bytes": status["VmHWM"],
        "private_bytes": rollup["Private_Clean"] + rollup["Private_Dirty"] + rollup.get("Private_Hugetlb", 0),
    }


def _fields(path: str) -> dict[str, int]:
    """The ``Name:  123 kB`` lines of a file of /proc, in bytes."""
    with open(path, encoding="ascii", errors="replace") as file:
        parts = [line.split() for line in file]
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in parts if len(words) == 3 and words[2] == "kB"}
