"""A VM that does nothing: it has touched its memory once, and lies still but for a heartbeat on one line, which
the last-level cache serves.

What tiering does to such a VM, it does for nothing.
"""

import numpy as np

from guestd.params import Param
from guestd.workloads.base import MIB, Buffer, WorkloadType
from guestd.workloads.scan import Scan
from proto.arrays import Words
from proto.config import GuestConfig
from proto.trace import LLC_HIT, LOAD
from proto.units import PAGE_SHIFT

HEARTBEAT_PS = 2_000_000_000
"""2 ms: the longest that an access can be put off."""

PARAMS = (
    Param("footprint", 0.875, "share of memory", "memory that was touched once", "as gups", (), 0.01, 0.97),
)  # fmt: skip


class Idle(Scan):
    """See the module."""

    def __init__(self, config: GuestConfig) -> None:
        super().__init__(config)
        self.mlp = 1.0

    def generate(self, vcpu: int, buffer: Buffer) -> int:
        buffer.address[:] = self.first_page << PAGE_SHIFT
        buffer.kind[:] = LOAD | LLC_HIT
        buffer.think_ps[:] = HEARTBEAT_PS
        return buffer.address.size

    def heat(self) -> Words | None:
        heat = np.zeros(self.space.pages, np.int64)
        heat[self.first_page] = 1
        return heat


TYPE = WorkloadType("idle", "memory that was touched once, and nothing to do", PARAMS, Idle, 16 * MIB)
