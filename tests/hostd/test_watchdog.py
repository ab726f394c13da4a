"""The watchdog: each guest that owes a word for too long, once; a suspended fleet is no hung fleet."""

from hypothesis import given
from hypothesis import strategies as st

from hostd.watchdog import MAX_STEP_S, Watchdog


def _pass(dog: Watchdog, now_s: float, seconds: float) -> float:
    for _ in range(round(seconds * 2)):
        now_s += 0.5
        dog.tick(now_s)
    return now_s


def test_who_owes_a_word_for_too_long_is_named_once() -> None:
    dog = Watchdog(10, 0.0)
    dog.expect(1)
    now_s = _pass(dog, 0.0, 5)
    dog.expect(2)
    now_s = _pass(dog, now_s, 5)
    assert dog.overdue() == []
    now_s = _pass(dog, now_s, 1)
    assert dog.overdue() == [1]
    assert dog.overdue() == []
    _pass(dog, now_s, 5)
    assert dog.overdue() == [2]


def test_a_sign_of_life_starts_the_time_again_but_makes_no_debt() -> None:
    dog = Watchdog(10, 0.0)
    dog.expect(1)
    now_s = _pass(dog, 0.0, 8)
    dog.refresh(1)
    dog.refresh(2)
    now_s = _pass(dog, now_s, 8)
    assert dog.overdue() == []
    _pass(dog, now_s, 3)
    assert dog.overdue() == [1]


def test_who_answered_owes_nothing() -> None:
    dog = Watchdog(1, 0.0)
    dog.expect(1)
    dog.settle(1)
    dog.settle(2)
    _pass(dog, 0.0, 5)
    assert dog.overdue() == []


def test_a_fleet_that_was_suspended_is_not_hung() -> None:
    dog = Watchdog(10, 0.0)
    dog.expect(1)
    dog.tick(3600.0)
    assert dog.overdue() == []
    _pass(dog, 3600.0, 10)
    assert dog.overdue() == [1]


@given(st.lists(st.floats(0, 100), max_size=50))
def test_awake_time_never_exceeds_the_bound_per_look(steps: list[float]) -> None:
    dog = Watchdog(len(steps) * MAX_STEP_S + 1e-6, 0.0)
    dog.expect(1)
    now_s = 0.0
    for step in steps:
        now_s += step
        dog.tick(now_s)
    assert dog.overdue() == []
