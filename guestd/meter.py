"""CPU accounting of tiering work: measured by the thread's CPU clock inside compiled code, modelled by operations.

A *metered* kernel reads the thread's CPU clock (CLOCK_THREAD_CPUTIME_ID) right after its arguments are unpacked and
again when it is done, and books the difference to the stage that is current. Python dispatch and thread hand-over stay
outside and end up in `other` (architecture 3.3). The modelled figure is what the same operations cost on the host of
the profile; it advances the virtual clock of the thread that does the work.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, Concatenate, NamedTuple, ParamSpec, Self, TypeVar, cast

import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from guestd.jit import kernel
from proto.arrays import Words
from proto.counters import Counters, new_counters
from proto.units import PS_PER_S

TRACK, CLASSIFY, MIGRATE = 0, 1, 2
STAGES = ("track", "classify", "migrate")

TASK, KTHREAD, INTERRUPT, HOST_THREAD = 0, 1, 2, 3
CONTEXTS = ("task", "kthread", "interrupt", "host_thread")

CURRENT = 3
CALLS = 4
READ_NS = 5
"""What reading the clock adds between two readings: taken off each call, so that the meter is in no stage."""

P = ParamSpec("P")
R = TypeVar("R")


def _clock_intrinsic(typingctx: Any) -> Any:
    """clock_gettime(CLOCK_THREAD_CPUTIME_ID) in nanoseconds, called from compiled code."""
    signature = types.int64()

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        from llvmlite import ir

        int64, int32 = ir.IntType(64), ir.IntType(32)
        timespec = cast(Any, cgutils).alloca_once(builder, int64, size=2)
        function = cast(Any, cgutils).get_or_insert_function(
            builder.module, ir.FunctionType(int32, [int32, int64.as_pointer()]), "clock_gettime"
        )
        builder.call(function, [int32(time.CLOCK_THREAD_CPUTIME_ID), timespec])
        seconds = builder.load(timespec)
        nanoseconds = builder.load(builder.gep(timespec, [int32(1)]))
        return builder.add(builder.mul(seconds, int64(1_000_000_000)), nanoseconds)

    return signature, codegen


_thread_cpu_ns: Callable[[], int] = cast(Any, intrinsic(_clock_intrinsic))


@kernel
def thread_cpu_ns() -> int:
    """CPU time of the calling thread, ns."""
    return int(_thread_cpu_ns())


def _timed(book: Words, *args: Any) -> Any:
    start = _thread_cpu_ns()
    result = _inner(*args)  # type: ignore[name-defined]  # noqa: F821 -- bound by `metered`
    book[book[CURRENT]] += _thread_cpu_ns() - start - book[READ_NS]
    book[CALLS] += 1
    return result


def metered(function: Callable[P, R]) -> Callable[Concatenate[Words, P], R]:
    """Compile ``function`` as a kernel that takes the meter's array as an additional first argument and books itself.

    The wrapper finds its callee among its globals: numba's cache cannot recognise a closure in the next process.
    """
    inner = function if hasattr(function, "py_func") else kernel(function)
    name = f"metered_{function.__name__}"
    timed = FunctionType(_timed.__code__, {**globals(), "_inner": inner}, name)
    timed.__qualname__ = f"{function.__module__}.{name}"
    timed.__doc__ = function.__doc__
    timed.__module__ = function.__module__
    return cast(Callable[Concatenate[Words, P], R], kernel(timed))


class Meter:
    """Accounts of one VM's tiering.

    ``book``: int64[6], measured ns per stage, current stage, metered calls, clock reading. ``modelled_ps``: int64[4, 3]
    by context and stage. ``now``: virtual time of the thread at work, ps; ``outside_ps``: how much of it the host had
    its vCPU, in exits that the work met.
    """

    def __init__(self) -> None:
        self.book = np.zeros(6, np.int64)
        self.book[READ_NS] = _least_reading(1000)
        self.modelled_ps = np.zeros((len(CONTEXTS), len(STAGES)), np.int64)
        self.context = KTHREAD
        self.now = 0
        self.outside_ps = 0

    @contextmanager
    def stage(self, stage: int) -> Iterator[None]:
        """Everything inside is work of ``stage``."""
        before = int(self.book[CURRENT])
        self.book[CURRENT] = stage
        try:
            yield
        finally:
            self.book[CURRENT] = before

    def charge(self, ps: int) -> None:
        """Model ``ps`` of work of the current stage; the thread's virtual time moves on."""
        self.modelled_ps[self.context, self.book[CURRENT]] += ps
        self.now += ps

    def wait(self, ps: int) -> None:
        """The thread's vCPU is in an exit for ``ps``, which is no work of any stage; its virtual time moves on."""
        self.outside_ps += ps
        self.now += ps

    def charge_elsewhere(self, ps: int) -> None:
        """Model work of the current stage that other threads did meanwhile."""
        self.modelled_ps[self.context, self.book[CURRENT]] += ps

    def measured_s(self) -> dict[str, float]:
        """CPU-seconds per stage."""
        return {name: float(self.book[i]) / 1e9 for i, name in enumerate(STAGES)}

    def modelled_s(self) -> dict[str, float]:
        """CPU-seconds per stage, all contexts."""
        return {name: float(self.modelled_ps[:, i].sum()) / 1e12 for i, name in enumerate(STAGES)}


class Snapshot(NamedTuple):
    """Accounts of a VM's tiering at one time, on either side of the boundary."""

    counters: Counters
    measured_ns: Words
    """int64[STAGES]"""
    modelled_ps: Words
    """int64[STAGES]"""
    cpu_ns: int
    """Of the agent in all."""

    @classmethod
    def take(cls, counters: Counters, meter: Meter, cpu_ns: int) -> Self:
        """Copies, so that the originals may go on."""
        return cls(counters.copy(), meter.book[: len(STAGES)].copy(), meter.modelled_ps.sum(axis=0), cpu_ns)

    @classmethod
    def at_boot(cls) -> Self:
        """Nothing yet."""
        return cls.take(new_counters(), Meter(), 0)

    def cpu_since(self, before: Self) -> dict[str, dict[str, float]]:
        """CPU-seconds by stage since then: ``measured_s`` and ``modelled_s`` of `agent_cpu` in summary.json."""
        measured = dict(zip(STAGES, ((self.measured_ns - before.measured_ns) / 1e9).tolist(), strict=True))
        modelled = dict(zip(STAGES, ((self.modelled_ps - before.modelled_ps) / PS_PER_S).tolist(), strict=True))
        total = (self.cpu_ns - before.cpu_ns) / 1e9
        return {
            "measured_s": {**measured, "other": total - sum(measured.values()), "total": total},
            "modelled_s": {**modelled, "total": sum(modelled.values())},
        }

    def cores_since(self, before: Self, run_s: float) -> dict[str, float]:
        """CPU of all stages since then over ``run_s`` virtual seconds: ``measured_cores`` and ``modelled_cores``."""
        measured_ns = int((self.measured_ns - before.measured_ns).sum())
        modelled_ps = int((self.modelled_ps - before.modelled_ps).sum())
        return {"measured_cores": measured_ns / 1e9 / run_s, "modelled_cores": modelled_ps / PS_PER_S / run_s}


def meter_cost_ns(calls: int = 2000) -> float:
    """What one metered call costs in all (two clock readings), by making as many."""
    start = thread_cpu_ns()
    for _ in range(calls):
        _least_reading(1)
    return (thread_cpu_ns() - start) / calls


@kernel
def _least_reading(times: int) -> int:
    """The least difference between two readings with nothing in between, ns."""
    least = 1 << 62
    for _ in range(times):
        start = _thread_cpu_ns()
        least = min(least, _thread_cpu_ns() - start)
    return least
