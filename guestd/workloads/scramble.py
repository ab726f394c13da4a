"""Bijections of the integers below a power of two: they scatter keys and vertices, and find back where one came from.

Rounds of multiplication by an odd number and of folding the upper half onto the lower one, each of which has an
inverse (as in the finalisers of Appleby's MurmurHash3). YCSB scatters its hot keys and Graph500 its vertices by hashes
for the same reason: so that neighbours in rank are no neighbours in memory. A hash that is one-to-one needs no table.
"""

from typing import NamedTuple

from guestd.jit import inline
from guestd.random import streams

_MULTIPLIERS = 3
_SALT = 0x5C
MAX_BITS = 32


class Scrambler(NamedTuple):
    """A bijection of ``[0, 2**bits)``."""

    mask: int
    fold: int
    offset: int
    forward: tuple[int, int, int]
    backward: tuple[int, int, int]
    """Inverses of ``forward`` modulo ``2**bits``."""


def new_scrambler(seed: int, bits: int) -> Scrambler:
    """A bijection drawn from ``seed``; 1 <= bits <= 32."""
    size = 1 << bits
    offset, *odd = (int(draw) for draw in streams(seed, _MULTIPLIERS + 1, salt=_SALT)[:, 0])
    forward = [(_stir(draw) | 1) % size for draw in odd]
    backward = [pow(multiplier, -1, size) for multiplier in forward]
    return Scrambler(
        size - 1,
        (bits + 1) // 2,
        _stir(offset) % size,
        (forward[0], forward[1], forward[2]),
        (backward[0], backward[1], backward[2]),
    )


def _stir(draw: int) -> int:
    mixed = ((draw ^ (draw >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (mixed ^ (mixed >> 31)) >> 20


@inline
def scramble(s: Scrambler, value: int) -> int:
    """Where ``value`` goes. The low bits of a product do not depend on whether it overflows."""
    x = (value + s.offset) & s.mask
    x = (x * s.forward[0]) & s.mask
    x ^= x >> s.fold
    x = (x * s.forward[1]) & s.mask
    x ^= x >> s.fold
    return (x * s.forward[2]) & s.mask


@inline
def unscramble(s: Scrambler, value: int) -> int:
    """The value that ``scramble`` sends here."""
    x = (value * s.backward[2]) & s.mask
    x ^= x >> s.fold
    x = (x * s.backward[1]) & s.mask
    x ^= x >> s.fold
    x = (x * s.backward[0]) & s.mask
    return (x - s.offset) & s.mask
