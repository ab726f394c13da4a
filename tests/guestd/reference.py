"""The vCPU engine a second time, in plain Python, to hold the compiled one against.

One access at a time, lists and dictionaries for the caches, no prefetch, no chunk, no shared totals: every law (what a
walk references, what sets an A or D bit, what an INVEPT drops, when a record is written) is spelled out where it acts.
It starts from a `guestd.machine.Machine` whose caches are empty, and then keeps its own tables.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from guestd import pebs, vcpu, walk
from guestd.engine import COMPLETED, FAULT, NEED_ACCESSES, PMI, REACHED
from guestd.machine import Machine, S
from proto.counters import C
from proto.entry import (
    ACCESSED,
    DIRTY,
    ENTRY_VERSION_SHIFT,
    FRAME_MASK,
    FRAME_SHIFT,
    PRESENT,
    PROTNONE,
    STAMP_PAGE_SHIFT,
    STAMP_VERSION_MASK,
    VERSION_BITS,
    WRITABLE,
    YOUNG,
)
from proto.layout import OP_FLUSH, OP_HARVEST, OP_MOVE, OP_STALL, OP_ZAP
from proto.trace import LOAD, STORE

Value = TypeVar("Value")


class Cache(Generic[Value]):
    """A set-associative cache with bit-PLRU replacement: a way is used or not; when all are, only the newest stays."""

    def __init__(self, entries: int, ways: int) -> None:
        self.ways = ways
        self.sets: list[list[tuple[int, Value] | None]] = [[None] * ways for _ in range(entries // ways)]
        self.used: list[set[int]] = [set() for _ in self.sets]

    def _way(self, key: int) -> int | None:
        tags = self.sets[key % len(self.sets)]
        return next((way for way, entry in enumerate(tags) if entry is not None and entry[0] == key), None)

    def get(self, key: int) -> Value | None:
        """Its value; looking does not count as use."""
        way = self._way(key)
        entry = None if way is None else self.sets[key % len(self.sets)][way]
        return None if entry is None else entry[1]

    def use(self, key: int) -> None:
        index, way = key % len(self.sets), self._way(key)
        assert way is not None
        used = self.used[index] | {way}
        self.used[index] = {way} if len(used) == self.ways else used

    def put(self, key: int, value: Value) -> None:
        """Replace its value, or the first way that is not marked used; no use yet."""
        index, way = key % len(self.sets), self._way(key)
        if way is None:
            way = min(set(range(self.ways)) - self.used[index])
        self.sets[index][way] = (key, value)

    def drop(self, key: int) -> None:
        if (way := self._way(key)) is not None:
            self.sets[key % len(self.sets)][way] = None

    def clear(self) -> None:
        """Contents go, the used marks stay."""
        self.sets = [[None] * self.ways for _ in self.sets]

    def __contains__(self, key: int) -> bool:
        return self._way(key) is not None

    def keys(self) -> list[int]:
        """Cached keys in order of set and way."""
        return [entry[0] for tags in self.sets for entry in tags if entry is not None]


@dataclass
class Access:
    """An access, and what faults and exits add before it."""

    address: int
    kind: int
    think_ps: int = 0
    fault_ps: int = 0
    exit_ps: int = 0


@dataclass
class ReferenceVcpu:
    """One vCPU. ``tlb``: page -> (frame slot, dirty)."""

    tlb: Cache[tuple[int, bool]]
    pde: Cache[None]
    nested: Cache[None]
    ept_pde: Cache[None]
    random: int
    tag_left: int
    clock: int = 0
    queue: list[Access] = field(default_factory=list)
    idle: bool = False
    last_block: int = -1
    guest_upper: bool = False
    ept_upper: bool = False
    exit: tuple[int, int] = (0, 0)
    """The last VM exit, [start, end)."""
    flush_at_entry: bool = False
    counts: Counter[int] = field(default_factory=Counter)
    """Events since the last record, by event."""
    counted: Counter[tuple[int, int]] = field(default_factory=Counter)
    """(event, column of `DsArea.counts`) -> number."""
    ds_gpfns: list[int] = field(default_factory=list)
    """gPA frames of its DS area."""
    ds_fault: int = 0
    """Number of the first record, from 1, that waits for the EPT to map its page; 0: none."""
    log: list[int] = field(default_factory=list)
    """Its page-modification log: gPA frames."""
    records: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    """(event, time, gVA, slow, latency in ns)"""
    latencies: Counter[int] = field(default_factory=Counter)


def _frame(entry: int) -> int:
    return (entry & FRAME_MASK) >> FRAME_SHIFT


class Reference:
    """See the module."""

    def __init__(self, machine: Machine) -> None:
        vcpus, state, params = machine.vcpus, machine.state, machine.ds.params
        count, sets = vcpus.tlb_recent.shape
        assert not vcpus.tlb.any() and not vcpus.pde.any() and not vcpus.nested.any() and not vcpus.ept_pde.any()
        self.vcpus = [
            ReferenceVcpu(
                tlb=Cache(vcpus.tlb.shape[1], vcpus.tlb.shape[1] // sets),
                pde=Cache(vcpus.pde.shape[1], 4),
                nested=Cache(vcpus.nested.shape[1], 4),
                ept_pde=Cache(vcpus.ept_pde.shape[1], 4),
                random=int(vcpus.field[i, vcpu.RANDOM]),
                tag_left=int(vcpus.field[i, vcpu.TAG_LEFT]),
                ds_gpfns=machine.ds.gpfn[i].tolist(),
            )
            for i in range(count)
        ]
        self.gpt: list[int] = machine.gpt.tolist()
        self.ept: list[int] = machine.ept.tolist()
        self.stamps: list[int] = machine.stamps.tolist()
        self.table_gpfn: list[int] = machine.table_gpfn.tolist()
        self.table_slow: list[int] = machine.table_slow.tolist()
        self.table_gva: list[int] = machine.table_gva.tolist()
        self.latency: list[list[int]] = machine.latency_ps.tolist()
        self.read_bytes: list[list[int]] = machine.read_bytes.tolist()
        self.write_bytes: list[list[int]] = machine.write_bytes.tolist()
        self.budget: list[list[int]] = machine.budget.tolist()
        self.price: list[int] = machine.price.tolist()
        self.params: list[int] = params.tolist()
        self.pml_on, self.pml_exit_ps, self.pml_entry_ps = machine.pml.params.tolist()
        self.dirty: set[int] = set()
        """KVM's dirty bitmap."""
        self.harvested: set[int] = set()
        self.owner = int(state[S.OWNER])
        self.slow_frames = int(state[S.SLOW_FRAMES])
        self.mlp = int(state[S.MLP_Q8])
        self.flush_ps = int(state[S.FLUSH_PS])
        self.vmexit_ps = int(state[S.VMEXIT_PS])
        self.slice_ps = int(state[S.SLICE_PS])
        self.hit_ps = int(state[S.STLB_HIT_PS])
        self.now = int(state[S.NOW])
        self.end_ps = 0
        self.left = int(state[S.LEFT])
        self.turn = 0
        self.counters: Counter[str] = Counter()

    # -- one access ---------------------------------------------------------------------------------------------

    def _ept_refs(self, cpu: ReferenceVcpu, gpfn: int) -> int:
        """References above the leaf of an EPT walk: three cold, one when the top is cached, none below a cached PDE."""
        if self._cached(cpu.ept_pde, gpfn // 512):
            return 0
        refs = 1 if cpu.ept_upper else 3
        cpu.ept_upper = True
        return refs

    @staticmethod
    def _cached(cache: Cache[None], key: int) -> bool:
        hit = key in cache
        if not hit:
            cache.put(key, None)
        cache.use(key)
        return hit

    def _walk(self, cpu: ReferenceVcpu, table: int, gpfn: int) -> tuple[int, int]:
        """(references, cost in ps) of the walk to a page of leaf table ``table`` that lies in ``gpfn``."""
        upper, ept_leaves = 0, 1
        if not self._cached(cpu.pde, table):
            levels = 1 if cpu.guest_upper else 3
            cpu.guest_upper = True
            upper += levels
            # An upper page-table page is itself in gPA; its key must not meet a leaf table's.
            if not self._cached(cpu.nested, (1 << 40) + table // 512):
                upper += levels * (1 + self._ept_refs(cpu, self.table_gpfn[table]))
        if not self._cached(cpu.nested, table):
            upper += self._ept_refs(cpu, self.table_gpfn[table])
            ept_leaves += 1
        upper += self._ept_refs(cpu, gpfn)
        leaf = walk.PRICE_GUEST_LEAF_SLOW if self.table_slow[table] else walk.PRICE_GUEST_LEAF_FAST
        cost = upper * self.price[walk.PRICE_UPPER] + ept_leaves * self.price[walk.PRICE_EPT_LEAF] + self.price[leaf]
        return upper + ept_leaves + 1, cost

    def _translate(self, cpu: ReferenceVcpu, page: int, write: bool) -> tuple[int, int] | None:
        """(frame slot, cost in ps), or None for a fault."""
        cached = cpu.tlb.get(page)
        if cached is not None and (cached[1] or not write):
            cpu.tlb.use(page)
            return cached[0], self.hit_ps
        guest = self.gpt[page]
        if not guest & PRESENT or guest & PROTNONE or (write and not guest & WRITABLE):
            return None
        gpfn = _frame(guest)
        host = self.ept[gpfn]
        if not host & PRESENT or (write and not host & WRITABLE):
            return None
        table = self.table_gpfn[page // 512]
        if not self.ept[table] & PRESENT:
            return None
        self._touch(cpu, table, ACCESSED | DIRTY, useless=True)
        bits = ACCESSED | (DIRTY if write else 0)
        self.gpt[page] |= bits
        self._touch(cpu, gpfn, bits, useless=False)
        refs, cost = self._walk(cpu, page // 512, gpfn)
        self.counters["access__walks"] += 1
        self.counters["access__walk_refs"] += refs
        self.counters["access__walk_ps"] += cost
        self.counters["access__tlb_misses" if cached is None else "access__dirty_assists"] += 1
        cpu.tlb.put(page, (_frame(host), write))
        cpu.tlb.use(page)
        return _frame(host), cost

    def _touch(self, cpu: ReferenceVcpu, gpfn: int, bits: int, useless: bool) -> None:
        """Set A (and D) of an EPT entry; a D bit that was clear is logged, after an exit if the log is full."""
        dirtied = bits & DIRTY and not self.ept[gpfn] & DIRTY
        self.ept[gpfn] |= bits
        if not (dirtied and self.pml_on):
            return
        if len(cpu.log) == 512:
            self.counters["exit__pml_full"] += 1
            start = cpu.clock
            self._stolen(cpu, self.pml_exit_ps)
            self._flush_log(cpu)
            cpu.exit, cpu.flush_at_entry = (start, cpu.clock), False
        cpu.log.append(gpfn)
        self.counters["pml__entries"] += 1
        self.counters["pml__useless"] += useless

    def _stolen(self, cpu: ReferenceVcpu, ps: int) -> None:
        """Time outside guest mode."""
        cpu.clock += ps
        self.counters["time__exit_ps"] += ps
        self.counters["time__stolen_ps"] += ps

    def _flush_log(self, cpu: ReferenceVcpu) -> None:
        self._stolen(cpu, len(cpu.log) * self.pml_entry_ps)
        self.dirty |= set(cpu.log)
        cpu.log.clear()

    def _access(self, cpu: ReferenceVcpu) -> int:
        """The next access of ``cpu``'s queue; REACHED, or why it (or the next) can't be made."""
        access = cpu.queue[0]
        page, write = access.address >> 12, access.kind != LOAD
        translated = self._translate(cpu, page, write)
        if translated is None:
            return FAULT
        slot, walk_ps = translated
        slow = int(slot >= self.slow_frames)
        local = int(access.address // 256 == cpu.last_block)
        if self.budget[0][slow] <= 0 or (write and self.budget[1][slow] <= 0):
            self.counters["time__throttle_ps"] += self.end_ps - cpu.clock
            cpu.clock = self.end_ps
            return REACHED
        del cpu.queue[0]
        cpu.last_block = access.address // 256
        cpu.clock += access.fault_ps
        if access.exit_ps:
            start = cpu.clock
            cpu.clock += access.exit_ps
            self._flush_log(cpu)
            cpu.exit, cpu.flush_at_entry = (start, cpu.clock), False
        version = self.gpt[page] >> ENTRY_VERSION_SHIFT & STAMP_VERSION_MASK
        stamp = self.stamps[slot]
        self.counters["integrity__mismatches"] += stamp != self.owner | page << STAMP_PAGE_SHIFT | version
        latency = walk_ps + self.latency[slow][local]
        cost = latency * self.mlp // 256
        self.budget[0][slow] -= self.read_bytes[slow][local]
        if write:
            self.budget[1][slow] -= self.write_bytes[slow][local]
            next_version = (version + 1) % (1 << VERSION_BITS)
            self.gpt[page] += (next_version - version) << ENTRY_VERSION_SHIFT
            old = stamp & STAMP_VERSION_MASK
            self.stamps[slot] = stamp - old + (old + 1) % (1 << VERSION_BITS)
        cpu.clock += access.think_ps + cost
        cpu.latencies[min(latency >> vcpu.LATENCY_BIN_SHIFT, vcpu.LATENCY_BINS - 1)] += 1
        self.left -= 1
        for name, amount in (
            ("access__total", 1),
            ("access__slow" if slow else "access__fast", 1),
            ("access__loads", access.kind != STORE),
            ("access__stores", write),
            ("access__think_ps", access.think_ps),
            ("access__stall_ps", cost),
            ("integrity__accesses_checked", 1),
        ):
            self.counters[name] += int(amount)
        gva = self.table_gva[page // 512] + access.address % (512 * 4096)
        return self._sample(cpu, access.kind, gva, slow, latency)

    def _sample(self, cpu: ReferenceVcpu, kind: int, gva: int, slow: int, latency: int) -> int:
        params = self.params
        fired = []
        if kind != STORE:
            if params[pebs.LOAD_LATENCY]:
                cpu.tag_left -= 1
                if cpu.tag_left <= 0:
                    cpu.random = (cpu.random * 1103515245 + 12345) % (1 << 31)
                    cpu.tag_left = 1 + cpu.random // 256 % params[pebs.P_TAG_SPAN]
                    if latency >= params[pebs.P_THRESHOLD_PS]:
                        fired.append(pebs.LOAD_LATENCY)
            fired.append(pebs.SLOW_MISS if slow else pebs.FAST_MISS)
        if kind != LOAD:
            fired.append(pebs.STORES)
        recorded = False
        tsc = cpu.clock
        for event in fired:
            if not params[event]:
                continue
            cpu.counted[event, pebs.COUNTED] += 1
            cpu.counts[event] += 1
            if cpu.counts[event] == params[event]:
                cpu.counts[event] = 0
                recorded = True
                tsc = self._record(cpu, event, (1 << event, tsc, gva, slow, latency // 1000), tsc)
        cpu.clock = tsc
        return PMI if recorded and (cpu.ds_fault or len(cpu.records) >= params[pebs.P_INTERRUPT]) else REACHED

    def _record(self, cpu: ReferenceVcpu, event: int, record: tuple[int, int, int, int, int], now: int) -> int:
        """Write it if there is room; the time afterwards."""
        cpu.clock = now + self.params[pebs.P_RECORD_PS]
        self.counters["time__stolen_ps"] += self.params[pebs.P_RECORD_PS]
        if len(cpu.records) == self.params[pebs.P_MAXIMUM]:
            self.counters["pebs__dropped"] += 1
            cpu.counted[event, pebs.DROPPED] += 1
            return cpu.clock
        size = self.params[pebs.P_RECORD_BYTES]
        start = len(cpu.records) * size
        cpu.records.append(record)
        self.counters["pebs__records"] += 1
        cpu.counted[event, pebs.RECORDED] += 1
        for gpfn in cpu.ds_gpfns[start // 4096 : (start + size - 1) // 4096 + 1]:
            if self.ept[gpfn] & PRESENT:
                self._touch(cpu, gpfn, ACCESSED | DIRTY, useless=True)
            else:
                cpu.ds_fault = cpu.ds_fault or len(cpu.records)
        return cpu.clock

    def record_pages(self, cpu: ReferenceVcpu) -> list[int]:
        """gPA frames of the records that wait."""
        size = self.params[pebs.P_RECORD_BYTES]
        return cpu.ds_gpfns[(cpu.ds_fault - 1) * size // 4096 : (len(cpu.records) * size - 1) // 4096 + 1]

    def complete(self, cpu: ReferenceVcpu) -> None:
        """Their pages are mapped: they are written now."""
        for gpfn in self.record_pages(cpu):
            before = (cpu.exit, cpu.flush_at_entry)
            self._touch(cpu, gpfn, ACCESSED | DIRTY, useless=True)
            cpu.exit, cpu.flush_at_entry = before
        cpu.ds_fault = 0

    # -- vCPUs in turn ------------------------------------------------------------------------------------------

    def run(self, operations: list[tuple[int, int, int, int, int]], until: int) -> int:
        """Run to ``until``; ``operations``: (time, kind, flags, a, b), taken from the front when executed."""
        while True:
            boundary = min(until, (self.now // self.slice_ps + 1) * self.slice_ps)
            if operations:
                boundary = min(boundary, max(self.now, operations[0][0]))
            while self.turn < len(self.vcpus):
                reason = self._slice(self.vcpus[self.turn], boundary)
                if reason != REACHED:
                    return reason
                self.turn += 1
            self.turn = 0
            self.now = boundary
            while operations and operations[0][0] <= boundary:
                self.operate(*operations.pop(0))
            if boundary >= until:
                return REACHED

    def _slice(self, cpu: ReferenceVcpu, until: int) -> int:
        if cpu.idle:
            cpu.clock = max(cpu.clock, until)
        while cpu.clock < until:
            if not cpu.queue:
                return NEED_ACCESSES
            if self.left == 0:
                return COMPLETED
            if (reason := self._access(cpu)) != REACHED:
                return reason
        return REACHED

    # -- invalidation -------------------------------------------------------------------------------------------

    def invlpg(self, pages: Iterable[int]) -> None:
        """INVLPG of each page on every vCPU: the page, and all guest paging-structure caches."""
        for cpu in self.vcpus:
            for page in pages:
                cpu.tlb.drop(page)
            cpu.pde.clear()
            cpu.guest_upper = False

    def guest_flush(self, cpus: list[ReferenceVcpu] | None = None) -> None:
        """MOV CR3: linear and combined mappings; the nested ones stay."""
        for cpu in self.vcpus if cpus is None else cpus:
            cpu.tlb.clear()
            cpu.pde.clear()
            cpu.guest_upper = False

    def invept(self, cpu: ReferenceVcpu) -> None:
        """Everything that depends on the EPT."""
        self.guest_flush([cpu])
        cpu.nested.clear()
        cpu.ept_pde.clear()
        cpu.ept_upper = False

    def operate(self, time: int, kind: int, flags: int, a: int, b: int) -> None:
        """Execute one host operation."""
        if kind == OP_FLUSH:
            self._request(time)
        elif kind == OP_ZAP:
            zapped = sum([self._zap(gpfn) for gpfn in range(a, a + b)])
            for gpfn in range(a, a + b):
                backed_slow = self.ept[gpfn] & WRITABLE and _frame(self.ept[gpfn]) >= self.slow_frames
                if flags == PROTNONE and backed_slow:
                    self.ept[gpfn] |= PROTNONE
            self.counters["kvm__mmu_zapped"] += zapped
            if zapped:
                self._request(time)
        elif kind == OP_STALL:
            cpu = self.vcpus[a]
            cpu.exit = (time, max(cpu.exit[1], time + b))
            cpu.clock += b
            cpu.flush_at_entry = False
            self.counters["time__exit_ps"] += b
            self.counters["time__stolen_ps"] += b
        elif kind == OP_HARVEST:
            if self.dirty or any(cpu.log for cpu in self.vcpus):
                self._request(time)
                for cpu in self.vcpus:
                    self._flush_log(cpu)
                for gpfn in self.dirty:
                    self.ept[gpfn] &= ~DIRTY
                self.harvested |= self.dirty
                self.dirty = set()
        else:
            assert kind == OP_MOVE
            if self._zap(a):
                self.counters["kvm__mmu_zapped"] += 1
                self._request(time)
            source = _frame(self.ept[a])
            self.stamps[b] = self.stamps[source]
            self.ept[a] = (self.ept[a] & ~FRAME_MASK & ~PROTNONE) | b << FRAME_SHIFT | flags
            self.budget[0][source >= self.slow_frames] -= 4096
            self.budget[1][b >= self.slow_frames] -= 4096

    def _zap(self, gpfn: int) -> bool:
        entry = self.ept[gpfn]
        if not entry & PRESENT:
            return False
        self.ept[gpfn] = entry & ~(PRESENT | ACCESSED | DIRTY) | (YOUNG if entry & ACCESSED else 0)
        return True

    def _request(self, now: int) -> None:
        self.counters["kvm__remote_tlb_flush_requests"] += 1
        kicked = False
        for cpu in self.vcpus:
            outside = cpu.idle or cpu.exit[0] <= now < cpu.exit[1]
            if outside and cpu.flush_at_entry:
                continue
            if not outside:
                kicked = True
                self.counters["exit__kick"] += 1
                self.counters["time__exit_ps"] += self.vmexit_ps
                self.counters["time__stolen_ps"] += self.vmexit_ps
                before = cpu.clock
                cpu.clock += self.vmexit_ps
                self._flush_log(cpu)
                cpu.exit = (now, now + cpu.clock - before + self.flush_ps)
            elif not cpu.idle:
                cpu.exit = (cpu.exit[0], cpu.exit[1] + self.flush_ps)
            cpu.flush_at_entry = True
            self.invept(cpu)
            cpu.clock += self.flush_ps
            self.counters["time__exit_ps"] += self.flush_ps
            self.counters["time__stolen_ps"] += self.flush_ps
            self.counters["kvm__tlb_flush"] += 1
            self.counters["instr__invept_global"] += 1
        self.counters["kvm__remote_tlb_flush"] += kicked

    # -- comparison ---------------------------------------------------------------------------------------------

    def assert_same(self, machine: Machine) -> None:
        """Every table, cache, clock and counter of ``machine`` is what it is here."""
        counted = {name: int(machine.counters[index]) for name, index in C.__members__.items()}
        assert {name: count for name, count in counted.items() if count} == {
            k: v for k, v in self.counters.items() if v
        }
        assert machine.gpt.tolist() == self.gpt
        assert machine.ept.tolist() == self.ept
        assert machine.stamps.tolist() == self.stamps
        assert machine.budget.tolist() == self.budget
        assert bitmap(machine, 0) == self.dirty
        assert bitmap(machine, 1) == self.harvested
        assert int(machine.state[S.NOW]) == self.now
        assert int(machine.state[S.LEFT]) == self.left
        for index, cpu in enumerate(self.vcpus):
            row = machine.vcpus.field[index]
            assert (row[vcpu.CLOCK], row[vcpu.LENGTH] - row[vcpu.POSITION]) == (cpu.clock, len(cpu.queue))
            assert (row[vcpu.EXIT_START], row[vcpu.EXIT_END]) == cpu.exit
            assert bool(row[vcpu.FLUSH_AT_ENTRY]) == cpu.flush_at_entry
            assert row[vcpu.DS_INDEX] == len(cpu.records)
            assert row[vcpu.DS_FAULT] == cpu.ds_fault
            counts = machine.ds.counts[index]
            assert {where: int(counts[where]) for where in np.ndindex(counts.shape) if counts[where]} == {
                where: number for where, number in cpu.counted.items() if number
            }
            log = machine.pml.log[index, int(machine.pml.next[index]) + 1 :]
            assert (log >> 12).tolist()[::-1] == (cpu.log if self.pml_on else [])
            assert _tlb(machine, index) == [entry for tags in cpu.tlb.sets for entry in tags]
            for cache, mine in ((machine.vcpus.pde, cpu.pde), (machine.vcpus.nested, cpu.nested),
                                (machine.vcpus.ept_pde, cpu.ept_pde)):  # fmt: skip
                assert [int(tag) - 1 for tag in cache[index] if tag] == mine.keys()
            taken = machine.ds.of(index, len(cpu.records))
            columns = ("applicable_counters", "tsc", "address", "data_source", "latency")
            assert [tuple(int(record[name]) for name in columns) for record in taken] == cpu.records
            histogram = machine.vcpus.histogram[index]
            assert {int(bin_): int(histogram[bin_]) for bin_ in np.flatnonzero(histogram)} == dict(cpu.latencies)


def bitmap(machine: Machine, row: int) -> set[int]:
    """gPA frames whose bits are set in a row of the dirty bitmap."""
    return set(np.flatnonzero(np.unpackbits(machine.pml.dirty[row].view(np.uint8), bitorder="little")).tolist())


def _tlb(machine: Machine, index: int) -> list[tuple[int, tuple[int, bool]] | None]:
    from guestd.tlb import TLB_DIRTY, TLB_FRAME_MASK, TLB_FRAME_SHIFT, TLB_TAG_SHIFT

    entries: npt.NDArray[np.int64] = machine.vcpus.tlb[index]
    return [
        ((entry >> TLB_TAG_SHIFT) - 1, (entry >> TLB_FRAME_SHIFT & TLB_FRAME_MASK, bool(entry & TLB_DIRTY)))
        if entry
        else None
        for entry in entries.tolist()
    ]
