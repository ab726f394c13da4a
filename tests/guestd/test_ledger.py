"""The ledger of a process: every thread once, memory in bytes."""

import threading

from guestd import ledger
from guestd.threads import OsThreads
from proto import clocks


def test_every_thread_is_in_exactly_one_account() -> None:
    threads = OsThreads()
    ready, finish = threading.Event(), threading.Event()

    def runtime() -> None:
        sum(range(2_000_000))
        ready.set()
        finish.wait()

    other = threading.Thread(target=runtime)
    other.start()
    ready.wait()
    threads.on_vcpu(sum, range(4_000_000))
    threads.on_agent(sum, range(1_000_000))
    before = sum(clocks.thread_cpu_ns(tid) for tid in clocks.thread_ids()) / 1e9
    runtime_s = clocks.thread_cpu_ns(other.native_id or 0) / 1e9
    cpu = ledger.process_cpu(*threads.native_ids)
    after = sum(clocks.thread_cpu_ns(tid) for tid in clocks.thread_ids()) / 1e9
    assert set(cpu) == {"vcpu_s", "agent_s", "control_s", "runtime_s"}
    assert before <= sum(cpu.values()) <= after
    assert cpu["vcpu_s"] > cpu["agent_s"] > 0
    assert cpu["runtime_s"] >= runtime_s > 0
    finish.set()
    other.join()
    threads.close()


def test_memory_grows_by_what_is_touched() -> None:
    before = ledger.process_memory()
    touched = bytearray(b"x") * (32 << 20)
    after = ledger.process_memory()
    assert after["private_bytes"] - before["private_bytes"] >= 30 << 20
    assert after["rss_bytes"] >= after["private_bytes"]
    assert len(touched) == 32 << 20
