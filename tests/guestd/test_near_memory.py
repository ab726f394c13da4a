"""guestd.near_memory: which lines are in DRAM, against a dictionary, and what a swap moves."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from guestd.jit import kernel
from guestd.near_memory import copy_page, may_swap, misses, swap_in
from proto.arrays import Words

PAIRS = 4
BYTES = np.array([[64, 64], [256, 0]], np.int64)


@kernel
def access(near: Words, frame: int, address: int, budget: Words, moved: Words) -> int:
    """As the engine does it."""
    missed = misses(near, PAIRS, frame, address)
    if missed:
        swap_in(near, PAIRS, frame, address, budget, moved, moved, 0)
    return int(missed)


@kernel
def copy(near: Words, frame: int, write: int, budget: Words) -> None:
    copy_page(near, PAIRS, frame, write, budget)


@kernel
def allowed(budget: Words) -> bool:
    return may_swap(budget)


STEPS = st.lists(st.tuples(st.integers(0, 2 * PAIRS - 1), st.integers(0, 4095), st.sampled_from("arw")), max_size=60)


@given(STEPS)
def test_the_line_that_was_used_last_is_in_dram(steps: list[tuple[int, int, str]]) -> None:
    near, budget, moved = np.zeros(PAIRS, np.int64), np.zeros((2, 2), np.int64), np.zeros((2, 2), np.int64)
    owner: dict[tuple[int, int], int] = {}
    for frame, address, what in steps:
        lines = [address // 64] if what == "a" else range(64)
        missed = sum(owner.get((frame % PAIRS, line), frame % PAIRS) != frame for line in lines)
        before = budget.copy()
        if what == "a":
            assert access(near, frame, address, budget, BYTES) == missed
            # Beside the read of the line, which the engine books.
            moved = missed * np.array([[64, 0], [64, 256]])
        else:
            copy(near, frame, int(what == "w"), budget)
            moved = np.full((2, 2), 64 * missed)
            moved[int(what == "w"), 0] += 4096 if what == "w" else 4096 - 64 * missed
        assert (before - budget == moved).all()
        owner.update({(frame % PAIRS, line): frame for line in lines})


def test_a_frame_whose_partner_is_unused_always_hits() -> None:
    near, budget = np.zeros(PAIRS, np.int64), np.zeros((2, 2), np.int64)
    assert [access(near, 2, 64 * line, budget, BYTES) for line in range(64)] == [0] * 64
    # A slow frame hits once its lines are there.
    assert [access(near, PAIRS + 3, 64 * (line % 64), budget, BYTES) for line in range(128)] == [1] * 64 + [0] * 64


def test_a_swap_needs_bandwidth_both_ways_in_both_tiers() -> None:
    for way, tier in np.ndindex(2, 2):
        budget = np.ones((2, 2), np.int64)
        assert allowed(budget)
        budget[way, tier] = 0
        assert not allowed(budget)
