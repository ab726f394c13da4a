"""PEBS: the debug-store area of each vCPU, its records, and when the hardware writes one.

The DS area is private memory of the guest process (never a shared segment): index, interrupt threshold, absolute
maximum, and 64-byte records (basic 32 bytes + memory group 32 bytes, SDM vol. 3, 20.9). Two events: load latency above
a threshold, of which the hardware tags one load in some (architecture 3.5), and all retired stores. A record whose
index reaches the threshold raises a PMI; past the absolute maximum, records are dropped and counted.
Left out until the hardware is deepened: LLC-miss events, legacy PEBS, PMI per record.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from guestd.jit import inline, kernel
from guestd.tiering.policy import Sampling
from guestd.vcpu import DS_FAULT, DS_INDEX, LOAD_COUNT, RANDOM, STORE_COUNT, TAG_LEFT
from proto.arrays import Words
from proto.costs import Costs
from proto.counters import C, Counters
from proto.entry import ACCESSED, DIRTY, PRESENT
from proto.trace import LOAD, STORE
from proto.units import PAGE_SIZE, PS_PER_NS

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
"""One PEBS record: ``tsc`` in virtual ps, ``address`` = gVA, ``data_source`` = tier, ``latency`` in ns."""
RECORD_BYTES = RECORD.itemsize
RECORDS_SHIFT = 6
"""A page of the area holds 64 records."""
NO_FRAME = -1
FORMAT_MEMORY = (1 << 0) | (RECORD_BYTES << 48)
LARGE_PEBS_RESERVE = 8
"""Records left free when large PEBS interrupts (Linux ds.c, pebs_update_threshold: 8 counters)."""

EVENT_LOAD = 1 << 0
EVENT_STORE = 1 << 1

P_LOAD_PERIOD = 0
P_THRESHOLD_PS = 1
P_TAG_SPAN = 2
"""Twice the mean tag interval minus 1: the distance to the next tagged load is uniform in [1, span]."""
P_STORE_PERIOD = 3
P_INTERRUPT = 4
"""Index at which a PMI is raised."""
P_MAXIMUM = 5
P_RECORD_PS = 6
PARAMS = 7


class DsArea(NamedTuple):
    """The DS areas of all vCPUs and the PMU's programming."""

    gpfn: Words
    """int64[vcpus, pages]: the gPA frames of each area; NO_FRAME until the kernel allocated them."""
    records: Words
    """int64[vcpus, maximum, 8]: `RECORD`s."""
    params: Words
    """int64[PARAMS]"""

    def of(self, vcpu: int, count: int) -> npt.NDArray[np.void]:
        """The first ``count`` records of one vCPU, as `RECORD`s (a view)."""
        return np.ascontiguousarray(self.records[vcpu, :count]).view(RECORD).reshape(-1)


def new_ds_area(vcpus: int, pages: int, sampling: Sampling | None, costs: Costs) -> DsArea:
    """Areas of ``pages`` pages a vCPU; without ``sampling`` they are empty and the PMU is off."""
    maximum = pages * PAGE_SIZE // RECORD_BYTES if sampling else 1
    params = np.zeros(PARAMS, np.int64)
    params[P_TAG_SPAN] = 2 * costs.load_latency_tag_interval - 1
    params[P_MAXIMUM] = maximum
    params[P_INTERRUPT] = max(1, maximum - LARGE_PEBS_RESERVE)
    params[P_RECORD_PS] = costs.pebs_record_ps
    if sampling:
        params[P_LOAD_PERIOD] = sampling.load_period
        params[P_THRESHOLD_PS] = sampling.latency_threshold_ns * PS_PER_NS
        params[P_STORE_PERIOD] = sampling.store_period
    gpfn = np.full((vcpus, pages if sampling else 0), NO_FRAME, np.int64)
    return DsArea(gpfn, np.zeros((vcpus, maximum, len(RECORD.names or ())), np.int64), params)


@inline
def write_record(
    ds: DsArea, ept: Words, field: Words, vcpu: int, event: int, tsc: int, gva: int, slow: int, latency_ps: int,
    counters: Counters,
) -> bool:  # fmt: skip
    """Write one record (or drop it); returns whether a PMI or an EPT violation is due.

    ``field``: the vCPU's row of fields. With EPT-friendly PEBS (Ice Lake on) a record that meets an EPT violation is
    written after the fault and not lost: `DS_FAULT` then names the gPA frame.
    """
    index = field[DS_INDEX]
    params = ds.params
    if index >= params[P_MAXIMUM]:
        counters[C.pebs__dropped] += 1
        return True
    record = ds.records[vcpu, index]
    record[0] = FORMAT_MEMORY
    record[2] = event
    record[3] = tsc
    record[4] = gva
    record[5] = slow
    record[6] = latency_ps // PS_PER_NS
    field[DS_INDEX] = index + 1
    counters[C.pebs__records] += 1
    gpfn = ds.gpfn[vcpu, index >> RECORDS_SHIFT]
    if (ept[gpfn] & PRESENT) == 0:
        field[DS_FAULT] = gpfn + 1
    else:
        ept[gpfn] |= ACCESSED | DIRTY
    return bool(index + 1 >= params[P_INTERRUPT] or field[DS_FAULT] != 0)


@inline
def sample(
    ds: DsArea, ept: Words, field: Words, vcpu: int, kind: int, tsc: int, gva: int, slow: int, latency_ps: int,
    counters: Counters,
) -> int:  # fmt: skip
    """Count one access; records written << 1 | whether a PMI or an EPT violation is due."""
    params = ds.params
    written = pmi = 0
    if kind != STORE and params[P_LOAD_PERIOD] > 0:
        field[TAG_LEFT] -= 1
        if field[TAG_LEFT] <= 0:
            field[RANDOM] = (field[RANDOM] * 1103515245 + 12345) & 0x7FFFFFFF
            field[TAG_LEFT] = 1 + (field[RANDOM] >> 8) % params[P_TAG_SPAN]
            if latency_ps >= params[P_THRESHOLD_PS]:
                field[LOAD_COUNT] += 1
                if field[LOAD_COUNT] >= params[P_LOAD_PERIOD]:
                    field[LOAD_COUNT] = 0
                    written += 1
                    if write_record(ds, ept, field, vcpu, EVENT_LOAD, tsc, gva, slow, latency_ps, counters):
                        pmi = 1
    if kind != LOAD and params[P_STORE_PERIOD] > 0:
        field[STORE_COUNT] += 1
        if field[STORE_COUNT] >= params[P_STORE_PERIOD]:
            field[STORE_COUNT] = 0
            written += 1
            tsc += (written - 1) * params[P_RECORD_PS]
            if write_record(ds, ept, field, vcpu, EVENT_STORE, tsc, gva, slow, latency_ps, counters):
                pmi = 1
    return (written << 1) | pmi


@kernel
def drain(records: Words, field: Words, out: Words) -> int:
    """Move the records of one vCPU (int64[maximum, 8]) into ``out`` as rows (gva, slow, latency, event, tsc).

    ``out``: int64[>= maximum, 5]. Resets the index, returns the number of records.
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
