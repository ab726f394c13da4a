"""CPU clocks of threads, living and dead."""

import os
import threading
import time

from proto import clocks


def _burn(cpu_s: float) -> None:
    end = time.thread_time() + cpu_s
    while time.thread_time() < end:
        pass


def test_each_thread_has_its_own_clock_and_they_add_up_to_the_process() -> None:
    started, finish = threading.Event(), threading.Event()

    def work() -> None:
        _burn(0.05)
        started.set()
        finish.wait()

    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    tids = clocks.thread_ids()
    assert {threading.get_native_id(), thread.native_id} <= set(tids)
    assert clocks.thread_cpu_ns(thread.native_id or 0) >= 50_000_000
    before = clocks.thread_cpu_ns(threading.get_native_id())
    total = sum(clocks.thread_cpu_ns(tid) for tid in tids)
    assert before <= time.thread_time_ns()
    # Threads that ended before count for the process and for no thread.
    assert total <= time.process_time_ns()
    finish.set()
    thread.join()


def test_a_thread_that_is_gone_has_no_time() -> None:
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    while thread.native_id in clocks.thread_ids():
        pass  # joined is not yet gone from the kernel
    assert clocks.thread_cpu_ns(thread.native_id or 0) == 0


def test_a_process_can_outlive_its_other_threads() -> None:
    pid = os.fork()
    if pid == 0:
        finish = threading.Event()
        thread = threading.Thread(target=finish.wait)
        thread.start()
        too_early = clocks.outlive_other_threads(0.01)
        finish.set()
        alone = clocks.outlive_other_threads() and clocks.thread_ids() == [os.getpid()]
        os._exit(int(too_early or not alone))
    assert os.waitpid(pid, 0)[1] == 0


def test_a_dead_childs_main_thread_is_read_before_it_is_reaped() -> None:
    pid = os.fork()
    if pid == 0:
        _burn(0.1)
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    main_ns = clocks.zombie_main_thread_ns(pid)
    _, _, usage = os.wait4(pid, 0)
    wait4_ns = (usage.ru_utime + usage.ru_stime) * 1e9
    if os.path.exists("/proc/self/schedstat"):
        assert 100_000_000 <= main_ns <= wait4_ns * 1.02 + 1_000_000
    else:
        assert main_ns == -1
    assert clocks.zombie_main_thread_ns(pid) == -1
