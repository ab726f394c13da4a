"""The meter: work is booked to the stage that is current, modelled time moves the thread's clock."""

import numpy as np
import pytest

from guestd.jit import kernel
from guestd.meter import (
    CALLS,
    CLASSIFY,
    INTERRUPT,
    KTHREAD,
    MIGRATE,
    STAGES,
    TRACK,
    Meter,
    meter_cost_ns,
    metered,
    thread_cpu_ns,
)
from proto.arrays import Words


@metered
def spin(values: Words, rounds: int) -> int:
    """Work that no compiler folds away."""
    total = 0
    for _ in range(rounds):
        for i in range(values.size):
            values[i] = values[i] * 1103515245 + 12345
            total ^= values[i]
    return total


@kernel
def plain_sum(values: Words) -> int:
    total = 0
    for value in values:
        total += value
    return total


def test_a_metered_kernel_books_its_cpu_to_the_current_stage_and_returns_its_result() -> None:
    meter, values = Meter(), np.arange(1000, dtype=np.int64)
    expected = spin(Meter().book, values.copy(), 50)
    before = thread_cpu_ns()
    with meter.stage(CLASSIFY):
        assert spin(meter.book, values, 50) == expected
    spent = thread_cpu_ns() - before
    assert 0 < meter.book[CLASSIFY] <= spent
    assert meter.book[[TRACK, MIGRATE]].tolist() == [0, 0]
    assert meter.book[CALLS] == 1
    assert meter.measured_s() == {"track": 0, "classify": meter.book[CLASSIFY] / 1e9, "migrate": 0}


def test_stages_nest_and_come_back_after_an_error() -> None:
    meter = Meter()
    with meter.stage(CLASSIFY):
        with pytest.raises(ValueError, match="inside"), meter.stage(MIGRATE):
            meter.charge(5)
            raise ValueError("inside")
        meter.charge(7)
    meter.charge(11)
    assert meter.modelled_s() == {"track": 11e-12, "classify": 7e-12, "migrate": 5e-12}
    assert meter.now == 23


def test_modelled_time_is_kept_by_context() -> None:
    meter = Meter()
    meter.charge(3)
    meter.context = INTERRUPT
    meter.charge(4)
    assert meter.modelled_ps[KTHREAD].tolist() == [3, 0, 0]
    assert meter.modelled_ps[INTERRUPT].tolist() == [4, 0, 0]


def test_metered_takes_a_kernel_as_it_is() -> None:
    meter = Meter()
    assert metered(plain_sum)(meter.book, np.arange(10, dtype=np.int64)) == 45
    assert meter.book[CALLS] == 1


def test_the_thread_clock_never_runs_back_and_a_call_costs_something() -> None:
    readings = [thread_cpu_ns() for _ in range(1000)]
    assert readings == sorted(readings)
    assert meter_cost_ns(10_000) > 0
    assert len(STAGES) == 3
