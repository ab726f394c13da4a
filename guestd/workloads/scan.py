"""A sequential scan: every vCPU reads its share of an array line by line, over and over.

The last-level cache serves it if all of the array fits the VM's share, and none of it otherwise.
"""

from itertools import pairwise

import numpy as np

from guestd.address_space import AddressSpace, mmap_region
from guestd.jit import kernel
from guestd.params import Param, resolve
from guestd.workloads.base import MIB, Buffer, Workload, WorkloadType
from proto.arrays import Bytes, Words
from proto.config import GuestConfig
from proto.trace import LLC_HIT, LOAD, STORE
from proto.units import LINE_SIZE, PAGE_SHIFT, PAGE_SIZE

PARAMS = (
    Param("footprint", 0.875, "share of memory", "size of the array", "as gups", (), 0.01, 0.97),
    Param("write_every", 0, "lines", "every n-th line is stored to; 0 = reads only", "chosen", (), 0, 1_000_000),
    Param("mlp", 8.0, "misses", "memory-level parallelism of a vCPU", "estimated: hardware prefetchers", (), 1.0, 16.0),
    Param("think_ns", 1.0, "ns", "compute per line", "estimated", (), 0.0, 1e6),
)


@kernel
def _lines(address: Words, kind: Bytes, cursor: Words, start: int,
           lines: int, write_every: int, hit: int) -> None:  # fmt: skip
    line = cursor[0]
    for i in range(address.size):
        address[i] = start + line * LINE_SIZE
        kind[i] = hit | (STORE if write_every > 0 and line % write_every == 0 else LOAD)
        line += 1
        if line == lines:
            line = 0
    cursor[0] = line


class Scan(Workload):
    """See the module."""

    steady = True

    def __init__(self, config: GuestConfig) -> None:
        params = resolve(PARAMS, config.workload_params)
        self.pages = max(config.vcpus, int(config.total_pages * float(params["footprint"])))
        self.mlp = float(params["mlp"])
        self.write_every = int(params["write_every"])
        self.think_ps = round(float(params["think_ns"]) * 1000)
        self.space = AddressSpace([mmap_region("array", self.pages, config.seed)])
        self.first_page = self.space.first_page("array")
        edges = [self.pages * v // config.vcpus for v in range(config.vcpus + 1)]
        self.shares = list(pairwise(edges))
        self.cursor = np.zeros((config.vcpus, 1), np.int64)
        self.touched = [start for start, _ in self.shares]
        self.hit = 0

    def populate(self, vcpu: int, buffer: Buffer) -> int:
        start, end = self.touched[vcpu], self.shares[vcpu][1]
        count = min(buffer.address.size, end - start)
        buffer.address[:count] = (self.first_page + np.arange(start, start + count)) << PAGE_SHIFT
        buffer.kind[:count] = STORE
        buffer.think_ps[:count] = 0
        self.touched[vcpu] = start + count
        return count

    def generate(self, vcpu: int, buffer: Buffer) -> int:
        start, end = self.shares[vcpu]
        _lines(buffer.address, buffer.kind, self.cursor[vcpu], (self.first_page + start) << PAGE_SHIFT,
               (end - start) * (PAGE_SIZE // LINE_SIZE), self.write_every, self.hit)  # fmt: skip
        buffer.think_ps[:] = self.think_ps
        return buffer.address.size

    def set_llc(self, share_bytes: int) -> None:
        # LRU holds all of a loop that fits, and has evicted each line of a longer one before it comes round again.
        self.hit = LLC_HIT if self.pages * PAGE_SIZE <= share_bytes else 0

    def heat(self) -> Words | None:
        heat = np.zeros(self.space.pages, np.int64)
        heat[self.first_page : self.first_page + self.pages] = 1
        return heat


TYPE = WorkloadType("scan", "sequential reads of an array, line by line", PARAMS, Scan, 16 * MIB)
