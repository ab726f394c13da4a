"""What a workload is to the engine: an address space and a generator of accesses for each vCPU.

Generators write blocks of dense byte addresses (guestd.address_space) straight into the vCPU's buffers with a compiled
kernel; nothing runs per access in Python. Populating (first touch of the memory, in the program's own order) is a phase
of its own, so that no figure of the run contains it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from guestd.address_space import AddressSpace
from guestd.params import Param
from proto.arrays import Bytes, Ints, Words
from proto.config import GuestConfig

MIB = 1 << 20


class Buffer(NamedTuple):
    """One vCPU's buffer to fill; all of the same length."""

    address: Words
    """int64[n]: dense byte address."""
    kind: Bytes
    """uint8[n]: `proto.trace.LOAD`, STORE or MODIFY, with LLC_HIT where the last-level cache serves it."""
    think_ps: Ints
    """int32[n]: compute before the access."""


class Workload:
    """Base class. ``mlp``: memory-level parallelism, the number of misses that a vCPU overlaps."""

    space: AddressSpace
    mlp: float = 1.0

    def populate(self, vcpu: int, buffer: Buffer) -> int:
        """Fill the buffer with the next first touches of ``vcpu``; returns how many, 0 when it has none left."""
        return 0

    def generate(self, vcpu: int, buffer: Buffer) -> int:
        """Fill the buffer with the next accesses of ``vcpu``; returns how many (never 0)."""
        raise NotImplementedError

    def set_llc(self, share_bytes: int) -> None:
        """Before each quantum: the VM's data has so many bytes of the LLC (guestd/llc.py). What it changes begins with
        the next block that is generated. Cheap when nothing changed; a workload that ignores it never hits."""

    def heat(self) -> Words | None:
        """True heat: int64[pages], proportional to the accesses each page gets; None where it is not known."""
        return None


@dataclass(frozen=True)
class WorkloadType:
    """Registration of a workload."""

    name: str
    summary: str
    params: tuple[Param, ...]
    create: Callable[[GuestConfig], Workload]
    min_memory_bytes: int = 16 * MIB
