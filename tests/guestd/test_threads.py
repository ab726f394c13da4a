"""A guest's two OS threads: named, one at a time, each with its own clock; and the stand-in on one thread."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guestd.threads import Inline, OsThreads, Threads


@pytest.fixture
def threads() -> Iterator[OsThreads]:
    both = OsThreads()
    yield both
    both.close()


@pytest.fixture(params=[Inline, OsThreads])
def either(request: pytest.FixtureRequest) -> Iterator[Threads]:
    both: Threads = request.param()
    yield both
    if isinstance(both, OsThreads):
        both.close()


def _burn(cpu_s: float) -> None:
    end = time.thread_time() + cpu_s
    while time.thread_time() < end:
        pass


def _fail() -> None:
    raise ValueError("boom")


def test_the_kernel_knows_the_threads_by_name(threads: OsThreads) -> None:
    names = {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}
    assert {"vcpu", "agent"} <= names
    vcpu, agent = threads.native_ids
    assert Path(f"/proc/self/task/{vcpu}/comm").read_text() == "vcpu\n"
    assert Path(f"/proc/self/task/{agent}/comm").read_text() == "agent\n"


def test_work_runs_on_its_thread(threads: OsThreads) -> None:
    assert (threads.on_vcpu(threading.get_native_id), threads.on_agent(threading.get_native_id)) == threads.native_ids


def test_result_and_arguments_pass(either: Threads) -> None:
    assert either.on_vcpu(divmod, 17, 5) == (3, 2)
    assert either.on_agent(divmod, 17, 5) == (3, 2)


@pytest.mark.parametrize("on", [lambda t: t.on_vcpu, lambda t: t.on_agent], ids=["vcpu", "agent"])
def test_an_exception_passes_and_the_thread_goes_on(
    either: Threads, on: Callable[[Threads], Callable[..., object]]
) -> None:
    with pytest.raises(ValueError, match="boom"):
        on(either)(_fail)
    assert on(either)(len, "abc") == 3


def test_one_may_call_the_other_and_itself(threads: OsThreads) -> None:
    def outer() -> tuple[int, int]:
        return threads.on_agent(threading.get_native_id), threads.on_vcpu(threading.get_native_id)

    vcpu, agent = threads.native_ids
    assert threads.on_vcpu(outer) == (agent, vcpu)


def test_each_clock_counts_its_own_work(either: Threads) -> None:
    either.on_vcpu(_burn, 0.03)
    vcpu_ns, agent_ns = either.vcpu_cpu_ns(), either.agent_cpu_ns()
    assert vcpu_ns >= 30_000_000 > agent_ns
    either.on_agent(_burn, 0.02)
    assert either.agent_cpu_ns() >= 20_000_000
    assert either.vcpu_cpu_ns() - vcpu_ns < 20_000_000


def test_nested_work_is_counted_once(either: Threads) -> None:
    either.on_vcpu(either.on_agent, _burn, 0.03)
    assert either.agent_cpu_ns() >= 30_000_000
    assert either.vcpu_cpu_ns() < 30_000_000


def test_a_finished_piece_of_work_keeps_nothing_alive(threads: OsThreads) -> None:
    class Big:
        gone = False

        def __del__(self) -> None:
            Big.gone = True

    threads.on_vcpu(id, Big())
    threads.on_vcpu(len, "")
    assert Big.gone


def test_hand_over_is_strict(threads: OsThreads) -> None:
    order: list[int] = []
    for number in range(500):
        (threads.on_vcpu if number % 2 else threads.on_agent)(order.append, number)
        assert order[-1] == number
    assert order == list(range(500))
