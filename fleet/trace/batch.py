"""What the readers of all recording formats have in common: batches of references, and the tally of what was read.

A reader turns chunks of a recording into batches, and books every line as reference, instruction, skipped or garbage.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from proto.trace import ComputeUnit

Mask = npt.NDArray[np.bool_]
UNKNOWN_SIZE = 1
"""Size of an access where the recording has none: it touches the page of its address and no other."""
MAX_SIZE = (1 << 16) - 1
_EXAMPLES = 10


class Batch(NamedTuple):
    """Consecutive references, not yet checked against user space."""

    address: npt.NDArray[np.uint64]
    kind: npt.NDArray[np.uint8]
    size: npt.NDArray[np.uint16]
    compute: npt.NDArray[np.int64]
    """int64[n]: compute since the reference before, that of the batch before included."""

    def select(self, keep: Mask, carry: int) -> tuple["Batch", int]:
        """The references under `keep` (bool[n]); the compute of a dropped one passes to the next one kept.

        `carry` is what an earlier call left over; returns the batch and what this one leaves over.
        """
        if keep.all():
            compute = self.compute
            if carry and len(compute):
                compute = compute.copy()
                compute[0] += carry
                carry = 0
            return self._replace(compute=compute), carry
        until = np.cumsum(self.compute) + carry
        kept = until[keep]
        left = int(until[-1] - kept[-1]) if len(kept) else int(until[-1])
        return Batch(self.address[keep], self.kind[keep], self.size[keep], np.diff(kept, prepend=0)), left


class Garbage(NamedTuple):
    """A line that could not be read."""

    line: int
    text: str


@dataclass(slots=True)
class Tally:
    """What a recording held, line by line."""

    compute_unit: ComputeUnit = "reference"
    trailing_compute: int = 0
    lines: int = 0
    instructions: int = 0
    garbage: int = 0
    examples: list[Garbage] = field(default_factory=list)
    """The first lines that could not be read."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Lines that are no access and should not be, by reason."""
    notes: Counter[str] = field(default_factory=Counter)
    """References that were kept, but not quite as recorded, by reason."""

    def add_garbage(self, count: int, examples: Iterable[Garbage]) -> None:
        """Book `count` unreadable lines; `examples` is consumed only as far as examples are still wanted."""
        self.garbage += count
        for example in examples:
            if len(self.examples) >= _EXAMPLES:
                break
            self.examples.append(example)


def elapsed_ns(time_ns: npt.NDArray[np.int64], before: int | None, tally: Tally) -> npt.NDArray[np.int64]:
    """Time since the reference before: int64[n], ns. A clock that steps back (another CPU's) counts as no time.

    `before` is the last time of the batch before, None at the start (whose first reference has no time before it).
    """
    delta = np.diff(time_ns, prepend=time_ns[:1] if before is None else before)
    if backwards := int(np.count_nonzero(delta < 0)):
        tally.notes["time steps back; taken as no time"] += backwards
    return np.maximum(delta, 0)
