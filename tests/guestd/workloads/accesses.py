"""What a workload emits, collected: with buffers of any lengths, for any vCPU."""

from itertools import cycle

import numpy as np

from guestd.workloads.base import ROOM, Buffer, Workload
from proto.arrays import Words


def new_buffer(size: int) -> Buffer:
    """A buffer in which nothing is right yet."""
    return Buffer(np.full(size, -1, np.int64), np.full(size, 9, np.uint8), np.full(size, -1, np.int32))


def take(workload: Workload, count: int, vcpu: int = 0, sizes: tuple[int, ...] = (4096,)) -> Words:
    """At least ``count`` accesses of a vCPU (int64[n, 3]: address, kind, think), drawn into buffers of ``sizes``."""
    rows: list[Words] = []
    left = count
    for size in cycle(sizes):
        buffer = new_buffer(size)
        filled = workload.generate(vcpu, buffer)
        assert size - ROOM < filled <= size
        rows.append(np.stack([column[:filled].astype(np.int64) for column in buffer], axis=1))
        left -= filled
        if left <= 0:
            break
    return np.concatenate(rows)


def populated(workload: Workload, vcpus: int = 1, size: int = 1000) -> list[int]:
    """Pages in the order of their first touch, vCPUs taking turns."""
    pages: list[int] = []
    buffer = new_buffer(size)
    for vcpu in cycle(range(vcpus)):
        count = workload.populate(vcpu, buffer)
        if count == 0:
            return pages
        assert (buffer.kind[:count] == 1).all() and (buffer.think_ps[:count] == 0).all()
        pages += (buffer.address[:count] >> 12).tolist()
    raise AssertionError("unreachable")
