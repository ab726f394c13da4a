"""PEBS: the debug-store area of each vCPU, its records, and when the hardware writes one.

The DS area is private memory of the guest process (never a shared segment, but with ``host.pebs=shared``): index,
interrupt threshold, absolute maximum, and records of 64 bytes or more (adaptive PEBS, SDM vol. 3, 20.9.2). Four events:
loads above a latency threshold, of which the hardware tags one in some at random (architecture 3.5); LLC-miss loads by
the tier that served them, two events; all retired stores. Each has a counter that starts at minus its period, writes a
record when it overflows, and is reloaded (Linux: arch/x86/events/intel/ds.c). A record that brings the index to the
threshold raises a PMI; past the absolute maximum, records are dropped and counted. Left out: what registers and LBR
held (those groups are zero, only their size counts); one record for counters that overflow at the same instruction
(each has its own here); the skid of a record.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from guestd.jit import inline, kernel
from guestd.meter import metered
from guestd.pml import Pml, set_dirty
from guestd.pmu import Pmu
from guestd.tiering.policy import FAST_MISS, LOAD_LATENCY, STORES, Sampling
from guestd.vcpu import DS_FAULT, DS_INDEX, RANDOM, TAG_LEFT
from proto.arrays import Bytes, Words
from proto.costs import Costs
from proto.counters import C, Counters
from proto.entry import PRESENT
from proto.trace import LOAD, STORE
from proto.units import PAGE_SHIFT, PAGE_SIZE, PS_PER_NS, TABLE_SHIFT

RECORD = np.dtype(
    [
        ("format_size", "<i8"),
        ("ip", "<i8"),
        ("applicable_counters", "<i8"),
        ("tsc", "<i8"),
        ("address", "<i8"),
        ("data_source", "<i8"),
        ("latency", "<i8"),
        ("tsx", "<i8"),
    ]
)
"""Basic and memory group of a record: ``tsc`` in virtual ps, ``address`` = gVA, ``data_source`` = tier, ``latency`` in
ns. Other groups follow."""
RECORD_BYTES = RECORD.itemsize
NO_FRAME = -1
FORMAT_MEMORY = 1 << 0
FORMAT_SIZE_SHIFT = 48
LARGE_PEBS_RESERVE = 8 + 4
"""Records left free when large PEBS interrupts: one a counter, of which Ice Lake has 8 general ones and 4 fixed.

(arch/x86/events/intel/ds.c, pebs_update_threshold: all of them do PEBS, PMU_FL_PEBS_ALL.)
"""

EVENT_NAMES = ("load_latency", "fast_miss", "slow_miss", "stores")
EVENTS = len(EVENT_NAMES)

_LEAF_SHIFT = PAGE_SHIFT + TABLE_SHIFT
"""A leaf table maps as many bytes, as a power of two."""
COUNTED, RECORDED, DROPPED = 0, 1, 2
"""Columns of `DsArea.counts`: qualifying events (of load latency: tagged loads above the threshold), records, drops."""

P_PERIOD = 0
"""Period of event 0; the others follow. 0 = off."""
P_ON = EVENTS
"""The events that are on: bit 1 << event; 0 = the PMU is off."""
P_THRESHOLD_PS = EVENTS + 1
P_TAG_SPAN = EVENTS + 2
"""Twice the mean tag interval minus 1: the distance to the next tagged load is uniform in [1, span]."""
P_INTERRUPT = EVENTS + 3
"""Index at which a PMI is raised."""
P_MAXIMUM = EVENTS + 4
P_RECORD_PS = EVENTS + 5
P_RECORD_BYTES = EVENTS + 6
PARAMS = EVENTS + 7


class DsArea(NamedTuple):
    """The DS areas of all vCPUs, the PMU's programming and its counters."""

    gpfn: Words
    """int64[vcpus, pages]: the gPA frames of each area; NO_FRAME until the kernel allocated them."""
    records: Words
    """int64[vcpus, maximum, words]: records, each beginning with a `RECORD`."""
    counter: Words
    """int64[vcpus, EVENTS]: the counters, from minus the period up to 0."""
    counts: Words
    """int64[vcpus, EVENTS, 3]: see COUNTED."""
    params: Words
    """int64[PARAMS]"""

    def of(self, vcpu: int, count: int) -> npt.NDArray[np.void]:
        """The first ``count`` records of one vCPU, as `RECORD`s (a copy)."""
        words = RECORD_BYTES // 8
        return np.ascontiguousarray(self.records[vcpu, :count, :words]).view(RECORD).reshape(-1)


def new_ds_area(
    vcpus: int, pages: int, sampling: Sampling | None, costs: Costs, host_buffer: Words | None = None
) -> DsArea:
    """Areas of ``pages`` pages a vCPU; without ``sampling`` they are empty and the PMU is off.

    ``host_buffer``: int64[words], where the records are to be written instead of private memory.
    """
    size = sampling.record_bytes if sampling else RECORD_BYTES
    maximum = pages * PAGE_SIZE // size if sampling else 1
    params = np.zeros(PARAMS, np.int64)
    params[P_TAG_SPAN] = 2 * costs.load_latency_tag_interval - 1
    params[P_MAXIMUM] = maximum
    params[P_RECORD_PS] = costs.pebs_record_ps
    params[P_RECORD_BYTES] = size
    words = vcpus * maximum * (size // 8)
    memory = np.zeros(words, np.int64) if host_buffer is None or not sampling else host_buffer[:words]
    area = DsArea(
        np.full((vcpus, pages if sampling else 0), NO_FRAME, np.int64),
        memory.reshape(vcpus, maximum, size // 8),
        np.zeros((vcpus, EVENTS), np.int64),
        np.zeros((vcpus, EVENTS, 3), np.int64),
        params,
    )
    if sampling:
        program(area, sampling)
    return area


def program(ds: DsArea, sampling: Sampling) -> None:
    """Set periods, threshold and interrupt mode, and load the counters."""
    periods = (sampling.load_period, sampling.fast_miss_period, sampling.slow_miss_period, sampling.store_period)
    maximum = int(ds.params[P_MAXIMUM])
    ds.params[P_PERIOD : P_PERIOD + EVENTS] = periods
    ds.params[P_ON] = sum(1 << event for event, period in enumerate(periods) if period)
    ds.params[P_THRESHOLD_PS] = sampling.latency_threshold_ns * PS_PER_NS
    ds.params[P_INTERRUPT] = max(1, maximum - LARGE_PEBS_RESERVE) if sampling.large else 1
    ds.counter[:] = -np.array(periods, np.int64)


@inline
def _count(ds: DsArea, vcpu: int, event: int) -> int:
    """One more event of a kind that is on; 1 << event if its counter overflows, and is reloaded."""
    ds.counts[vcpu, event, COUNTED] += 1
    ds.counter[vcpu, event] += 1
    if ds.counter[vcpu, event] < 0:
        return 0
    ds.counter[vcpu, event] = -ds.params[P_PERIOD + event]
    return 1 << event


@inline
def _write_record(
    ds: DsArea, pml: Pml, ept: Words, ept_pde: Bytes, field: Words, vcpu: int, event: int, tsc: int, gva: int,
    slow: int, latency_ps: int, counters: Counters,
) -> None:  # fmt: skip
    """Write one record, or drop it.

    A record whose page the EPT does not map is in the area all the same: EPT-friendly PEBS writes it after the fault.
    `DS_FAULT` then names the first such record; its index plus 1.
    """
    index = field[DS_INDEX]
    if index >= ds.params[P_MAXIMUM]:
        counters[C.pebs__dropped] += 1
        ds.counts[vcpu, event, DROPPED] += 1
        return
    size = ds.params[P_RECORD_BYTES]
    record = ds.records[vcpu, index]
    record[0] = FORMAT_MEMORY | (size << FORMAT_SIZE_SHIFT)
    record[2] = 1 << event
    record[3] = tsc
    record[4] = gva
    record[5] = slow
    record[6] = latency_ps // PS_PER_NS
    field[DS_INDEX] = index + 1
    counters[C.pebs__records] += 1
    ds.counts[vcpu, event, RECORDED] += 1
    for page in range(index * size >> PAGE_SHIFT, ((index + 1) * size - 1 >> PAGE_SHIFT) + 1):
        gpfn = ds.gpfn[vcpu, page]
        if (ept[gpfn] & PRESENT) != 0:
            set_dirty(pml, vcpu, ept, ept_pde, gpfn, 1, counters)
        elif field[DS_FAULT] == 0:
            field[DS_FAULT] = index + 1


@inline
def sample(
    on: int, ds: DsArea, pml: Pml, ept: Words, ept_pde: Bytes, field: Words, vcpu: int, kind: int, clock: int,
    address: int, table_gva: Words, slow: int, latency_ps: int, llc_hit: bool, counters: Counters,
) -> tuple[int, bool]:  # fmt: skip
    """The PMU after one access: (what its records cost the vCPU in ps, whether it wants service now).

    For a PMU that is on. ``on``: `P_ON`, which the caller keeps in a register; ``field``: the vCPU's row; ``kind``:
    LOAD, STORE or MODIFY; ``clock``: after the access, ps; ``address``: dense byte address; ``slow``: tier that served
    it; ``latency_ps``: as the load saw it, walk included; ``llc_hit``: it missed no LLC. Service is a PMI, or the fault
    of a record (`violations`).
    """
    params = ds.params
    fired = 0
    if kind != STORE:
        if on & (1 << LOAD_LATENCY):
            field[TAG_LEFT] -= 1
            if field[TAG_LEFT] <= 0:
                field[RANDOM] = (field[RANDOM] * 1103515245 + 12345) & 0x7FFFFFFF
                field[TAG_LEFT] = 1 + (field[RANDOM] >> 8) % params[P_TAG_SPAN]
                if latency_ps >= params[P_THRESHOLD_PS]:
                    fired |= _count(ds, vcpu, LOAD_LATENCY)
        miss = FAST_MISS + slow
        if not llc_hit and (on >> miss) & 1:
            fired |= _count(ds, vcpu, miss)
    if kind != LOAD and on & (1 << STORES):
        fired |= _count(ds, vcpu, STORES)
    cost_ps = 0
    service = False
    if fired != 0:
        gva = table_gva[address >> _LEAF_SHIFT] + (address & ((1 << _LEAF_SHIFT) - 1))
        for event in range(EVENTS):
            if (fired >> event) & 1:
                _write_record(
                    ds, pml, ept, ept_pde, field, vcpu, event, clock + cost_ps, gva, slow, latency_ps, counters
                )
                cost_ps += params[P_RECORD_PS]
        service = field[DS_INDEX] >= params[P_INTERRUPT] or field[DS_FAULT] != 0
    return cost_ps, service


@kernel
def drain(records: Words, field: Words, out: Words) -> int:
    """Move the records of one vCPU (int64[maximum, words]) into ``out`` as rows (gva, slow, latency, event, tsc).

    ``out``: int64[>= maximum, 5]; event is the record's `applicable_counters`. Resets the index, returns the number.
    """
    count = field[DS_INDEX]
    for row in range(count):
        out[row, 0] = records[row, 4]
        out[row, 1] = records[row, 5]
        out[row, 2] = records[row, 6]
        out[row, 3] = records[row, 2]
        out[row, 4] = records[row, 3]
    field[DS_INDEX] = 0
    return int(count)


_drain = metered(drain)


@kernel
def _complete(ds: DsArea, pml: Pml, ept: Words, ept_pde: Bytes, field: Words, vcpu: int, counters: Counters) -> None:
    """The records that met an EPT violation are written now: their pages get A and D."""
    size = ds.params[P_RECORD_BYTES]
    for page in range((field[DS_FAULT] - 1) * size >> PAGE_SHIFT, (field[DS_INDEX] * size - 1 >> PAGE_SHIFT) + 1):
        set_dirty(pml, vcpu, ept, ept_pde, ds.gpfn[vcpu, page], 1, counters)
    field[DS_FAULT] = 0


class Pebs(Pmu):
    """PEBS of all vCPUs, over the machine's arrays. ``field``: int64[vcpus, FIELDS]; ``sampling`` None: it is off."""

    def __init__(
        self,
        ds: DsArea,
        pml: Pml,
        ept: Words,
        ept_pde: Bytes,
        field: Words,
        counters: Counters,
        sampling: Sampling | None,
    ) -> None:
        self._ds = ds
        self._pml = pml
        self._ept = ept
        self._ept_pde = ept_pde
        self._field = field
        self._counters = counters
        self._sampling = sampling
        self._rows = np.zeros((ds.records.shape[1], 5), np.int64)
        self.frames = ds.gpfn

    def program(self, sampling: Sampling) -> None:
        self._sampling = sampling
        program(self._ds, sampling)

    def violations(self, vcpu: int) -> Words:
        first = int(self._field[vcpu, DS_FAULT]) - 1
        if first < 0:
            return np.zeros(0, np.int64)
        size = int(self._ds.params[P_RECORD_BYTES])
        end = int(self._field[vcpu, DS_INDEX]) * size
        written = self.frames[vcpu, first * size >> PAGE_SHIFT : (end - 1 >> PAGE_SHIFT) + 1]
        return written[(self._ept[written] & PRESENT) == 0]

    def resolved(self, vcpu: int) -> None:
        _complete(self._ds, self._pml, self._ept, self._ept_pde, self._field[vcpu], vcpu, self._counters)

    def interrupt_due(self, vcpu: int) -> bool:
        return bool(self._field[vcpu, DS_INDEX] >= self._ds.params[P_INTERRUPT])

    def waiting(self, vcpu: int) -> int:
        return int(self._field[vcpu, DS_INDEX])

    def drain(self, book: Words, vcpu: int) -> Words:
        return self._rows[: int(_drain(book, self._ds.records[vcpu], self._field[vcpu], self._rows))]

    def report(self) -> dict[str, Any]:
        if self._sampling is None:
            return {}
        periods = self._ds.params[P_PERIOD : P_PERIOD + EVENTS].tolist()

        def events(counts: Words) -> dict[str, dict[str, int]]:
            rows = zip(EVENT_NAMES, periods, counts.tolist(), strict=True)
            return {
                name: {"period": period, "events": row[COUNTED], "records": row[RECORDED], "dropped": row[DROPPED]}
                for name, period, row in rows
                if period
            }

        return {
            "period": self._sampling.load_period or self._sampling.slow_miss_period,
            "record_bytes": self._sampling.record_bytes,
            "events": events(self._ds.counts.sum(axis=0)),
            "vcpus": [events(counts) for counts in self._ds.counts],
        }
