"""CPU clocks of single threads, of a whole process, and of one that just died; all in nanoseconds.

The kernel keeps a run time per thread (`sum_exec_runtime`) that is exact to the nanosecond, unlike the tick counts of
/proc/PID/stat. Own threads are read through their POSIX CPU clock; clock_getcpuclockid(3) does not tell how to name
another thread's, the encoding is the kernel's (include/linux/posix-timers_types.h: ``~tid << 3 | CPUCLOCK_PERTHREAD |
CPUCLOCK_SCHED``). A dead child that is not yet reaped still shows its main thread's time in /proc/PID/schedstat.
"""

import os
import time

_PER_THREAD_SCHED = 6
_LOOK_S = 0.0005


def thread_ids() -> list[int]:
    """Kernel ids of this process's threads, ZeroMQ's own among them."""
    return sorted(int(name) for name in os.listdir("/proc/self/task"))


def thread_cpu_ns(tid: int) -> int:
    """CPU time of the thread ``tid`` of this process; 0 if it is gone."""
    try:
        return time.clock_gettime_ns(~tid << 3 | _PER_THREAD_SCHED)
    except OSError:
        return 0


def outlive_other_threads(longest_s: float = 1.0) -> bool:
    """Wait until the kernel has let go of every thread of this process but the calling one; whether it has in time.

    A joined thread is not yet gone: it still holds a share of the address space, and whichever thread gives up the last
    share pays for taking it all down (kernel/exit.c, do_exit: exit_mm). Nobody is woken then, as what a join waits for
    comes earlier (mm_release), so it is looked for; as a rule they are gone at the first look.
    """
    deadline_s = time.monotonic() + longest_s
    while len(thread_ids()) > 1:
        if time.monotonic() > deadline_s:
            return False
        time.sleep(_LOOK_S)
    return True


def zombie_main_thread_ns(pid: int) -> int:
    """CPU time of the main thread of ``pid``, a dead child that is not yet reaped; -1 if the kernel does not tell."""
    try:
        with open(f"/proc/{pid}/schedstat", "rb") as file:
            return int(file.read().split()[0])
    except (OSError, ValueError, IndexError):
        return -1
