"""mmu_lock as a calendar, against an account of who holds which instant, kept in plain Python."""

from hypothesis import given
from hypothesis import strategies as st

from guestd import mmu_lock
from guestd.jit import kernel
from guestd.mmu_lock import BIN_PS, new_mmu_lock
from proto.arrays import Words


@kernel
def hold(lock: Words, time_ps: int, hold_ps: int) -> int:
    return mmu_lock.hold(lock, time_ps, hold_ps)


@kernel
def wait_for(lock: Words, time_ps: int) -> int:
    return mmu_lock.wait_for(lock, time_ps)


REQUESTS = st.lists(st.tuples(st.integers(0, 40 * BIN_PS), st.integers(1, 5 * BIN_PS)), max_size=60)


@given(requests=REQUESTS)
def test_nobody_holds_a_bin_for_longer_than_it_lasts(requests: list[tuple[int, int]]) -> None:
    """In whatever order they come: every hold is served in full, and no instant twice."""
    lock = new_mmu_lock()
    for time_ps, hold_ps in requests:
        hold(lock, time_ps, hold_ps)
    assert lock[1].max() <= BIN_PS
    assert lock[1].sum() == sum(hold_ps for _, hold_ps in requests)


@given(requests=REQUESTS, at=st.integers(0, 200 * BIN_PS))
def test_a_wait_ends_at_the_first_bin_with_room(requests: list[tuple[int, int]], at: int) -> None:
    lock = new_mmu_lock()
    for time_ps, hold_ps in requests:
        before = wait_for(lock, time_ps)
        assert hold(lock, time_ps, hold_ps) == before
    held = {int(number): int(ps) for number, ps in zip(*lock, strict=True) if ps}
    number = at // BIN_PS
    while held.get(number, 0) == BIN_PS:
        number += 1
    assert wait_for(lock, at) == max(0, number * BIN_PS - at)


def test_who_comes_later_in_program_order_may_be_earlier_in_time() -> None:
    """vCPUs run in turns: a request of the future does not delay one of the past."""
    lock = new_mmu_lock()
    assert hold(lock, 1000 * BIN_PS, 3 * BIN_PS) == 0
    assert hold(lock, 10 * BIN_PS, 3 * BIN_PS) == 0
    assert hold(lock, 11 * BIN_PS, BIN_PS) == 2 * BIN_PS
    assert wait_for(lock, 1001 * BIN_PS) == 2 * BIN_PS


def test_the_ring_forgets_what_is_long_past() -> None:
    lock = new_mmu_lock()
    hold(lock, 0, 4 * BIN_PS)
    assert wait_for(lock, mmu_lock.BINS * BIN_PS) == 0
