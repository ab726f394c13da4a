"""The vCPU engine a second time, in plain Python, to hold the compiled one against.

One access at a time, no prefetch, no chunk, no shared totals: every law (what sets an A or D bit, what a kick costs,
who waits for mmu_lock, when a record is written) is spelled out where it acts. The translation hardware is in
`tests.guestd.reference_mmu`. It starts from a `guestd.machine.Machine` whose caches are empty, and then keeps its own
tables.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from guestd import mmu_lock, pebs, vcpu
from guestd.engine import COMPLETED, FAULT, NEED_ACCESSES, PMI, REACHED
from guestd.machine import Machine, S
from guestd.tiering import policy
from guestd.transaction import READ_ONLY, VCPU_SHIFT
from proto.counters import C
from proto.entry import (
    ACCESSED,
    DIRTY,
    ENTRY_VERSION_SHIFT,
    FRAME_MASK,
    FRAME_SHIFT,
    HUGE,
    PRESENT,
    PROTNONE,
    SHADOWED,
    STAMP_PAGE_SHIFT,
    STAMP_VERSION_MASK,
    TABLE_SEEN_MASK,
    VERSION_BITS,
    WRITABLE,
    YOUNG,
)
from proto.layout import OP_FLUSH, OP_HARVEST, OP_STALL, OP_SWAP, OP_TRANSACTION_BEGIN, OP_TRANSACTION_END, OP_ZAP
from proto.trace import LLC_HIT, LOAD, STORE
from tests.guestd.reference_mmu import Mmu, Tables, frame_of, new_mmu

RETRIED = ("access__fault_retries", "access__walks")
PARTS = [name.removeprefix("time__").removesuffix("_ps") for name in C.__members__ if name.startswith("time__")]


@dataclass
class Access:
    """An access, and what faults and exits add before it."""

    address: int
    kind: int
    think_ps: int = 0
    fault_ps: int = 0
    exit_ps: int = 0
    fault_part: int = vcpu.MINOR_FAULT
    exit_part: int = vcpu.EPT_VIOLATION
    retries: int = 0


@dataclass
class Operation:
    """`proto.layout.OPERATION`"""

    time: int
    kind: int
    flags: int = 0
    a: int = 0
    b: int = 0
    hold: int = 0
    busy: int = 0


@dataclass
class ReferenceVcpu:
    """One vCPU."""

    mmu: Mmu
    random: int
    tag_left: int
    clock: int = 0
    parts: Counter[str] = field(default_factory=Counter)
    queue: list[Access] = field(default_factory=list)
    idle: bool = False
    off_pcpu: bool = False
    last_block: int = -1
    last_written: int = -1
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
    due: int = 0
    """What exits for a full log took, until it is spent."""
    records: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    """(event, time, gVA, slow, latency in ns)"""
    latencies: Counter[int] = field(default_factory=Counter)

    def spend(self, part: str, ps: int) -> None:
        """Its clock never moves without its ledger."""
        self.clock += ps
        self.parts[part] += ps

    def leave(self, start: int, duration: int) -> None:
        """A VM exit."""
        self.exit = (start, start + duration)
        self.flush_at_entry = False


class Reference:
    """See the module."""

    def __init__(self, machine: Machine) -> None:
        state = machine.state
        self.vcpus = [
            ReferenceVcpu(
                mmu=new_mmu(machine, i),
                random=int(machine.vcpus.field[i, vcpu.RANDOM]),
                tag_left=int(machine.vcpus.field[i, vcpu.TAG_LEFT]),
                ds_gpfns=machine.ds.gpfn[i].tolist(),
            )
            for i in range(machine.vcpus.field.shape[0])
        ]
        self.tables = Tables(
            machine.gpt.tolist(), machine.ept.tolist(), machine.tables.upper.tolist(), machine.tables.parent.tolist(),
            machine.tables.ept_pde.tolist(), machine.tables.ept_pdpte.tolist(), machine.walk_geometry.guest_levels,
            machine.walk_geometry.ept_levels, int(state[S.SLOW_FRAMES]),
        )  # fmt: skip
        self.gpt, self.ept = self.tables.gpt, self.tables.ept
        self.stamps: list[int] = machine.stamps.tolist()
        self.table_gva: list[int] = machine.table_gva.tolist()
        self.latency: list[list[int]] = machine.latency_ps.tolist()
        self.read_bytes: list[list[int]] = machine.read_bytes.tolist()
        self.write_bytes: list[list[int]] = machine.write_bytes.tolist()
        self.budget: list[list[int]] = machine.budget.tolist()
        self.pairs = machine.near.size
        self.in_dram: dict[tuple[int, int], int] = {}
        """(pair, line) -> the slot of the pair whose line is in DRAM; at first the fast one's is. Flat mode only."""
        self.price: list[int] = machine.price.tolist()
        self.params: list[int] = machine.ds.params.tolist()
        self.state: list[int] = state.tolist()
        self.now, self.left, self.end_ps, self.turn = int(state[S.NOW]), int(state[S.LEFT]), 0, 0
        self.counters: Counter[str] = Counter()
        self.notifier = (0, 0, 0)
        """First and last + 1 gPA frame, end in ps."""
        self.migrating: tuple[tuple[int, ...], int] = ((), 0)
        self.pml_on, self.pml_exit_ps, self.pml_entry_ps = machine.pml.params.tolist()
        self.dirty: set[int] = set()
        """KVM's dirty bitmap."""
        self.harvested: set[int] = set()
        self.held: Counter[int] = Counter()
        """Bin of mmu_lock's time -> for how long it is held."""

    # -- one access ---------------------------------------------------------------------------------------------

    def _translate(self, cpu: ReferenceVcpu, access: Access) -> tuple[int, int, list[int]] | None:
        """(frame slot, cost in ps, cost of each reference of the walk), or None for a fault."""
        page, write = access.address >> 12, access.kind % LLC_HIT != LOAD
        found = cpu.mmu.look_up(page)
        if found and (found[1] or not write):
            self.counters["access__stlb_hits"] += found[2]
            return found[0], self.state[S.STLB_HIT_PS] if found[2] else 0, []
        guest, gpfn = self.gpt[page], frame_of(self.gpt[page])
        host = self.ept[gpfn]
        if not guest & PRESENT or guest & PROTNONE or not host & PRESENT:
            return None
        if write and not guest & host & WRITABLE:
            return None
        refs = cpu.mmu.walk(self.tables, page, self.price)
        for table in cpu.mmu.dirtied:
            self._log(cpu, table, useless=True)
        cpu.mmu.dirtied.clear()
        if refs is None:
            return None
        walks = 1 + access.retries
        self.counters["access__fault_retries"] += access.retries
        self.counters["access__walks"] += walks
        self.counters["access__walk_refs"] += walks * len(refs)
        self.counters["access__walk_ps"] += walks * sum(refs)
        self.counters["access__dirty_assists" if found else "access__tlb_misses"] += 1
        bits = ACCESSED | (DIRTY if write else 0)
        guest_huge = bool(self.tables.upper[page // 512] & HUGE)
        ept_huge = bool(self.tables.ept_pde[gpfn // 512] & HUGE)
        was_dirty = (self.tables.ept_pde[gpfn // 512] if ept_huge else host) & DIRTY
        if guest_huge:
            self.tables.upper[page // 512] |= bits
        else:
            self.gpt[page] |= bits
        if ept_huge:
            self.tables.ept_pde[gpfn // 512] |= bits
        else:
            self.ept[gpfn] |= bits
        if write and not was_dirty:
            self._log(cpu, gpfn, useless=False)
        if found:
            cpu.mmu.renew(page, frame_of(host))
        else:
            cpu.mmu.fill(page, frame_of(host), write, guest_huge, ept_huge)
        cpu.spend("stall", access.retries * sum(refs))
        return frame_of(host), sum(refs), refs

    def _access(self, cpu: ReferenceVcpu) -> int:
        """The next access of ``cpu``'s queue; REACHED, or why it (or the next) can't be made."""
        access = cpu.queue[0]
        hit, kind = access.kind >= LLC_HIT, access.kind % LLC_HIT
        page, write = access.address >> 12, kind != LOAD
        translated = self._translate(cpu, access)
        if translated is None:
            return FAULT
        slot, walk_ps, refs = translated
        if access.retries:
            self._serve_faults(cpu, access, frame_of(self.gpt[page]), refs)
        mlp = self.state[S.MLP_Q8]
        slow = int(slot >= self.tables.slow_frames)
        line = access.address // 64 % 64
        if self.pairs:
            slow = int(not hit and not self._near(slot, line))
        tiers = (0, 1) if self.pairs and slow else (slow,)
        local = int(access.address // 256 == cpu.last_block)
        swaps = len(tiers) == 2
        if not hit and any(self.budget[way][tier] <= 0 for tier in tiers for way in range(1 + (write or swaps))):
            cpu.spend("stall", walk_ps * mlp // 256)
            cpu.spend("throttle", max(0, self.end_ps - cpu.clock))
            return REACHED
        del cpu.queue[0]
        version = self.gpt[page] >> ENTRY_VERSION_SHIFT & STAMP_VERSION_MASK
        stamp = self.stamps[slot]
        self.counters["integrity__mismatches"] += stamp != self.state[S.OWNER] | page << STAMP_PAGE_SHIFT | version
        latency = walk_ps + (self.state[S.LLC_PS] if hit else self.latency[slow][local])
        if not hit:
            cpu.last_block = access.address // 256
            for tier in tiers:
                self.budget[0][tier] -= self.read_bytes[tier][local]
                self.budget[1][tier] -= self.write_bytes[tier][local] if swaps else 0
            if swaps:
                self.in_dram[slot % self.pairs, line] = slot
                self.counters["access__line_swaps"] += 1
            if write:
                self.budget[1][tiers[0]] -= self.write_bytes[tiers[0]][int(access.address // 256 == cpu.last_written)]
                cpu.last_written = access.address // 256
        if write:
            next_version = (version + 1) % (1 << VERSION_BITS)
            self.gpt[page] += (next_version - version) << ENTRY_VERSION_SHIFT
            old = stamp & STAMP_VERSION_MASK
            self.stamps[slot] = stamp - old + (old + 1) % (1 << VERSION_BITS)
        cpu.spend("think", access.think_ps)
        cpu.spend("stall", latency * mlp // 256)
        cpu.latencies[min(latency >> vcpu.LATENCY_BIN_SHIFT, vcpu.LATENCY_BINS - 1)] += 1
        self.left -= self.left > 0
        for name, amount in (
            ("access__total", 1),
            ("access__slow" if slow else "access__fast", 1),
            ("access__llc_hits", hit),
            ("access__loads", kind != STORE),
            ("access__stores", write),
            ("integrity__accesses_checked", 1),
        ):
            self.counters[name] += int(amount)
        gva = self.table_gva[page // 512] + access.address % (512 * 4096)
        reason = self._sample(cpu, kind, gva, slow, latency, hit)
        if cpu.due:
            cpu.leave(cpu.clock, cpu.due)
            cpu.spend("pml_full", cpu.due)
            cpu.due = 0
        return reason

    # -- flat memory mode ---------------------------------------------------------------------------------------

    def _near(self, slot: int, line: int) -> bool:
        return self.in_dram.get((slot % self.pairs, line), slot % self.pairs) == slot

    def _use_page(self, slot: int, way: int) -> None:
        """The host reads (0) or writes (1) a whole frame."""
        if not self.pairs:
            self.budget[way][slot >= self.tables.slow_frames] -= 4096
            return
        for line in range(64):
            if not self._near(slot, line):
                self.in_dram[slot % self.pairs, line] = slot
                for side in ((0, 0), (0, 1), (1, 0), (1, 1)):
                    self.budget[side[0]][side[1]] -= 64
                if way == 0:
                    continue
            self.budget[way][0] -= 64

    # -- page-modification log ----------------------------------------------------------------------------------

    def _log(self, cpu: ReferenceVcpu, gpfn: int, useless: bool) -> None:
        """An EPT entry's D bit was set: an entry in the log, after an exit if the log is full."""
        if not self.pml_on:
            return
        if len(cpu.log) == 512:
            self.counters["exit__pml_full"] += 1
            cpu.due += self.pml_exit_ps + self._flush_log(cpu)
        cpu.log.append(gpfn)
        self.counters["pml__entries"] += 1
        self.counters["pml__useless"] += useless

    def _flush_log(self, cpu: ReferenceVcpu) -> int:
        """KVM empties it at an exit; what that takes."""
        took = len(cpu.log) * self.pml_entry_ps
        self.dirty |= set(cpu.log)
        cpu.log.clear()
        return took

    def _write_kernel_page(self, cpu: ReferenceVcpu, gpfn: int) -> None:
        if not self.ept[gpfn] & DIRTY:
            self._log(cpu, gpfn, useless=True)
        self.ept[gpfn] |= ACCESSED | DIRTY

    def _serve_faults(self, cpu: ReferenceVcpu, access: Access, gpfn: int, refs: list[int]) -> None:
        access.retries = 0
        cpu.spend(PARTS[access.fault_part], access.fault_ps)
        if not access.exit_ps:
            return
        wait, (first, end, until) = 0, self.notifier
        if cpu.clock < until and first <= gpfn < end:
            wait = until - cpu.clock
            again = -(-wait // (self.state[S.EPT_VIOLATION_PS] + sum(refs)))
            for name in ("kvm__mmu_retries", "exit__ept_violation", *(RETRIED if refs else ())):
                self.counters[name] += again
            self.counters["access__walk_refs"] += again * len(refs)
            self.counters["access__walk_ps"] += again * sum(refs)
        if cpu.clock < self.migrating[1] and gpfn in self.migrating[0]:
            wait = max(wait, self.migrating[1] - cpu.clock)
        hold = 0 if self.state[S.TDP_MMU] else self.state[S.MMU_LOCK_PS]
        locked = self._lock(cpu.clock + wait, hold)
        self.counters["kvm__mmu_lock_wait_ps"] += locked
        cpu.spend(PARTS[access.exit_part], self._exit(cpu, cpu.clock, access.exit_ps + wait + locked))

    def _exit(self, cpu: ReferenceVcpu, start: int, duration: int) -> int:
        """A VM exit, at which KVM empties the log; how long it lasts."""
        duration += self._flush_log(cpu)
        cpu.leave(start, duration)
        return duration

    def _lock(self, time: int, hold: int) -> int:
        """Wait for mmu_lock, then hold it in whatever is free; the wait."""
        number = time // mmu_lock.BIN_PS
        while self.held[number] >= mmu_lock.BIN_PS:
            number += 1
        wait = max(0, number * mmu_lock.BIN_PS - time)
        number = (time + wait) // mmu_lock.BIN_PS
        while hold > 0:
            taken = min(hold, mmu_lock.BIN_PS - self.held[number])
            self.held[number] += taken
            hold -= taken
            number += 1
        return wait

    # -- PMU ----------------------------------------------------------------------------------------------------

    def _sample(self, cpu: ReferenceVcpu, kind: int, gva: int, slow: int, latency: int, hit: bool) -> int:
        params = self.params
        fired = []
        if kind != STORE:
            if params[policy.LOAD_LATENCY]:
                cpu.tag_left -= 1
                if cpu.tag_left <= 0:
                    cpu.random = (cpu.random * 1103515245 + 12345) % (1 << 31)
                    cpu.tag_left = 1 + cpu.random // 256 % params[pebs.P_TAG_SPAN]
                    if latency >= params[pebs.P_THRESHOLD_PS]:
                        fired.append(policy.LOAD_LATENCY)
            if not hit:
                fired.append(policy.SLOW_MISS if slow else policy.FAST_MISS)
        if kind != LOAD:
            fired.append(policy.STORES)
        recorded = False
        for event in fired:
            if not params[event]:
                continue
            cpu.counted[event, pebs.COUNTED] += 1
            cpu.counts[event] += 1
            if cpu.counts[event] == params[event]:
                cpu.counts[event] = 0
                recorded = True
                self._record(cpu, event, (1 << event, cpu.clock, gva, slow, latency // 1000))
                cpu.spend("pebs_record", params[pebs.P_RECORD_PS])
        return PMI if recorded and (cpu.ds_fault or len(cpu.records) >= params[pebs.P_INTERRUPT]) else REACHED

    def _record(self, cpu: ReferenceVcpu, event: int, record: tuple[int, int, int, int, int]) -> None:
        """Write it if there is room."""
        if len(cpu.records) == self.params[pebs.P_MAXIMUM]:
            self.counters["pebs__dropped"] += 1
            cpu.counted[event, pebs.DROPPED] += 1
            return
        size = self.params[pebs.P_RECORD_BYTES]
        start = len(cpu.records) * size
        cpu.records.append(record)
        self.counters["pebs__records"] += 1
        cpu.counted[event, pebs.RECORDED] += 1
        for gpfn in cpu.ds_gpfns[start // 4096 : (start + size - 1) // 4096 + 1]:
            if self.ept[gpfn] & PRESENT:
                self._write_kernel_page(cpu, gpfn)
            else:
                cpu.ds_fault = cpu.ds_fault or len(cpu.records)

    def record_pages(self, cpu: ReferenceVcpu) -> list[int]:
        """gPA frames of the records that wait."""
        size = self.params[pebs.P_RECORD_BYTES]
        return cpu.ds_gpfns[(cpu.ds_fault - 1) * size // 4096 : (len(cpu.records) * size - 1) // 4096 + 1]

    def complete(self, cpu: ReferenceVcpu) -> None:
        """Their pages are mapped: they are written now."""
        for gpfn in self.record_pages(cpu):
            self._write_kernel_page(cpu, gpfn)
        cpu.ds_fault = 0

    # -- vCPUs in turn ------------------------------------------------------------------------------------------

    def run(self, operations: list[Operation], until: int) -> int:
        """Run to ``until``; ``operations`` are taken from the front when executed."""
        slices = [self.state[S.SLICE_PS]] + ([self.state[S.HOST_SLICE_PS]] if self.state[S.PCPUS] else [])
        while True:
            boundary = min(until, *((self.now // length + 1) * length for length in slices))
            if operations:
                boundary = min(boundary, max(self.now, self._due(operations[0])))
            while self.turn < len(self.vcpus):
                reason = self._slice(self.turn, boundary)
                if reason != REACHED:
                    return reason
                self.turn += 1
            self.turn = 0
            self.now = boundary
            while operations and self._due(operations[0]) <= boundary:
                operations[0].time = self._due(operations[0])
                self.operate(operations.pop(0))
            if boundary >= until:
                return REACHED

    def _due(self, op: Operation) -> int:
        """When it is executed: it waits for mmu_lock first."""
        wait = 0 if op.kind in (OP_STALL, OP_TRANSACTION_BEGIN, OP_TRANSACTION_END) else self._lock(op.time, 0)
        return max(op.time, min(op.time + wait, self.end_ps))

    def _slice(self, index: int, until: int) -> int:
        cpu = self.vcpus[index]
        if cpu.idle:
            cpu.spend("halted", max(0, until - cpu.clock))
        elif self.state[S.PCPUS] and self._preempted(index, until):
            return REACHED
        while not cpu.idle and cpu.clock < until:
            if self.left == 0:
                return COMPLETED
            if not cpu.queue:
                return NEED_ACCESSES
            if (reason := self._access(cpu)) != REACHED:
                return reason
        return REACHED

    def _preempted(self, index: int, until: int) -> bool:
        cpu, pcpus = self.vcpus[index], self.state[S.PCPUS]
        number = self.state[S.FIRST_VCPU] + index
        sharers = [other for other in range(self.state[S.FLEET_VCPUS]) if other % pcpus == number % pcpus]
        turn = self.now // self.state[S.HOST_SLICE_PS] % len(sharers)
        if sharers[turn] == number:
            if cpu.off_pcpu:
                cpu.off_pcpu = False
                cpu.mmu.invept(None)
            return False
        away = max(0, until - cpu.clock)
        if not cpu.off_pcpu:
            cpu.off_pcpu = True
            self.counters["exit__preempted"] += 1
            away = self._exit(cpu, cpu.clock, away)
        cpu.exit = (cpu.exit[0], max(cpu.exit[1], until))
        cpu.spend("preempted", away)
        return True

    # -- the host -----------------------------------------------------------------------------------------------

    def operate(self, op: Operation) -> None:
        """Execute one operation of the host or the guest's own kernel."""
        if op.kind in (OP_TRANSACTION_BEGIN, OP_TRANSACTION_END):
            self._copy(op)
            return
        if op.kind == OP_STALL:
            cpu = self.vcpus[op.a]
            lasts = op.b
            if cpu.exit[0] <= op.time < cpu.exit[1]:
                cpu.exit = (cpu.exit[0], max(cpu.exit[1], op.time + lasts))
            else:
                lasts = self._exit(cpu, op.time, lasts)
            cpu.spend("host_task", lasts)
            self.counters["exit__host_task"] += 1
            return
        if op.kind == OP_HARVEST:
            self._harvest(op.time, op.b)
            return
        zapped = 0
        if op.kind == OP_ZAP:
            zapped = sum([self._zap(gpfn) for gpfn in range(op.a, op.a + op.b)])
            for gpfn in range(op.a, op.a + op.b):
                backed_slow = self.ept[gpfn] & WRITABLE and frame_of(self.ept[gpfn]) >= self.tables.slow_frames
                if op.flags == PROTNONE and backed_slow:
                    self.ept[gpfn] |= PROTNONE
            first, end, until = self.notifier
            if op.time < until:
                self.notifier = min(first, op.a), max(end, op.a + op.b), max(until, op.time + op.busy)
            else:
                self.notifier = op.a, op.a + op.b, op.time + op.busy
        elif op.kind != OP_FLUSH:
            frames = (op.a, op.b) if op.kind == OP_SWAP else (op.a,)
            zapped = sum([self._zap(gpfn) for gpfn in frames])
            self.migrating = frames, op.time + op.busy
        self.counters["kvm__mmu_zapped"] += zapped
        if op.kind == OP_FLUSH or zapped:
            self._lock(op.time, op.hold)
            self._request(op.time)
        if op.kind == OP_SWAP:
            self._swap(op.a, op.b)
        elif op.kind not in (OP_FLUSH, OP_ZAP):
            source = frame_of(self.ept[op.a])
            self.stamps[op.b] = self.stamps[source]
            self.ept[op.a] = (self.ept[op.a] & ~FRAME_MASK & ~PROTNONE) | op.b << FRAME_SHIFT | op.flags
            self._use_page(source, 0)
            self._use_page(op.b, 1)

    def _copy(self, op: Operation) -> None:
        """A step of a copy of a page that stays mapped."""
        entry = self.gpt[op.a]
        if op.kind == OP_TRANSACTION_BEGIN:
            self.gpt[op.a] = entry & ~DIRTY
        else:
            source = frame_of(entry)
            if entry & DIRTY or not self.ept[source] & PRESENT or not self.ept[op.b] & PRESENT:
                return
            self.stamps[frame_of(self.ept[op.b])] = self.stamps[frame_of(self.ept[source])]
            for gpfn, bits in ((op.b, ACCESSED | DIRTY), (source, ACCESSED)):
                huge = self.tables.ept_pde[gpfn // 512] & HUGE
                old = self.tables.ept_pde[gpfn // 512] if huge else self.ept[gpfn]
                if bits & DIRTY and not old & DIRTY:
                    self._log(self.vcpus[op.flags >> VCPU_SHIFT], gpfn, useless=False)
                if huge:
                    self.tables.ept_pde[gpfn // 512] |= bits
                else:
                    self.ept[gpfn] |= bits
            entry = entry & ~(FRAME_MASK | ACCESSED | DIRTY) | op.b << FRAME_SHIFT
            self.gpt[op.a] = entry & ~WRITABLE | SHADOWED if op.flags & READ_ONLY else entry
        for cpu in self.vcpus:
            cpu.mmu.invlpg(op.a)

    def _harvest(self, now: int, clear_ps: int) -> None:
        if not self.dirty and not any(cpu.log for cpu in self.vcpus):
            return
        self._request(now)
        for cpu in self.vcpus:
            cpu.spend("pml_full", self._flush_log(cpu))
        for gpfn in self.dirty:
            self.ept[gpfn] &= ~DIRTY
            self.tables.ept_pde[gpfn // 512] &= ~DIRTY
        self._lock(now, clear_ps * len(self.dirty))
        self.harvested |= self.dirty
        self.dirty = set()

    def _swap(self, a: int, b: int) -> None:
        slot_a, slot_b = frame_of(self.ept[a]), frame_of(self.ept[b])
        self.stamps[slot_a], self.stamps[slot_b] = self.stamps[slot_b], self.stamps[slot_a]
        for gpfn, slot in ((a, slot_b), (b, slot_a)):
            self.ept[gpfn] = (self.ept[gpfn] & ~FRAME_MASK & ~PROTNONE) | slot << FRAME_SHIFT
        for slot in (slot_a, slot_b):
            self._use_page(slot, 0)
            self._use_page(slot, 1)

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
            outside = cpu.idle or cpu.off_pcpu or cpu.exit[0] <= now < cpu.exit[1]
            if outside and cpu.flush_at_entry:
                continue
            if not outside:
                kicked = True
                self.counters["exit__kick"] += 1
                invept_ps = self.state[S.INVEPT_PS]
                cpu.spend("kick", self._exit(cpu, now, self.state[S.VMEXIT_PS] + invept_ps) - invept_ps)
            elif not cpu.idle:
                cpu.exit = (cpu.exit[0], cpu.exit[1] + self.state[S.INVEPT_PS])
            cpu.flush_at_entry = True
            cpu.mmu.invept(None)
            cpu.spend("kick", self.state[S.INVEPT_PS])
            for name in ("kvm__tlb_flush", "kvm__remote_flush_executions", "instr__invept_global"):
                self.counters[name] += 1
        self.counters["kvm__remote_tlb_flush"] += kicked

    # -- comparison ---------------------------------------------------------------------------------------------

    def assert_same(self, machine: Machine) -> None:
        """Every table, cache, clock, ledger and counter of ``machine`` is what it is here."""
        counted = {
            name: int(machine.counters[index]) for name, index in C.__members__.items() if machine.counters[index]
        }
        assert counted == {k: v for k, v in self.counters.items() if v}
        assert machine.gpt.tolist() == self.gpt
        assert machine.ept.tolist() == self.ept
        assert (machine.tables.upper & ~TABLE_SEEN_MASK).tolist() == self.tables.upper
        assert machine.tables.ept_pde.tolist() == self.tables.ept_pde
        assert machine.tables.ept_pdpte.tolist() == self.tables.ept_pdpte
        assert machine.stamps.tolist() == self.stamps
        assert machine.budget.tolist() == self.budget
        swapped = np.unpackbits(machine.near.view(np.uint8), bitorder="little")
        mode = {divmod(number, 64) for number in np.flatnonzero(swapped).tolist()}
        assert mode == {where for where, slot in self.in_dram.items() if slot != where[0]}
        assert (bitmap(machine, 0), bitmap(machine, 1)) == (self.dirty, self.harvested)
        assert (int(machine.state[S.NOW]), int(machine.state[S.LEFT])) == (self.now, self.left)
        for index, cpu in enumerate(self.vcpus):
            row = machine.vcpus.field[index]
            assert (row[vcpu.CLOCK], row[vcpu.LENGTH] - row[vcpu.POSITION]) == (cpu.clock, len(cpu.queue))
            ledger = zip(PARTS, machine.vcpus.ledger[index].tolist(), strict=True)
            assert {name: ps for name, ps in ledger if ps} == {name: ps for name, ps in cpu.parts.items() if ps}
            assert (row[vcpu.EXIT_START], row[vcpu.EXIT_END]) == cpu.exit
            assert bool(row[vcpu.FLUSH_AT_ENTRY]) == cpu.flush_at_entry
            assert bool(row[vcpu.FRACTURED]) == cpu.mmu.fractured
            assert row[vcpu.DS_INDEX] == len(cpu.records)
            assert row[vcpu.DS_FAULT] == cpu.ds_fault
            assert machine.pml.due[index] == cpu.due
            counts = machine.ds.counts[index]
            assert {where: int(counts[where]) for where in np.ndindex(counts.shape) if counts[where]} == {
                where: number for where, number in cpu.counted.items() if number
            }
            log = machine.pml.log[index, int(machine.pml.next[index]) + 1 :]
            assert (log >> 12).tolist()[::-1] == (cpu.log if self.pml_on else [])
            cpu.mmu.assert_same(machine, index)
            taken = machine.ds.of(index, len(cpu.records))
            columns = ("applicable_counters", "tsc", "address", "data_source", "latency")
            assert [tuple(int(record[name]) for name in columns) for record in taken] == cpu.records
            histogram = machine.vcpus.histogram[index]
            assert {int(bin_): int(histogram[bin_]) for bin_ in np.flatnonzero(histogram)} == dict(cpu.latencies)


def bitmap(machine: Machine, row: int) -> set[int]:
    """gPA frames whose bits are set in a row of the dirty bitmap."""
    return set(np.flatnonzero(np.unpackbits(machine.pml.dirty[row].view(np.uint8), bitorder="little")).tolist())
