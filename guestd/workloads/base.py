"""What a workload is to the engine: an address space and a generator of accesses for each vCPU.

Generators write blocks of dense byte addresses (guestd.address_space) straight into the vCPU's buffers with a compiled
kernel; nothing runs per access in Python. Populating (first touch of the memory, in the program's own order) is a phase
of its own, so that no figure of the run contains it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from guestd.address_space import AddressSpace
from guestd.llc import LlcFilter
from guestd.params import Param
from proto.arrays import Bytes, Ints, Words
from proto.config import GuestConfig
from proto.trace import STORE
from proto.units import PAGE_SHIFT

MIB = 1 << 20
ROOM = 512
"""Least buffer that a generator needs which emits whole operations."""
_CHUNK = 512
_ALL = 1 << 62


class Buffer(NamedTuple):
    """One vCPU's buffer to fill; all of the same length."""

    address: Words
    """int64[n]: dense byte address."""
    kind: Bytes
    """uint8[n]: `proto.trace.LOAD`, STORE or MODIFY, with LLC_HIT where the last-level cache serves it."""
    think_ps: Ints
    """int32[n]: compute before the access."""


class Workload(ABC):
    """Base class. ``mlp``: memory-level parallelism, the number of misses that a vCPU overlaps."""

    space: AddressSpace
    mlp: float = 1.0
    steady: bool = False
    """`heat` holds at any time of the run phase; else the truth of an interval is what was accessed in it."""

    def populate(self, vcpu: int, buffer: Buffer) -> int:
        """Fill the buffer with the next first touches of ``vcpu``; returns how many, 0 when it has none left."""
        return 0

    @abstractmethod
    def generate(self, vcpu: int, buffer: Buffer) -> int:
        """Fill the buffer with the next accesses of ``vcpu``; returns how many (never 0).

        A generator that emits whole operations leaves room that the next one might not fit into; it asks for buffers
        of at least `ROOM`.
        """

    def set_llc(self, share_bytes: int) -> None:  # noqa: B027 -- a workload may ignore it
        """Before each quantum: the VM's data has so many bytes of the LLC (guestd/llc.py). What it changes begins with
        the next block that is generated. Cheap when nothing changed; a workload that ignores it never hits."""

    def heat(self) -> Words | None:
        """True heat: int64[pages], proportional to the accesses each page gets; None where it is not known."""
        return None


def scaled_heat(heat: Words) -> Words:
    """``heat`` (int64[pages], >= 0) so small that its product with the number of pages fits; what is hot stays so."""
    excess = max(0, int(heat.max()).bit_length() + heat.size.bit_length() - 62)
    return (heat + ((1 << excess) - 1)) >> excess


class BuiltWorkload(Workload):
    """A workload whose program builds a data structure first, as far ahead as its first touches are asked for.

    vCPUs take the first touches in chunks, in the program's order; the page is the unit of first touch, so that each is
    one store. What `generate` emits goes through ``llc``, the VM's share of the last-level cache, block by block.
    """

    first_touch: Ints
    """int32[pages at most]: dense pages in the order in which the program touches them first."""

    def __init__(self) -> None:
        self._populated = 0
        self.llc = LlcFilter()

    def set_llc(self, share_bytes: int) -> None:
        self.llc.resize(share_bytes)

    @abstractmethod
    def build(self, pages: int) -> int:
        """Go on building until the first ``pages`` touches have been made, or all is built; returns how many have."""

    def finish(self) -> None:
        """Build what is left."""
        self.build(_ALL)

    def populate(self, vcpu: int, buffer: Buffer) -> int:
        """The next chunk of first touches, built when it is asked for."""
        start = self._populated
        wanted = start + min(buffer.address.size, _CHUNK)
        self._populated = end = min(wanted, self.build(wanted))
        buffer.address[: end - start] = self.first_touch[start:end].astype(np.int64) << PAGE_SHIFT
        buffer.kind[: end - start] = STORE
        buffer.think_ps[: end - start] = 0
        return end - start


@dataclass(frozen=True)
class WorkloadType:
    """Registration of a workload."""

    name: str
    summary: str
    params: tuple[Param, ...]
    create: Callable[[GuestConfig], Workload]
    min_memory_bytes: int = 16 * MIB
