"""An address axis without its holes: regions that are used lie on each other, however far apart they are.

A process's heap and stack are terabytes apart; drawn to scale, both would be a line. A place on the axis is an offset
into the regions as if they were one, and is named by the address that lies there.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CHUNK = 1 << 21
"""What counts as used around an address: what one leaf page table maps."""
HOLE_CHUNKS = 8
"""Holes up to this many chunks are drawn."""

Addresses = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class AddressMap:
    """Regions, rising: where each starts, and at which offset of the axis (int64[n], int64[n + 1])."""

    starts: Addresses
    offsets: Addresses

    @classmethod
    def of(cls, addresses: Addresses) -> "AddressMap":
        """The regions in which ``addresses`` (int64[m], m > 0) lie."""
        used = np.unique(addresses // CHUNK)
        cuts = np.flatnonzero(np.diff(used) > HOLE_CHUNKS) + 1
        first = used[np.concatenate([[0], cuts])]
        last = used[np.concatenate([cuts - 1, [len(used) - 1]])]
        sizes = (last - first + 1) * CHUNK
        return cls(first * CHUNK, np.concatenate([[0], np.cumsum(sizes)]))

    @property
    def size(self) -> int:
        """Length of the axis in bytes."""
        return int(self.offsets[-1])

    def place(self, addresses: Addresses) -> npt.NDArray[np.float64]:
        """float64[m]: where on the axis addresses lie; NaN outside the regions."""
        region = np.searchsorted(self.starts, addresses, "right") - 1
        inside = addresses - self.starts[region]
        known = (region >= 0) & (inside < np.diff(self.offsets)[region])
        return np.where(known, self.offsets[region] + inside, np.nan)

    def address(self, places: npt.NDArray[np.float64]) -> Addresses:
        """int64[m]: the address at places on the axis; its end is the end of the last region."""
        offset = places.astype(np.int64)
        region = np.minimum(np.searchsorted(self.offsets, offset, "right") - 1, len(self.starts) - 1)
        return self.starts[region] + offset - self.offsets[region]

    def ticks(self, most: int = 10) -> list[tuple[float, str]]:
        """Places and labels: the starts of regions that are not too close to each other, and round steps in between."""
        step = CHUNK
        while self.size / step > most:
            step *= 2
        found: list[tuple[float, str]] = []
        for start, offset, end in zip(
            self.starts.tolist(), self.offsets[:-1].tolist(), self.offsets[1:].tolist(), strict=True
        ):
            found += [(float(place), f"{start + place - offset:#x}") for place in range(offset, end, step)]
        spread: list[tuple[float, str]] = []
        for place, label in found:
            if not spread or place - spread[-1][0] >= self.size / (2 * most):
                spread.append((place, label))
        return spread
