"""Random numbers: splitmix64 against its published algorithm in Python integers; permutations are permutations."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from guestd import random
from guestd.jit import kernel
from guestd.random import State, permutation, streams

MASK = (1 << 64) - 1


@kernel
def next_u64(state: State) -> np.uint64:
    return random.next_u64(state)


def splitmix64(state: int) -> tuple[int, int]:
    """(new state, output): Steele, Lea and Flood, OOPSLA'14, figure 17 with the mix of java.util.SplittableRandom."""
    state = (state + 0x9E3779B97F4A7C15) & MASK
    z = state
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return state, z ^ (z >> 31)


def test_known_answers() -> None:
    """The first outputs for seed 1234567, as every implementation of splitmix64 gives them."""
    state = np.array([1234567], np.uint64)
    outputs = [int(next_u64(state)) for _ in range(3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(seed=st.integers(0, MASK))
def test_kernel_is_the_algorithm(seed: int) -> None:
    compiled, plain = np.array([seed], np.uint64), seed
    for _ in range(5):
        plain, output = splitmix64(plain)
        assert int(next_u64(compiled)) == output
        assert int(compiled[0]) == plain


@given(seed=st.integers(0, (1 << 63) - 1), count=st.integers(1, 64))
def test_streams_differ_from_each_other_and_by_seed_and_salt(seed: int, count: int) -> None:
    states = streams(seed, count)
    assert states.shape == (count, 1)
    assert np.unique(states).size == count
    assert (streams(seed, count) == states).all()
    assert not np.intersect1d(streams(seed, count, salt=1), states).size
    assert not np.intersect1d(streams(seed + 1, count), states).size


@given(seed=st.integers(0, (1 << 63) - 1), count=st.integers(0, 2000))
def test_permutation_is_one(seed: int, count: int) -> None:
    order = permutation(seed, count)
    assert sorted(order.tolist()) == list(range(count))
    assert (permutation(seed, count) == order).all()
    if count > 20:
        assert (permutation(seed + 1, count) != order).any()
        assert abs(int(np.corrcoef(order, np.arange(count))[0, 1] * 1000)) < 700
