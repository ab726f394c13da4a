"""Random numbers that are the same everywhere: splitmix64 (Steele et al., OOPSLA'14), one integer state a stream."""

import numpy as np
import numpy.typing as npt

from guestd.jit import inline
from proto.arrays import Words

State = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_30, _27, _31 = np.uint64(30), np.uint64(27), np.uint64(31)


@inline
def next_u64(state: State) -> np.uint64:
    """The next number of the stream whose state is ``state[0]`` (uint64[1])."""
    state[0] += _GOLDEN
    z = state[0]
    z = (z ^ (z >> _30)) * _MIX_1
    z = (z ^ (z >> _27)) * _MIX_2
    return z ^ (z >> _31)


def streams(seed: int, count: int, salt: int = 0) -> State:
    """``count`` streams (uint64[count, 1]) that never meet in practice."""
    with np.errstate(over="ignore"):
        base = np.uint64(seed & 0xFFFFFFFFFFFFFFFF) * _MIX_1 + np.uint64(salt) * _MIX_2
        return (base + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0xD1342543DE82EF95)).reshape(count, 1)


def permutation(seed: int, count: int) -> Words:
    """A permutation of ``range(count)`` (int64[count]) drawn from ``seed``."""
    with np.errstate(over="ignore"):
        z = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN + np.uint64(seed & 0xFFFFFFFFFFFFFFFF)
        z = (z ^ (z >> _30)) * _MIX_1
        z = (z ^ (z >> _27)) * _MIX_2
    return np.argsort(z ^ (z >> _31), kind="stable")
