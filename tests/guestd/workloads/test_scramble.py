"""The bijections: one-to-one, undone by their inverse, and without the order of what goes in."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestd.jit import kernel
from guestd.workloads import scramble
from guestd.workloads.scramble import MAX_BITS, Scrambler, new_scrambler
from proto.arrays import Words


@kernel
def there(s: Scrambler, values: Words, out: Words) -> None:
    for i in range(values.size):
        out[i] = scramble.scramble(s, values[i])


@kernel
def back(s: Scrambler, values: Words, out: Words) -> None:
    for i in range(values.size):
        out[i] = scramble.unscramble(s, values[i])


def plain(s: Scrambler, value: int) -> int:
    """The same in Python's unbounded integers."""
    size = s.mask + 1
    value = (value + s.offset) % size * s.forward[0] % size
    value = (value ^ value >> s.fold) * s.forward[1] % size
    return (value ^ value >> s.fold) * s.forward[2] % size


@given(seed=st.integers(0, (1 << 63) - 1), bits=st.integers(1, 12))
def test_every_value_is_hit_once(seed: int, bits: int) -> None:
    values = np.arange(1 << bits)
    out = np.zeros_like(values)
    there(new_scrambler(seed, bits), values, out)
    assert sorted(out.tolist()) == values.tolist()


@given(seed=st.integers(0, (1 << 63) - 1), bits=st.integers(1, MAX_BITS), data=st.data())
def test_the_kernels_are_the_plain_function_and_its_inverse(seed: int, bits: int, data: st.DataObject) -> None:
    s = new_scrambler(seed, bits)
    values = np.array(data.draw(st.lists(st.integers(0, (1 << bits) - 1), min_size=1, max_size=20)))
    out, again = np.zeros_like(values), np.zeros_like(values)
    there(s, values, out)
    assert out.tolist() == [plain(s, value) for value in values.tolist()]
    back(s, out, again)
    assert (again == values).all()


@pytest.mark.parametrize("bits", [16, 24, 31])
def test_neighbours_are_scattered(bits: int) -> None:
    values = np.arange(10_000)
    out = np.zeros_like(values)
    there(new_scrambler(5, bits), values, out)
    # Uniform: a tenth of them in each tenth of the range, and half of the steps upwards.
    counts = np.bincount(out * 10 >> bits, minlength=10)
    assert abs(counts - 1000).max() < 6 * (1000 * 0.9) ** 0.5
    assert abs((np.diff(out) > 0).sum() - 5000) < 6 * (10_000 / 12) ** 0.5


def test_seeds_differ() -> None:
    assert new_scrambler(1, 20) == new_scrambler(1, 20)
    assert new_scrambler(1, 20) != new_scrambler(2, 20)
