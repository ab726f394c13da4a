"""GUPS: random 8-byte read-modify-writes over an array with a hot set (Demeter's, SOSP'25, section 5).

A share of the updates (9:1) goes to a hot set, the others to the rest. The array is initialised in order, so the hot
set at its end is touched last and starts in slow memory. Variants: the hot pages scattered over the array, and Zipf.
Sizes default to the paper's shares of the VM: 14/16 of memory, of which 1/16 is hot. The last-level cache holds the
hottest lines: those of the hot set, then others; under Zipf those of the first ranks (guestd/llc.py).
"""

from decimal import Decimal, localcontext

import numpy as np

from guestd.address_space import AddressSpace, mmap_region
from guestd.jit import kernel
from guestd.llc import draws_hit, hit_cuts
from guestd.params import Param, resolve
from guestd.random import State, next_u64, permutation, streams
from guestd.workloads.base import MIB, Buffer, Workload, WorkloadType
from proto.arrays import Bytes, Words
from proto.config import GuestConfig
from proto.trace import LLC_HIT, MODIFY, STORE
from proto.units import LINE_SIZE, PAGE_SHIFT, PAGE_SIZE

PARAMS = (
    Param("footprint", 0.875, "share of memory", "size of the array", "Demeter: 14 of 16 GiB", (), 0.01, 0.97),
    Param("hot", 0.0625, "share of memory", "size of the hot set", "Demeter: 1 of 16 GiB", (), 0.0001, 0.97),
    Param("hot_updates", 0.9, "share of updates", "those of the hot set", "Demeter, evaluation.py", (), 0.0, 1.0),
    Param("layout", "end", "", "where the hot pages lie", "Demeter, evaluation.py",
          ("end", "start", "scattered")),
    Param("distribution", "hotset", "", "hot set, uniform, or Zipf over pages", "Demeter, evaluation.py",
          ("hotset", "uniform", "zipf")),
    Param("zipf_s", 0.99, "", "exponent of the Zipf variant", "YCSB default", (), 0.01, 3.0),
    Param("mlp", 4.0, "misses", "memory-level parallelism of a vCPU", "unpublished; a few updates fit a reorder buffer",
          (), 1.0, 16.0),
    Param("think_ns", 2.0, "ns", "compute per update", "estimated: index generation, about 6 cycles", (), 0.0, 1e6),
)  # fmt: skip

_HOT_BITS = 20
_QUANTILES = 4096
_LINES = PAGE_SIZE // LINE_SIZE


@kernel
def _hotset(state: State, address: Words, first_page: int, pages: int, hot: int, hot_start: int,
            hot_cut: int, order: Words, kind: Bytes, hits: Words) -> None:  # fmt: skip
    cold = pages - hot
    for i in range(address.size):
        r = next_u64(state)
        pick = np.int64(r >> np.uint64(32))
        low = np.int64(r & np.uint64(0xFFFFFFFF))
        is_hot = (low >> 9) & ((1 << _HOT_BITS) - 1) < hot_cut
        if is_hot:
            page = hot_start + ((pick * hot) >> 32)
        else:
            page = (pick * cold) >> 32
            if page >= hot_start:
                page += hot
        if order.size > 0:
            page = order[page]
        address[i] = ((first_page + page) << PAGE_SHIFT) | ((low & 511) << 3)
        kind[i] = MODIFY | LLC_HIT if draws_hit(r, hits[0] if is_hot else hits[1]) else MODIFY


@kernel
def _quantiles(state: State, address: Words, first_page: int, bounds: Words,
               order: Words, kind: Bytes, hits: Words) -> None:  # fmt: skip
    for i in range(address.size):
        r = next_u64(state)
        pick = np.int64(r >> np.uint64(32))
        low = np.int64(r & np.uint64(0xFFFFFFFF))
        which = pick >> 20
        start = bounds[which]
        rank = start + (((pick & 0xFFFFF) * max(1, bounds[which + 1] - start)) >> 20)
        address[i] = ((first_page + order[rank]) << PAGE_SHIFT) | ((low & 511) << 3)
        kind[i] = MODIFY | LLC_HIT if draws_hit(r, hits[which]) else MODIFY


@kernel
def _touch(address: Words, first_page: int, pages: int, cursor: Words) -> int:
    count = min(address.size, pages - cursor[0])
    for i in range(count):
        address[i] = (first_page + cursor[0] + i) << PAGE_SHIFT
    cursor[0] += count
    return int(count)


def zipf_bounds(pages: int, exponent: str) -> Words:
    """Ranks at the quantiles of a Zipf law over ``pages`` (int64[4097]), by decimal arithmetic: the same everywhere.

    Inverts the continuous law ``(k**(1-s) - 1) / (n**(1-s) - 1)``; within a quantile ranks are uniform.
    """
    with localcontext() as context:
        context.prec = 30
        one = Decimal(1)
        power = one - Decimal(exponent)
        if power == 0:
            power = Decimal("1e-9")
        top = Decimal(pages + 1) ** power - one
        ranks = [int((one + top * q / _QUANTILES) ** (one / power)) - 1 for q in range(_QUANTILES + 1)]
    return np.minimum(np.array(ranks, np.int64), pages)


class Gups(Workload):
    """See the module."""

    steady = True

    def __init__(self, config: GuestConfig) -> None:
        params = resolve(PARAMS, config.workload_params)
        self.pages = max(2, int(config.total_pages * float(params["footprint"])))
        self.hot = min(self.pages - 1, max(1, int(config.total_pages * float(params["hot"]))))
        self.mlp = float(params["mlp"])
        self.hot_cut = round(float(params["hot_updates"]) * (1 << _HOT_BITS))
        self.hot_start = 0 if params["layout"] == "start" else self.pages - self.hot
        self.distribution = str(params["distribution"])
        if self.distribution == "uniform":
            self.hot_cut = round((1 << _HOT_BITS) * self.hot / self.pages)
        scattered = params["layout"] == "scattered" or self.distribution == "zipf"
        self.order = permutation(config.seed, self.pages) if scattered else np.zeros(0, np.int64)
        self.bounds = zipf_bounds(self.pages, str(params["zipf_s"])) if self.distribution == "zipf" else None
        self.space = AddressSpace([mmap_region("array", self.pages, config.seed)])
        self.first_page = self.space.first_page("array")
        self.states = streams(config.seed, config.vcpus)
        self.cursor = np.zeros(1, np.int64)
        self.llc_bytes = -1
        self.hits = np.zeros(2 if self.bounds is None else _QUANTILES, np.int64)
        """`draws_hit` thresholds: hot set and rest, or each quantile."""
        self.set_llc(0)
        self.think_ps = round(float(params["think_ns"]) * 1000)

    def populate(self, vcpu: int, buffer: Buffer) -> int:
        # Threads take chunks in the order of the array, so that its end is touched last.
        chunk = buffer.address[: min(buffer.address.size, 512)]
        count = int(_touch(chunk, self.first_page, self.pages, self.cursor))
        buffer.kind[:count] = STORE
        buffer.think_ps[:count] = 0
        return count

    def generate(self, vcpu: int, buffer: Buffer) -> int:
        if self.bounds is not None:
            _quantiles(self.states[vcpu], buffer.address, self.first_page, self.bounds, self.order,
                       buffer.kind, self.hits)  # fmt: skip
        else:
            _hotset(self.states[vcpu], buffer.address, self.first_page, self.pages, self.hot, self.hot_start,
                    self.hot_cut, self.order, buffer.kind, self.hits)  # fmt: skip
        buffer.think_ps[:] = self.think_ps
        return buffer.address.size

    def set_llc(self, share_bytes: int) -> None:
        if share_bytes == self.llc_bytes:
            return
        self.llc_bytes = share_bytes
        before, size = self._classes()
        self.hits = hit_cuts(share_bytes, before * _LINES, size * _LINES)

    def _classes(self) -> tuple[Words, Words]:
        """Classes of equally hot pages: how many are hotter, and how many there are (int64[classes] each)."""
        if self.bounds is not None:
            return self.bounds[:-1], np.maximum(np.diff(self.bounds), 1)
        cold = self.pages - self.hot
        if self.distribution == "uniform":
            return np.zeros(2, np.int64), np.full(2, self.pages)
        hot_first = self.hot_cut * cold >= ((1 << _HOT_BITS) - self.hot_cut) * self.hot
        before = (0, self.hot) if hot_first else (cold, 0)
        return np.array(before, np.int64), np.array((self.hot, cold), np.int64)

    def heat(self) -> Words | None:
        heat = np.zeros(self.space.pages, np.int64)
        ranks = np.arange(self.pages)
        if self.bounds is not None:
            width = np.maximum(np.diff(self.bounds), 1)
            weight = np.zeros(self.pages + 1, np.int64)
            np.add.at(weight, self.bounds[:-1], (1 << 40) // width)
            np.subtract.at(weight, np.minimum(self.bounds[:-1] + width, self.pages), (1 << 40) // width)
            weights = np.cumsum(weight)[: self.pages]
        else:
            cold = max(1, self.pages - self.hot)
            is_hot = (ranks >= self.hot_start) & (ranks < self.hot_start + self.hot)
            hot_weight = (self.hot_cut << 24) // self.hot
            weights = np.where(is_hot, hot_weight, (((1 << _HOT_BITS) - self.hot_cut) << 24) // cold)
        heat[self.first_page + (self.order if self.order.size else ranks)] = weights
        return heat


TYPE = WorkloadType("gups", "random 8-byte updates with a hot set (9:1), uniform or Zipf", PARAMS, Gups, 16 * MIB)
