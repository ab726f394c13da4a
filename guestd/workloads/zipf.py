"""Zipf's law over many ranks by integer tables, the same on every machine: rank k is drawn with weight (k + 1)**-s.

The first 1024 ranks have their exact share of 2**32. The tail follows the continuous law from one half below a rank to
one half above it (midpoint rule; off by less than 1e-7 there), inverted at 4096 quantiles with decimal arithmetic and
linear in between, where the density changes by a few parts in a thousand.
"""

from decimal import Decimal, localcontext
from functools import lru_cache
from typing import Any, NamedTuple, cast

import numpy as np
from numba.cpython.unsafe.numbers import leading_zeros

from guestd.jit import assume, inline
from proto.arrays import Words

_leading_zeros = cast(Any, leading_zeros)

HEAD = 1024
_QUANTILES = 4096
_GUIDES = 1024
_GUIDE_SHIFT = 22
_OCTAVES, _CELL_BITS = 40, 7
_CELLS = 1 << _CELL_BITS
_POINT = 16
_HALF = 1 << (_POINT - 1)
_FINE, _COARSE = 24, 10
_WIDE = 1 << (63 - _FINE)
_WHOLE = 1 << 32
MASS_SHIFT = 52
"""`mass` is in 1/2**52."""


class Zipf(NamedTuple):
    """The law over ``ranks`` ranks."""

    ranks: int
    head: Words
    """int64[min(ranks, 1024) + 1]: share of the ranks below, in 1/2**32."""
    guide: Words
    """int64[1024]: the first rank that a draw of each 1/1024 can be."""
    tail: Words
    """int64[4097]: rank + 1/2 at each quantile of the tail, in 1/2**16."""
    cells: Words
    """int64[40 * 128]: the quantile in which each 128th of an octave of ranks begins."""


@lru_cache(maxsize=8)
def new_zipf(ranks: int, exponent: str) -> Zipf:
    """Tables for ``ranks`` >= 1 ranks and an exponent > 0 (its decimal digits)."""
    with localcontext() as context:
        context.prec = 30
        s = Decimal(exponent)
        power = 1 - s if s != 1 else Decimal("1e-9")
        top = min(ranks, HEAD)
        sums = [Decimal(0)]
        for rank in range(1, top + 1):
            sums.append(sums[-1] + Decimal(rank) ** -s)
        half = Decimal("0.5")
        low, high = (top + half) ** power, (ranks + half) ** power
        total = sums[-1] + (high - low) / power
        head = np.array([int(_WHOLE * part / total) for part in sums], np.int64)
        places = [(low + (high - low) * q / _QUANTILES) ** (1 / power) for q in range(_QUANTILES + 1)]
        tail = np.array([int(place * (1 << _POINT)) for place in places], np.int64)
    if ranks == top:
        head[-1] = _WHOLE
    tail[-1] = (ranks << _POINT) + _HALF
    guide = np.searchsorted(head, np.arange(_GUIDES) << _GUIDE_SHIFT, side="right") - 1
    octave, part = np.divmod(np.arange(_OCTAVES * _CELLS), _CELLS)
    starts = ((_CELLS + part) << octave >> _CELL_BITS << _POINT) + _HALF
    cells = np.maximum(np.searchsorted(tail, starts, side="right") - 1, 0)
    return Zipf(ranks, head, guide.astype(np.int64), tail, cells.astype(np.int64))


@inline
def draw_rank(z: Zipf, u: int, fine: int) -> int:
    """The rank in [0, ranks) of a uniform draw: ``u`` in [0, 2**32), and 12 bits more (``fine``) for the tail."""
    top = z.head.size - 1
    share = z.head[top]
    if u < share:
        rank = z.guide[u >> _GUIDE_SHIFT]
        assume(rank >= 0)
        while z.head[rank + 1] <= u:
            rank += 1
    else:
        left = _WHOLE - share
        place = (u - share) * _QUANTILES + fine
        q = place // left
        start = z.tail[q]
        width = z.tail[q + 1] - start
        inside = ((place - q * left) << _FINE) // left
        # The product must stay below 2**63; a steep law's last quantiles are wide.
        offset = width * inside >> _FINE if width < _WIDE else (width >> _COARSE) * inside >> (_FINE - _COARSE)
        rank = (start + offset - _HALF) >> _POINT
        rank = min(max(rank, top), z.ranks - 1)
    return rank


@inline
def mass(z: Zipf, rank: int) -> int:
    """Probability of a rank as it is drawn, in 1/2**52."""
    if rank < z.head.size - 1:
        found = (z.head[rank + 1] - z.head[rank]) << 20
    else:
        edge, end = (rank << _POINT) + _HALF, ((rank + 1) << _POINT) + _HALF
        octave = 63 - _leading_zeros(rank)
        low = z.cells[(octave << _CELL_BITS) + ((rank << _CELL_BITS) >> octave) - _CELLS]
        assume(low >= 0)
        while z.tail[low + 1] <= edge:
            low += 1
        share = (_WHOLE - z.head[z.head.size - 1]) << (MASS_SHIFT - 44)
        found = 0
        while low < _QUANTILES and z.tail[low] < end:
            overlap = min(end, z.tail[low + 1]) - max(edge, z.tail[low])
            if overlap > 0:
                found += overlap * share // (z.tail[low + 1] - z.tail[low])
            low += 1
    return found
