"""The compiled engine against the reference in plain Python, and the laws of time that every run obeys."""

import os
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from guestd import engine, instructions, vcpu
from guestd.engine import COMPLETED, FAULT, NEED_ACCESSES, PMI, REACHED
from guestd.guest import Guest
from guestd.instructions import ANY, GLOBAL
from guestd.jit import kernel
from guestd.kvm import ept_changed
from guestd.machine import Machine, S
from guestd.pebs import P_INTERRUPT, P_MAXIMUM, Pebs
from guestd.tiering.policy import Sampling
from guestd.tiering.registry import policies
from guestd.transaction import READ_ONLY, VCPU_SHIFT
from proto.config import HostKernel, Scalar
from proto.costs import Costs
from proto.counters import C
from proto.entry import (
    ACCESSED,
    FRAME_MASK,
    FRAME_SHIFT,
    HUGE,
    PRESENT,
    PROTNONE,
    STAMP_PAGE_SHIFT,
    WRITABLE,
)
from proto.layout import (
    OP_FLUSH,
    OP_HARVEST,
    OP_MOVE,
    OP_STALL,
    OP_SWAP,
    OP_TRANSACTION_BEGIN,
    OP_TRANSACTION_END,
    OP_ZAP,
    OPERATION,
)
from proto.trace import LLC_HIT, LOAD, MODIFY, STORE
from proto.units import PS_PER_MS, PS_PER_S
from tests.guestd.machines import GPA_PAGES, SLOTS, TABLES, bare_machine, guest_config, run_guest, small_costs
from tests.guestd.reference import Access, Operation, Reference
from tests.guestd.reference_mmu import frame_of

FUZZ = int(os.environ.get("FUZZ_EXAMPLES", "0"))
"""Random programs to try instead of the fixed ones."""

EPT_HUGE, BOTH_HUGE, FRACTURED = 4, 5, 6
"""Leaf tables whose gPA the EPT maps by 2 MiB; that are 2 MiB on both levels; in the guest alone."""
BLOCKS = {EPT_HUGE: (9216, 2560), BOTH_HUGE: (8192, 512), FRACTURED: (8704, 1024)}
"""First gPA frame and first frame slot of each of them."""
SMALL = [table << 9 | 3 * i for i in range(8) for table in range(TABLES) if table not in BLOCKS]
"""Pages that programs touch and move: several per leaf table, so that every cache overflows."""
PAGES = SMALL + [table << 9 | 67 * i for i in range(6) for table in BLOCKS]
MOVED = 4096
"""gPA frame + MOVED is where the guest moves a small page to and back."""
HOME = {page: (page * 37 + 5) % MOVED for page in SMALL}
"""gPA frame of each small page."""
_SPARE = range(len(SMALL), 512)
"""Frame slots for host moves: those below, and as many at the end, back the two gPA frames of each small page."""
CONTEXTS = ((0, 1, 2), (0, 1, GLOBAL), (1, 1, 1), (0, 77, 1))
"""EPTP, VPID and PCID of the contexts that programs switch to beside the first."""


class Segment(NamedTuple):
    """A stretch of a program: accesses of each vCPU, what host threads do meanwhile, what the guest does after it."""

    duration_ns: int
    accesses: list[bytes]
    host: list[tuple[int, int, int, bool]]
    guest: list[tuple[str, int]]


OPERATIONS = (OP_FLUSH, OP_ZAP, OP_MOVE, OP_SWAP, OP_STALL, OP_HARVEST, OP_TRANSACTION_BEGIN, OP_TRANSACTION_END)
MOVES = ("move", "move unflushed", "age", "protect", "read-only")
INVALIDATIONS = ("invlpg", "mov_cr3", "invpcid", "invvpid", "invept")


def segments(vcpus: int) -> st.SearchStrategy[Segment]:
    """Accesses are three bytes each: page, offset with kind, and what is added before it."""
    return st.builds(
        Segment,
        duration_ns=st.integers(1, 30_000),
        accesses=st.lists(st.binary(min_size=30, max_size=300), min_size=vcpus, max_size=vcpus),
        host=st.lists(
            st.tuples(st.integers(0, 30_000), st.sampled_from(OPERATIONS),
                      st.integers(0, 255), st.booleans()),
            max_size=6,
        ),
        guest=st.lists(
            st.tuples(st.sampled_from((*MOVES, *INVALIDATIONS, "context")), st.integers(0, 255)), max_size=6
        ),
    )  # fmt: skip


class Program(NamedTuple):
    """What to run, and on what."""

    vcpus: int
    geometry: tuple[int, int]
    caches: bool
    levels: tuple[int, int]
    sampling: Sampling | None
    logged: int | None
    """Entries that the logs of dirty pages begin with; None: logging is off."""
    records: int
    slice_ns: int
    pcpus: tuple[int, int, int]
    tdp_mmu: bool
    budget: int
    left: int
    flat: bool
    """Memory is in flat mode."""
    segments: list[Segment]


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Any program on one to three vCPUs."""
    vcpus = draw(st.integers(1, 3))
    return Program(
        vcpus=vcpus,
        geometry=draw(st.sampled_from(((16, 4), (32, 16), (8, 2), (48, 24)))),
        caches=draw(st.booleans()),
        levels=draw(st.sampled_from(((4, 4), (4, 4), (5, 4), (4, 5), (5, 5)))),
        sampling=draw(st.none() | st.builds(
            Sampling, st.integers(0, 4), st.sampled_from((0, 64, 250)), st.integers(0, 7), st.integers(0, 5),
            st.integers(0, 5), groups=st.sampled_from(("memory", "memory+gpr+xmm")),
        )),
        logged=draw(st.none() | st.integers(0, 512)),
        records=draw(st.integers(1, 12)),
        slice_ns=draw(st.sampled_from((100, 1_000, 7_000))),
        pcpus=draw(st.sampled_from(((0, 0, 3), (0, 0, 3), (2, 1, 7), (1, 0, 4)))),
        tdp_mmu=draw(st.booleans()),
        budget=draw(st.sampled_from((1 << 60, 4_000, 100))),
        left=draw(st.sampled_from((-1, -1, 40))),
        flat=draw(st.booleans()),
        segments=draw(st.lists(segments(vcpus), min_size=1, max_size=4)),
    )  # fmt: skip


def accesses(data: bytes) -> list[Access]:
    """Three bytes an access; every ninth or so meets a fault before it, or an exit; every fifth hits the LLC."""
    found = []
    for page, where, extra in zip(data[::3], data[1::3], data[2::3], strict=False):
        address = PAGES[page % len(PAGES)] << 12 | (where >> 2) << 6
        kind = (LOAD, STORE, MODIFY, LOAD)[where & 3] | (LLC_HIT if extra % 5 == 3 else 0)
        access = Access(address, kind, extra * 100)
        if extra % 9 in (1, 3):
            access.fault_ps, access.retries = 1_500_000, 1
            access.fault_part = vcpu.HINT_FAULT if extra % 2 else vcpu.MINOR_FAULT
        if extra % 9 in (2, 3):
            access.exit_ps, access.retries = 2_500_000, access.retries + 1
            access.exit_part = vcpu.EPT_REFAULT if extra % 2 else vcpu.EPT_VIOLATION
        found.append(access)
    return found


def map_pages(machine: Machine) -> None:
    """Every page has a frame and its content; some are not present, under PROT_NONE, or not mapped by the EPT."""
    gpt, ept, stamps = machine.gpt, machine.ept, machine.stamps
    for index, page in enumerate(SMALL):
        for turn, gpfn in enumerate((HOME[page], HOME[page] + MOVED)):
            slot = index if turn == index % 2 else SLOTS - 1 - index
            ept[gpfn] = slot << FRAME_SHIFT | WRITABLE | (0 if index % 7 == 3 else PRESENT)
        gpt[page] = HOME[page] << FRAME_SHIFT | WRITABLE | (0, PRESENT, PRESENT, PRESENT, PROTNONE)[index % 5]
    for table, (gpfn, slot) in BLOCKS.items():
        pages = np.arange(512)
        gpt[(table << 9) + pages] = (gpfn + pages) << FRAME_SHIFT | WRITABLE | PRESENT
        ept[gpfn + pages] = (slot + pages) << FRAME_SHIFT | WRITABLE | PRESENT
        if table != FRACTURED:
            machine.tables.ept_pde[gpfn >> 9] = HUGE
        if table != EPT_HUGE:
            machine.tables.upper[table] = gpfn << FRAME_SHIFT | PRESENT | WRITABLE | HUGE
    mapped = np.flatnonzero(gpt)
    slots = (ept[(gpt[mapped] & FRAME_MASK) >> FRAME_SHIFT] & FRAME_MASK) >> FRAME_SHIFT
    stamps[slots] = machine.state[S.OWNER] | mapped << STAMP_PAGE_SHIFT


@kernel
def execute(m: Machine, vcpu: int, what: int, kind: int, number: int, page: int) -> None:
    """Execute an invalidation, numbered as in INVALIDATIONS, on one vCPU."""
    if what == 0:
        instructions.invlpg(m.vcpus, vcpu, m.tlb_geometry, m.walk_geometry, page)
    elif what == 1:
        instructions.mov_cr3(m.vcpus, vcpu, m.walk_geometry)
    elif what == 2:
        instructions.invpcid(m.vcpus, vcpu, m.tlb_geometry, m.walk_geometry, m.tables, kind, number, page)
    elif what == 3:
        instructions.invvpid(m.vcpus, vcpu, m.tlb_geometry, m.walk_geometry, m.tables, kind, number, page)
    else:
        instructions.invept(m.vcpus, vcpu, m.walk_geometry, number)


class Pair:
    """The engine and the reference side by side, given the same program."""

    def __init__(self, program: Program, costs: Costs) -> None:
        entries, ways = program.geometry
        off = (
            {}
            if program.caches
            else dict.fromkeys(
                ("pdpte_cache_entries", "nested_tlb_entries", "ept_pde_cache_entries", "ept_pml4e_cache_entries"), 0
            )
        )
        costs = small_costs(costs, stlb_entries=entries, stlb_ways=ways, load_latency_tag_interval=3, **off)
        machine = self.machine = bare_machine(
            costs, program.vcpus, 5, program.sampling, *program.levels, program.logged is not None, program.flat
        )
        machine.state[S.SLICE_PS] = program.slice_ns * 1000
        machine.state[S.MLP_Q8] = 100
        machine.state[S.LEFT] = program.left
        machine.state[S.TDP_MMU] = program.tdp_mmu
        machine.state[[S.PCPUS, S.FIRST_VCPU, S.FLEET_VCPUS]] = program.pcpus
        machine.state[S.HOST_SLICE_PS] = 3_000_000
        if program.sampling:
            machine.ds.params[P_MAXIMUM], machine.ds.params[P_INTERRUPT] = program.records, max(1, program.records - 3)
        machine.vcpus.context[:, 1 : 1 + len(CONTEXTS)] = CONTEXTS
        map_pages(machine)
        self.reference = Reference(machine)
        if program.logged is not None:
            first = 512 - program.logged
            machine.pml.log[:, first:], machine.pml.next[:] = 1 << 12, first - 1
            for cpu in self.reference.vcpus:
                cpu.log = [1] * program.logged
        self.pmu = Pebs(
            machine.ds,
            machine.pml,
            machine.ept,
            machine.tables.ept_pde,
            machine.vcpus.field,
            machine.counters,
            program.sampling,
        )
        self.spare = iter(_SPARE)
        self.drain = program.records % 2 == 0
        self.budget = program.budget

    def fill(self, index: int, data: bytes) -> None:
        """New accesses for a vCPU that has none left."""
        cpu, row, vcpus = self.reference.vcpus[index], self.machine.vcpus.field[index], self.machine.vcpus
        if cpu.queue:
            return
        cpu.queue = accesses(data)
        cpu.idle = False
        row[vcpu.POSITION], row[vcpu.LENGTH], row[vcpu.IDLE] = 0, len(cpu.queue), 0
        for name in ("address", "kind", "think_ps", "fault_ps", "fault_part", "exit_ps", "exit_part", "retries"):
            getattr(vcpus, name)[index, : len(cpu.queue)] = [getattr(access, name) for access in cpu.queue]

    def run(self, segment: Segment) -> bool:
        """Run one segment; whether the program goes on."""
        machine, reference = self.machine, self.reference
        for index, data in enumerate(segment.accesses):
            self.fill(index, data)
        until = reference.now + segment.duration_ns * 1000
        machine.state[S.END_PS] = reference.end_ps = until
        machine.state[S.OPERATION] = 0
        machine.budget[:] = self.budget
        reference.budget = machine.budget.tolist()
        operations = self.operations(segment, until)
        records = np.array([tuple(vars(operation).values()) for operation in operations], OPERATION)
        while True:
            reason = int(engine.run(machine, records, until))
            assert reason == reference.run(operations, until)
            reference.assert_same(machine)
            event(("reached", "accesses", "fault", "PMI", "completed")[reason])
            if any(cpu.ds_fault for cpu in reference.vcpus):
                event("record met an EPT violation")
            if reference.counters["exit__pml_full"]:
                event("log of dirty pages was full")
            if reason in (REACHED, COMPLETED):
                return reason == REACHED
            self.resolve(reason)

    def resolve(self, reason: int) -> None:
        machine, reference = self.machine, self.reference
        cpu = reference.vcpus[reference.turn]
        row = machine.vcpus.field[reference.turn]
        if reason == NEED_ACCESSES:
            row[vcpu.IDLE], cpu.idle = 1, True
        elif reason == FAULT:
            self.repair(cpu.queue[0].address >> 12)
        else:
            assert reason == PMI
            if cpu.ds_fault:
                pages = reference.record_pages(cpu)
                assert self.pmu.violations(reference.turn).tolist() == [
                    gpfn for gpfn in pages if not reference.ept[gpfn] & PRESENT
                ]
                for gpfn in pages:
                    machine.ept[gpfn] |= PRESENT
                    reference.ept[gpfn] |= PRESENT
                self.pmu.resolved(reference.turn)
                reference.complete(cpu)
            if self.drain:
                row[vcpu.DS_INDEX] = 0
                cpu.records.clear()

    def repair(self, page: int) -> None:
        """What a kernel that knows no policy does about a fault: map page and tables in both page tables."""
        tables = self.reference.tables
        tables.gpt[page] = (tables.gpt[page] | PRESENT | WRITABLE) & ~PROTNONE
        frames, number = [frame_of(tables.gpt[page])], page // 512
        while number != tables.parent[number]:
            frames.append(frame_of(tables.upper[number]))
            number = tables.parent[number]
        for gpfn in (*frames, frame_of(tables.upper[number])):
            tables.ept[gpfn] = (tables.ept[gpfn] | PRESENT | WRITABLE) & ~PROTNONE
        self.machine.gpt[:], self.machine.ept[:] = tables.gpt, tables.ept

    def operations(self, segment: Segment, until: int) -> list[Operation]:
        """Operations of the segment, in order of time; those that no spare frame is left for are left out."""
        found = []
        for when, kind, which, protnone in segment.host:
            time = min(until, self.reference.now + when * 1000)
            gpfn = HOME[SMALL[which % len(SMALL)]]
            hold, busy = 100_000 * (which % 16), 300_000 * (which % 16)
            if kind == OP_MOVE:
                slot = next(self.spare, 0)
                found += [Operation(time, kind, 0, gpfn, slot, hold, busy)] if slot else []
            elif kind == OP_SWAP:
                other = HOME[SMALL[(which + 7) % len(SMALL)]]
                found.append(Operation(time, kind, 0, gpfn, other, hold, busy))
            elif kind == OP_STALL:
                found.append(Operation(time, kind, 0, which % len(self.reference.vcpus), 5_000 * which))
            elif kind in (OP_TRANSACTION_BEGIN, OP_TRANSACTION_END):
                page = SMALL[which % len(SMALL)]
                flags = which % len(self.reference.vcpus) << VCPU_SHIFT | (READ_ONLY if protnone else 0)
                found.append(Operation(time, kind, flags, page, HOME[page] + which % 2 * MOVED))
            elif kind == OP_ZAP and which % 4 == 3:
                found.append(
                    Operation(time, kind, 0, GPA_PAGES + which // 4 % (2 * len(self.reference.vcpus)), 1, hold, busy)
                )
            elif kind == OP_ZAP and which % 4 == 2:
                table = frame_of(self.reference.tables.upper[which % len(self.reference.tables.upper)])
                found.append(Operation(time, kind, 0, table if table > MOVED * 3 else gpfn, 1, hold, busy))
            elif kind == OP_HARVEST:
                found.append(Operation(time, kind, b=200_000 * (which % 4)))
            else:
                found.append(Operation(time, kind, PROTNONE if protnone else 0, gpfn, 1 + which % 3, hold, busy))
        return sorted(found, key=lambda operation: operation.time)

    def after(self, segment: Segment) -> None:
        """What the guest's kernel does between two segments."""
        for what, which in segment.guest:
            if what == "context":
                index = which % len(self.reference.vcpus)
                number = which // 4 % (1 + len(CONTEXTS))
                self.machine.vcpus.field[index, vcpu.CONTEXT] = self.reference.vcpus[index].mmu.current = number
            elif what in INVALIDATIONS:
                self.invalidate(what, which)
            else:
                self.act(what, (SMALL if what.startswith("move") else PAGES)[which % 35])

    def invalidate(self, what: str, which: int) -> None:
        index, kind, page = which % len(self.reference.vcpus), which // 3 % 4, PAGES[which % len(PAGES)]
        mmu, parent = self.reference.vcpus[index].mmu, self.reference.tables.parent
        number = 0
        if what == "invlpg":
            mmu.invlpg(page)
        elif what == "mov_cr3":
            mmu.mov_cr3()
        elif what == "invpcid":
            number = 1 + which % 2
            mmu.invpcid(kind, number, page, parent)
        elif what == "invvpid":
            number = 77 if which % 5 == 0 else mmu.contexts[0][1]
            mmu.invvpid(kind, number, page, parent)
        else:
            number = (0, 1, ANY)[which % 3]
            mmu.invept(None if number == ANY else number)
        execute(self.machine, index, INVALIDATIONS.index(what), kind, number, page)

    def act(self, what: str, page: int) -> None:
        """Change the guest's table (and contents) as a kernel would, with an INVLPG on every vCPU if it owes one."""
        machine, reference = self.machine, self.reference
        gpt, ept, stamps = reference.gpt, reference.ept, reference.stamps
        if what.startswith("move"):
            old = frame_of(gpt[page])
            new = old ^ MOVED
            stamps[frame_of(ept[new])] = stamps[frame_of(ept[old])]
            gpt[page] = (gpt[page] & ~FRAME_MASK) | new << FRAME_SHIFT
        elif what == "age":
            gpt[page] &= ~ACCESSED
        elif what == "protect":
            gpt[page] = (gpt[page] & ~PRESENT) | PROTNONE
        else:
            gpt[page] &= ~WRITABLE
        machine.gpt[:], machine.stamps[:] = gpt, stamps
        if what == "move":
            for index, cpu in enumerate(reference.vcpus):
                cpu.mmu.invlpg(page)
                execute(machine, index, 0, 0, 0, page)


@settings(max_examples=FUZZ or 1000, derandomize=not FUZZ)
@given(program=programs())
def test_engine_does_what_the_reference_does(program: Program, costs: Costs) -> None:
    pair = Pair(program, costs)
    for segment in program.segments:
        if not pair.run(segment):
            break
        pair.after(segment)
        # A barrier: the host may have changed the EPT.
        ept_changed(pair.machine)
        pair.reference.assert_same(pair.machine)


def check_ledgers(guest: Guest, report: dict[str, Any]) -> None:
    """The time on each vCPU is the sum of its parts, to the picosecond; in the summary, too."""
    vcpus = guest.machine.vcpus
    assert (vcpus.ledger.sum(axis=1) == vcpus.field[:, vcpu.CLOCK] - guest.booted_ps).all()
    assert (vcpus.ledger >= 0).all()
    for row in report["vcpu_time"]:
        assert row["clock_ps"] == sum(ps for name, ps in row.items() if name != "clock_ps")


@pytest.mark.parametrize("vcpus", [1, 3])
@pytest.mark.parametrize(("workload", "params"), [("gups", {"think_ns": 7.5}), ("scan", {"write_every": 3})])
def test_counters_obey_their_laws(workload: str, params: dict[str, Scalar], vcpus: int, costs: Costs) -> None:
    guest, report = run_guest(guest_config(costs, workload=workload, workload_params=params, vcpus=vcpus))
    check_ledgers(guest, report)
    access = report["access"]
    assert (
        access["fast"] + access["slow"] == access["total"] == report["integrity"]["accesses_checked"] - touched(guest)
    )
    assert access["walks"] == access["tlb_misses"] + access["dirty_assists"] + access["fault_retries"]
    assert int(guest.machine.vcpus.histogram.sum()) == access["total"]
    assert report["integrity"]["mismatches"] == 0


@pytest.mark.parametrize("policy", ["g-tpp", "h-tpp", "hyperplace"])
def test_laws_hold_under_every_policy_on_shared_pcpus(policy: str, costs: Costs) -> None:
    """Three vCPUs on two pCPUs, under a policy that acts within milliseconds."""
    config = guest_config(costs, policy, dict(policies()[policy].warm_up), vcpus=3, run_ps=40 * PS_PER_MS)
    guest, report = run_guest(msgspec.structs.replace(
        config, host=HostKernel(pcpus=2, sched_slice_ps=PS_PER_MS),
        engine=msgspec.structs.replace(config.engine, quantum_ps=4 * PS_PER_MS),
    ))  # fmt: skip
    check_ledgers(guest, report)
    access, kvm, whole = report["access"], report["kvm"], guest.machine.counters
    assert access["walks"] == access["tlb_misses"] + access["dirty_assists"] + access["fault_retries"]
    assert kvm["exits"]["preempted"] > 0
    requests = int(whole[C.kvm__remote_tlb_flush_requests])
    assert (requests > 0) == (policy == "h-tpp")
    assert whole[C.kvm__remote_flush_executions] <= requests * 3
    assert whole[C.kvm__tlb_flush] == whole[C.kvm__remote_flush_executions] + whole[C.kvm__pv_flushes]
    exits = sum(int(whole[index]) for index in C if index.name.startswith("exit__"))
    assert whole[C.kvm__tlb_flush] <= exits + 3, "one flush an entry, however many requests piled up"
    assert report["migration"]["promoted_pages"] > 0
    assert report["integrity"]["mismatches"] == 0


def test_a_throttled_guest_waits_for_the_quantum_and_its_clock_still_adds_up(costs: Costs) -> None:
    slow = msgspec.structs.replace(costs.slow, read_bandwidth=200_000_000, write_bandwidth=200_000_000)
    guest, report = run_guest(guest_config(msgspec.structs.replace(costs, slow=slow)))
    assert report["time"]["throttle_s"] > 0
    check_ledgers(guest, report)
    quantum = guest.config.engine.quantum_ps
    quanta = -(-guest.ended_ps // quantum) - guest.run_started_ps // quantum
    # A quantum may overdraw its budget by the one access that is under way.
    moved = report["access"]["slow"] * slow.granule_bytes
    assert moved <= quanta * (200_000_000 * quantum // PS_PER_S + slow.granule_bytes)


def test_sampling_and_draining_take_the_vcpu_s_time(costs: Costs) -> None:
    params: dict[str, Scalar] = {"load_period": 7, "tau_split": 1_000_000}
    guest, report = run_guest(guest_config(costs, "hyperplace", params))
    check_ledgers(guest, report)
    time, pebs = report["time"], report["pebs"]
    assert pebs["pmi"] > 0
    assert time["pebs_record_s"] == pytest.approx((pebs["records"] + pebs["dropped"]) * costs.pebs_record_ps / PS_PER_S)
    assert time["pmi_exit_s"] == pytest.approx(pebs["pmi"] * costs.pmi_guest_ps / PS_PER_S)
    assert time["interrupt_s"] >= pebs["pmi"] * costs.pmi_ps / PS_PER_S
    # Nothing migrates, so all that is stolen is records, PMIs and the agent.
    stolen = sum(time[name] for name in ("pebs_record_s", "pmi_exit_s", "interrupt_s", "agent_s"))
    assert report["agent_cpu"]["stolen_s"] == pytest.approx(stolen)


def touched(guest: Guest) -> int:
    """Accesses of the populate phase."""
    assert guest.populated is not None
    return int(guest.populated.counters[C.access__total])


def test_latency_of_a_working_set_in_fast_memory_is_the_hand_computed_one(costs: Costs) -> None:
    """All pages fast: an update costs think + (STLB hit or walk + DRAM latency) / MLP."""
    params: dict[str, Scalar] = {"footprint": 0.3, "distribution": "uniform", "mlp": 4.0, "think_ns": 2.0}
    fast = msgspec.structs.replace(costs.fast, curve=((0, 1000), (1000, 1000)))
    costs = msgspec.structs.replace(costs, fast=fast, context_switch_ps=0)
    guest, report = run_guest(
        guest_config(costs, workload_params=params, fast_pages=2048, transactions=100_000, run_ps=0), llc_bytes=1
    )
    assert report["access"]["slow"] == report["access"]["llc_hits"] == 0
    each = 2_000 + fast.latency_random_ps / 4
    access = report["access"]
    assert access["total"] == 100_000
    # 1228 pages fit the 2048 entries of the STLB but for sets that overflow; 64 of them are in the L1.
    translated = (access["walks"] * access["walk_ns_mean"] * 1000 + access["stlb_hits"] * costs.stlb_hit_ps) / 4
    clock = guest.ended_ps - guest.run_started_ps
    assert clock == pytest.approx(100_000 * each + translated, abs=100_000)
    first_level = 1 - (access["stlb_hits"] + access["walks"]) / 100_000
    sigma = (64 / 1228 / 100_000) ** 0.5
    assert first_level == pytest.approx(64 / 1228, abs=5 * sigma)


def test_hit_ratio_of_uniform_accesses_is_the_share_of_pages_that_the_tlb_holds(costs: Costs) -> None:
    """Pages fill the sets evenly, so each access finds one of `ways` out of pages / sets: entries / pages in all.

    Under independent uniform accesses any replacement that ignores the future has this hit ratio.
    """
    params: dict[str, Scalar] = {"footprint": 0.75, "distribution": "uniform"}
    config = guest_config(costs, workload_params=params, transactions=400_000, run_ps=0)
    _, report = run_guest(config)
    pages, total = 3072, 400_000
    hit = 1 - report["access"]["tlb_misses"] / total
    # Start-up adds at most `entries` misses; the noise is binomial, 5 sigma of it and the start-up are allowed.
    share = costs.stlb_entries / pages
    sigma = (share * (1 - share) / total) ** 0.5
    assert share - 5 * sigma - costs.stlb_entries / total <= hit <= share + 5 * sigma
