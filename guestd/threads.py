"""Where a guest's work runs: on OS threads named ``vcpu`` and ``agent``, so that tools outside see the same split.

`top -H` and `pidstat -t` show a thread's name and CPU (architecture 3.3). The hand-over is strict: who hands work over
sleeps until it is done, so one thread runs at a time and nothing needs a lock. `Inline` runs everything on the calling
thread, for tests in one process and for warming up compiled code.
"""

import threading
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

import setproctitle

T = TypeVar("T")
_NULL_ACTIVATIONS = 200


class Threads(Protocol):
    """Runs functions on a guest's two threads and reads their CPU clocks."""

    def on_vcpu(self, function: Callable[..., T], *args: Any) -> T:
        """``function(*args)`` on the thread ``vcpu``; waits, returns its result, raises what it raised."""
        ...

    def on_agent(self, function: Callable[..., T], *args: Any) -> T:
        """``function(*args)`` on the thread ``agent``; waits, returns its result, raises what it raised."""
        ...

    def vcpu_cpu_ns(self) -> int:
        """CPU time of the thread ``vcpu`` so far, ns."""
        ...

    def agent_cpu_ns(self) -> int:
        """CPU time of the thread ``agent`` so far, ns."""
        ...


class Inline:
    """Both on the calling thread; each clock counts the time inside its own calls."""

    def __init__(self) -> None:
        self._vcpu_ns = 0
        self._agent_ns = 0

    def on_vcpu(self, function: Callable[..., T], *args: Any) -> T:
        """Call it."""
        start = time.thread_time_ns()
        inner = self._agent_ns
        try:
            return function(*args)
        finally:
            self._vcpu_ns += time.thread_time_ns() - start - (self._agent_ns - inner)

    def on_agent(self, function: Callable[..., T], *args: Any) -> T:
        """Call it."""
        start = time.thread_time_ns()
        inner = self._vcpu_ns
        try:
            return function(*args)
        finally:
            self._agent_ns += time.thread_time_ns() - start - (self._vcpu_ns - inner)

    def vcpu_cpu_ns(self) -> int:
        """CPU time inside `on_vcpu`, ns."""
        return self._vcpu_ns

    def agent_cpu_ns(self) -> int:
        """CPU time inside `on_agent`, ns."""
        return self._agent_ns


class _Worker:
    """One named OS thread that runs one thing at a time for whoever waits for it."""

    def __init__(self, name: str) -> None:
        # Two locks as binary semaphores. A hand-over and back costs two wake-ups: 5 us on one core, up to 50 us across
        # the cores of a virtual machine, whatever the primitive (locks, eventfds, pipes, with or without the GIL).
        self._go = threading.Lock()
        self._done = threading.Lock()
        self._go.acquire()
        self._done.acquire()
        self._work: tuple[Callable[..., Any], tuple[Any, ...]] | None = None
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._loop, args=(name,), name=name, daemon=True)
        self._thread.start()
        self._done.acquire()
        self.native_id = self._thread.native_id or 0
        self._clock = time.pthread_getcpuclockid(self._thread.ident or 0)

    def _loop(self, name: str) -> None:
        setproctitle.setthreadtitle(name)
        self._done.release()
        while True:
            self._go.acquire()
            if self._work is None:
                return
            function, args = self._work
            try:
                self._result = function(*args)
            except BaseException as error:  # handed to the waiting thread, whatever it is
                self._error = error
            self._done.release()

    def run(self, function: Callable[..., T], args: tuple[Any, ...]) -> T:
        if threading.get_ident() == self._thread.ident:
            return function(*args)
        self._work = (function, args)
        self._go.release()
        self._done.acquire()
        result, error = cast(T, self._result), self._error
        # Keep nothing alive: results may be views of arrays that are about to be freed.
        self._work, self._result, self._error = (_nothing, ()), None, None
        if error is not None:
            raise error
        return result

    def cpu_ns(self) -> int:
        return time.clock_gettime_ns(self._clock)

    def join(self) -> None:
        self._work = None
        self._go.release()
        self._thread.join()


def _nothing() -> None: ...


class OsThreads:
    """The two threads of a guest process; read their clocks before `close` ends them."""

    def __init__(self) -> None:
        self._vcpu = _Worker("vcpu")
        self._agent = _Worker("agent")

    @property
    def native_ids(self) -> tuple[int, int]:
        """Kernel thread ids of ``vcpu`` and ``agent``."""
        return self._vcpu.native_id, self._agent.native_id

    def on_vcpu(self, function: Callable[..., T], *args: Any) -> T:
        """Run it on ``vcpu``; called on that thread itself, it is a plain call."""
        return self._vcpu.run(function, args)

    def on_agent(self, function: Callable[..., T], *args: Any) -> T:
        """Run it on ``agent``; called on that thread itself, it is a plain call."""
        return self._agent.run(function, args)

    def vcpu_cpu_ns(self) -> int:
        """The thread's CPU clock, ns."""
        return self._vcpu.cpu_ns()

    def agent_cpu_ns(self) -> int:
        """The thread's CPU clock, ns."""
        return self._agent.cpu_ns()

    def close(self) -> None:
        """End both threads and wait for them."""
        self._vcpu.join()
        self._agent.join()


def null_activation_ns(threads: Threads) -> float:
    """CPU of an activation of the agent that does nothing, ns: the floor under every figure of the agent."""
    before = threads.agent_cpu_ns()
    for _ in range(_NULL_ACTIVATIONS):
        threads.on_agent(_nothing)
    return (threads.agent_cpu_ns() - before) / _NULL_ACTIVATIONS
