"""Replay of recorded accesses: the program's own addresses and VMAs, its reads and writes, its compute in between.

The trace repeats until the run ends. With several vCPUs each replays the whole trace from its own starting point, an
equal part further on, in the one address space that they share. There is no populate phase: first touch is the
program's own. A reference that crosses a page boundary becomes one access per page. Between the program and memory is
the VM's share of the last-level cache (guestd/llc.py), line by line; all vCPUs go through it in turn, block by block.
"""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from guestd.address_space import AddressSpace, Vma
from guestd.jit import kernel
from guestd.llc import LlcFilter
from guestd.params import Param, resolve
from guestd.workloads.base import MIB, Buffer, Workload, WorkloadType
from proto.arrays import Bytes, Ints, Words
from proto.config import GuestConfig
from proto.trace import page_span, read_trace, regions, touched_pages
from proto.units import PAGE_SHIFT, PAGE_SIZE, PS_PER_NS

PARAMS = (
    Param("file", "", "path", "trace written by `fleet trace import`", "recorded"),
    Param("mlp", 1.5, "misses", "memory-level parallelism of a vCPU", "estimated", (), 1.0, 16.0),
    Param("think_ns", -1.0, "ns", "compute per unit between references: instruction, or reference that a cache filter "
          "dropped; -1 = 0.15 per instruction, 0.5 per dropped reference, 1 per recorded ns",
          "estimated: 2 instructions a cycle, 2 cycles per cached reference, at 3 GHz", (), -1.0, 1e6),
    Param("llc_filter", True, "", "pass references through the VM's share of the LLC; off for a trace that holds only "
          "what missed an LLC", "modelled: 16-way LRU"),
)  # fmt: skip

_DEFAULT_THINK_NS = {"instruction": 0.15, "reference": 0.5, "ns": 1.0}
_GAP_PAGES = 256
_MAX_THINK_PS = (1 << 31) - 1


class _Replay(NamedTuple):
    space: AddressSpace
    address: Words
    kind: Bytes
    think_ps: Ints


@lru_cache(maxsize=1)
def _load(path: str, think_ns: float) -> _Replay:
    """The trace as dense addresses, one access per page touched. Raises proto.errors.TraceError."""
    trace = read_trace(Path(path))
    space = AddressSpace(
        [Vma(f"region{i}", first << PAGE_SHIFT, pages)
         for i, (first, pages) in enumerate(regions(touched_pages(trace), _GAP_PAGES))]
    )  # fmt: skip
    per_unit = (think_ns if think_ns >= 0 else _DEFAULT_THINK_NS[trace.meta.compute_unit]) * PS_PER_NS
    dropped_ns = think_ns if think_ns >= 0 else _DEFAULT_THINK_NS["reference"]
    think = np.minimum(
        trace.compute * per_unit + trace.meta.dropped_per_reference * dropped_ns * PS_PER_NS, _MAX_THINK_PS
    ).astype(np.int32)
    first, last = page_span(trace)
    copies = (last - first).astype(np.int64) + 1
    index = np.repeat(np.arange(copies.size), copies)
    step = np.arange(index.size) - np.repeat(np.cumsum(copies) - copies, copies)
    gva = trace.address.astype(np.int64)[index]
    gva = np.where(step == 0, gva, ((gva >> PAGE_SHIFT) + step) << PAGE_SHIFT)
    dense = (space.page_of(gva) << PAGE_SHIFT) | (gva & (PAGE_SIZE - 1))
    return _Replay(space, dense, trace.kind[index], np.where(step == 0, think[index], 0).astype(np.int32))


@kernel
def _copy(out: Words, kinds: Bytes, thinks: Ints,
          address: Words, kind: Bytes, think: Ints,
          start: int) -> int:  # fmt: skip
    position = start
    for i in range(out.size):
        out[i], kinds[i], thinks[i] = address[position], kind[position], think[position]
        position += 1
        if position == address.size:
            position = 0
    return position


class TraceReplay(Workload):
    """See the module."""

    def __init__(self, config: GuestConfig) -> None:
        params = resolve(PARAMS, config.workload_params)
        self.replay = _load(str(params["file"]), float(params["think_ns"]))
        self.space = self.replay.space
        self.mlp = float(params["mlp"])
        self.llc = LlcFilter() if params["llc_filter"] else None
        self.position = [self.replay.address.size * v // config.vcpus for v in range(config.vcpus)]

    def generate(self, vcpu: int, buffer: Buffer) -> int:
        replay = self.replay
        self.position[vcpu] = _copy(buffer.address, buffer.kind, buffer.think_ps, replay.address, replay.kind,
                                    replay.think_ps, self.position[vcpu])  # fmt: skip
        if self.llc:
            self.llc.mark(buffer.address, buffer.kind)
        return buffer.address.size

    def set_llc(self, share_bytes: int) -> None:
        if self.llc:
            self.llc.resize(share_bytes)

    def heat(self) -> Words | None:
        return np.bincount(self.replay.address >> PAGE_SHIFT, minlength=self.space.pages).astype(np.int64)


TYPE = WorkloadType("trace", "replay of recorded accesses of a real program", PARAMS, TraceReplay, 16 * MIB)
