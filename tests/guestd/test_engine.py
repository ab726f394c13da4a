"""The compiled engine against the reference in plain Python, and the laws of time that every run obeys."""

import os
from collections.abc import MutableSequence
from typing import NamedTuple

import msgspec
import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from guestd import engine, vcpu
from guestd.engine import COMPLETED, FAULT, NEED_ACCESSES, PMI, REACHED
from guestd.guest import Guest
from guestd.machine import S
from guestd.pebs import P_INTERRUPT, P_MAXIMUM, Pebs
from guestd.tiering.policy import Sampling
from guestd.vcpu import drop_guest_everywhere, drop_pages_everywhere
from proto.arrays import Words
from proto.config import Scalar
from proto.costs import Costs
from proto.counters import C
from proto.entry import (
    ACCESSED,
    FRAME_MASK,
    FRAME_SHIFT,
    PRESENT,
    PROTNONE,
    STAMP_PAGE_SHIFT,
    WRITABLE,
)
from proto.layout import OP_FLUSH, OP_HARVEST, OP_MOVE, OP_STALL, OP_ZAP, OPERATION
from proto.trace import LOAD, MODIFY, STORE
from proto.units import PS_PER_S
from tests.guestd.machines import GPA_PAGES, SLOTS, TABLES, bare_machine, guest_config, run_guest, small_costs
from tests.guestd.reference import Access, Reference

FUZZ = int(os.environ.get("FUZZ_EXAMPLES", "0"))
"""Random programs to try instead of the fixed ones."""

PAGES = [table << 9 | 3 * i for i in range(8) for table in range(TABLES)]
"""Pages that programs touch: several per leaf table, so that every cache overflows."""
HOME = {page: (page * 37 + 5) % (GPA_PAGES // 2) for page in PAGES}
"""gPA frame of each page; frame + GPA_PAGES // 2 is where the guest moves it to and back."""
_SPARE = len(PAGES)
"""First frame slot for host moves: those below, and as many at the end, back the two gPA frames of each page."""

Table = MutableSequence[int] | Words


class Segment(NamedTuple):
    """A stretch of a program: accesses of each vCPU, what host threads do meanwhile, what the guest does after it."""

    duration_ns: int
    accesses: list[bytes]
    host: list[tuple[int, int, int, bool]]
    guest: list[tuple[str, int]]


def segments(vcpus: int) -> st.SearchStrategy[Segment]:
    """Accesses are three bytes each: page, offset with kind, and what is added before it."""
    return st.builds(
        Segment,
        duration_ns=st.integers(1, 30_000),
        accesses=st.lists(st.binary(min_size=30, max_size=300), min_size=vcpus, max_size=vcpus),
        host=st.lists(
            st.tuples(st.integers(0, 30_000), st.sampled_from((OP_FLUSH, OP_ZAP, OP_MOVE, OP_STALL, OP_HARVEST)),
                      st.integers(0, 255), st.booleans()),
            max_size=6,
        ),
        guest=st.lists(
            st.tuples(st.sampled_from(("invlpg", "flush", "move", "move unflushed", "age", "protect", "read-only")),
                      st.integers(0, 255)),
            max_size=6,
        ),
    )  # fmt: skip


class Program(NamedTuple):
    """What to run, and on what."""

    vcpus: int
    geometry: tuple[int, int]
    sampling: Sampling | None
    pml: bool
    logged: int
    """Entries that the logs of dirty pages begin with."""
    records: int
    slice_ns: int
    budget: int
    left: int
    segments: list[Segment]


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Any program on one to three vCPUs."""
    vcpus = draw(st.integers(1, 3))
    return Program(
        vcpus=vcpus,
        geometry=draw(st.sampled_from(((16, 4), (32, 16), (8, 2), (4, 4)))),
        sampling=draw(st.none() | st.builds(
            Sampling, st.integers(0, 4), st.sampled_from((0, 64, 250)), st.integers(0, 7), st.integers(0, 5),
            st.integers(0, 5), groups=st.sampled_from(("memory", "memory+gpr+xmm")),
        )),
        pml=draw(st.booleans()),
        logged=draw(st.integers(0, 512)),
        records=draw(st.integers(1, 12)),
        slice_ns=draw(st.sampled_from((100, 1_000, 7_000))),
        budget=draw(st.sampled_from((1 << 60, 4_000, 100))),
        left=draw(st.sampled_from((-1, -1, 40))),
        segments=draw(st.lists(segments(vcpus), min_size=1, max_size=4)),
    )  # fmt: skip


def accesses(data: bytes) -> list[Access]:
    """Three bytes an access; every ninth or so meets a fault before it, or an exit."""
    found = []
    for page, where, extra in zip(data[::3], data[1::3], data[2::3], strict=False):
        address = PAGES[page % len(PAGES)] << 12 | (where >> 2) << 6
        kind = (LOAD, STORE, MODIFY, LOAD)[where & 3]
        fault_ps = 1_500_000 if extra % 9 == 1 else 0
        found.append(Access(address, kind, extra * 100, fault_ps, 2_500_000 if extra % 9 == 2 else 0))
    return found


def map_pages(gpt: Table, ept: Table, stamps: Table, owner: int) -> None:
    """Every page has a frame and its content; some are not present, under PROT_NONE, or not mapped by the EPT."""
    for index, page in enumerate(PAGES):
        for turn, gpfn in enumerate((HOME[page], HOME[page] + GPA_PAGES // 2)):
            slot = index if turn == index % 2 else SLOTS - 1 - index
            ept[gpfn] = slot << FRAME_SHIFT | WRITABLE | (0 if index % 7 == 3 else PRESENT)
        gpt[page] = HOME[page] << FRAME_SHIFT | WRITABLE | (0, PRESENT, PRESENT, PRESENT, PROTNONE)[index % 5]
        stamps[ept[HOME[page]] >> FRAME_SHIFT] = owner | page << STAMP_PAGE_SHIFT


def repair(gpt: Table, ept: Table, page: int) -> None:
    """What a kernel that knows no policy does about a fault: map the page in both tables."""
    gpt[page] = (gpt[page] | PRESENT | WRITABLE) & ~PROTNONE
    gpfn = (gpt[page] & FRAME_MASK) >> FRAME_SHIFT
    ept[gpfn] = (ept[gpfn] | PRESENT | WRITABLE) & ~PROTNONE


def guest_acts(gpt: Table, ept: Table, stamps: Table, what: str, page: int) -> bool:
    """Change the guest's table (and contents) as a kernel would; whether it now owes an INVLPG."""
    if what.startswith("move"):
        old = (gpt[page] & FRAME_MASK) >> FRAME_SHIFT
        new = old ^ (GPA_PAGES // 2)
        stamps[(ept[new] & FRAME_MASK) >> FRAME_SHIFT] = stamps[(ept[old] & FRAME_MASK) >> FRAME_SHIFT]
        gpt[page] = (gpt[page] & ~FRAME_MASK) | new << FRAME_SHIFT
        return what == "move"
    if what == "age":
        gpt[page] &= ~ACCESSED
    elif what == "protect":
        gpt[page] = (gpt[page] & ~PRESENT) | PROTNONE
    elif what == "read-only":
        gpt[page] &= ~WRITABLE
    return what == "invlpg"


class Pair:
    """The engine and the reference side by side, given the same program."""

    def __init__(self, program: Program, costs: Costs) -> None:
        entries, ways = program.geometry
        costs = small_costs(costs, stlb_entries=entries, stlb_ways=ways, load_latency_tag_interval=3)
        machine = self.machine = bare_machine(costs, program.vcpus, seed=5, sampling=program.sampling, pml=program.pml)
        machine.state[S.SLICE_PS] = program.slice_ns * 1000
        machine.state[S.MLP_Q8] = 100
        machine.state[S.LEFT] = program.left
        if program.sampling:
            machine.ds.params[P_MAXIMUM], machine.ds.params[P_INTERRUPT] = program.records, max(1, program.records - 3)
        map_pages(machine.gpt, machine.ept, machine.stamps, int(machine.state[S.OWNER]))
        self.reference = Reference(machine)
        if program.pml:
            first = 512 - program.logged
            machine.pml.log[:, first:], machine.pml.next[:] = 1 << 12, first - 1
            for cpu in self.reference.vcpus:
                cpu.log = [1] * program.logged
        self.pmu = Pebs(machine.ds, machine.pml, machine.ept, machine.vcpus.field, machine.counters, program.sampling)
        self.spare = iter(range(_SPARE, SLOTS - len(PAGES)))
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
        for name in ("address", "kind", "think_ps", "fault_ps", "exit_ps"):
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
        records = np.array(operations, OPERATION)
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
        machine, cpu = self.machine, self.reference.vcpus[self.reference.turn]
        row = machine.vcpus.field[self.reference.turn]
        if reason == NEED_ACCESSES:
            row[vcpu.IDLE], cpu.idle = 1, True
        elif reason == FAULT:
            page = cpu.queue[0].address >> 12
            table = self.reference.table_gpfn[page >> 9]
            event("fault of a page table" if not self.reference.ept[table] & PRESENT else "fault of a page")
            repair(machine.gpt, machine.ept, page)
            repair(self.reference.gpt, self.reference.ept, page)
            machine.ept[table] |= PRESENT
            self.reference.ept[table] |= PRESENT
        else:
            assert reason == PMI
            if cpu.ds_fault:
                pages = self.reference.record_pages(cpu)
                assert set(self.pmu.violations(self.reference.turn)) <= set(pages)
                for gpfn in pages:
                    machine.ept[gpfn] |= PRESENT
                    self.reference.ept[gpfn] |= PRESENT
                self.pmu.resolved(self.reference.turn)
                self.reference.complete(cpu)
            if self.drain:
                row[vcpu.DS_INDEX] = 0
                cpu.records.clear()

    def operations(self, segment: Segment, until: int) -> list[tuple[int, int, int, int, int]]:
        """Host operations of the segment, in order of time; those that no spare frame is left for are left out."""
        found = []
        for when, kind, which, protnone in segment.host:
            time = min(until, self.reference.now + when * 1000)
            gpfn = HOME[PAGES[which % len(PAGES)]]
            if kind == OP_MOVE:
                slot = next(self.spare, 0)
                found += [(time, kind, 0, gpfn, slot)] if slot else []
            elif kind == OP_STALL:
                found.append((time, kind, 0, which % len(self.reference.vcpus), 5_000 * which))
            elif kind == OP_ZAP and which % 4 == 3:
                kernel = [*self.machine.ds.gpfn.T.reshape(-1).tolist(), self.reference.table_gpfn[which % TABLES]]
                found.append((time, kind, 0, kernel[which // 4 % len(kernel)], 1))
            else:
                found.append((time, kind, PROTNONE if protnone else 0, gpfn, 1 + which % 3))
        return sorted(found)

    def after(self, segment: Segment) -> None:
        """What the guest's kernel does between two segments."""
        machine, reference = self.machine, self.reference
        for what, which in segment.guest:
            page = PAGES[which % len(PAGES)]
            if what == "flush":
                drop_guest_everywhere(machine.vcpus)
                reference.guest_flush()
                continue
            if guest_acts(machine.gpt, machine.ept, machine.stamps, what, page):
                drop_pages_everywhere(machine.vcpus, np.array([page], np.int64))
            if guest_acts(reference.gpt, reference.ept, reference.stamps, what, page):
                reference.invlpg([page])


@settings(max_examples=FUZZ or 300, derandomize=not FUZZ)
@given(program=programs())
def test_engine_does_what_the_reference_does(program: Program, costs: Costs) -> None:
    pair = Pair(program, costs)
    for segment in program.segments:
        if not pair.run(segment):
            break
        pair.after(segment)
        pair.reference.assert_same(pair.machine)


def access_parts(guest: Guest) -> int:
    """What counters say that the run phase cost all vCPUs together, ps, but for kernel threads and interrupts."""
    assert guest.populated is not None
    spent = guest.machine.counters - guest.populated.counters
    names = (C.access__stall_ps, C.access__think_ps, C.time__fault_ps, C.time__exit_ps, C.time__throttle_ps)
    switches = 2 * guest.config.costs.context_switch_ps * int(spent[C.vmstat__context_switches])
    return sum(int(spent[name]) for name in names) + switches


def run_clock(guest: Guest) -> int:
    """Virtual time that all vCPUs together spent in the run phase, ps."""
    return int((guest.machine.vcpus.field[:, vcpu.CLOCK] - guest.run_started_ps).sum())


@pytest.mark.parametrize("vcpus", [1, 3])
@pytest.mark.parametrize(("workload", "params"), [("gups", {"think_ns": 7.5}), ("scan", {"write_every": 3})])
def test_clocks_are_the_sum_of_their_parts(workload: str, params: dict[str, Scalar], vcpus: int, costs: Costs) -> None:
    guest, report = run_guest(guest_config(costs, workload=workload, workload_params=params, vcpus=vcpus))
    assert run_clock(guest) == access_parts(guest)
    access = report["access"]
    assert (
        access["fast"] + access["slow"] == access["total"] == report["integrity"]["accesses_checked"] - touched(guest)
    )
    assert access["walks"] == access["tlb_misses"] + access["dirty_assists"]
    assert int(guest.machine.vcpus.histogram.sum()) == access["total"]
    assert report["integrity"]["mismatches"] == 0


def test_a_throttled_guest_waits_for_the_quantum_and_its_clock_still_adds_up(costs: Costs) -> None:
    slow = msgspec.structs.replace(costs.slow, read_bandwidth=200_000_000, write_bandwidth=200_000_000)
    guest, report = run_guest(guest_config(msgspec.structs.replace(costs, slow=slow)))
    assert report["time"]["throttle_s"] > 0
    assert run_clock(guest) == access_parts(guest)
    quantum = guest.config.engine.quantum_ps
    quanta = -(-guest.ended_ps // quantum) - guest.run_started_ps // quantum
    # A quantum may overdraw its budget by the one access that is under way.
    moved = report["access"]["slow"] * slow.granule_bytes
    assert moved <= quanta * (200_000_000 * quantum // PS_PER_S + slow.granule_bytes)


def test_sampling_and_draining_take_the_vcpu_s_time(costs: Costs) -> None:
    params: dict[str, Scalar] = {"load_period": 7, "tau_split": 1_000_000}
    guest, report = run_guest(guest_config(costs, "hyperplace", params))
    assert guest.populated is not None
    spent = guest.machine.counters - guest.populated.counters
    assert report["pebs"]["pmi"] > 0
    # Nothing migrates, so all that is stolen is records, PMIs (their exit is counted as an exit, too) and the agent.
    assert run_clock(guest) == access_parts(guest) - int(spent[C.time__exit_ps]) + int(spent[C.time__stolen_ps])


def touched(guest: Guest) -> int:
    """Accesses of the populate phase."""
    assert guest.populated is not None
    return int(guest.populated.counters[C.access__total])


def test_latency_of_a_working_set_in_fast_memory_is_the_hand_computed_one(costs: Costs) -> None:
    """All pages fast, all translations in the TLB: an update costs think + (TLB hit + DRAM latency) / MLP."""
    params: dict[str, Scalar] = {"footprint": 0.3, "distribution": "uniform", "mlp": 4.0, "think_ns": 2.0}
    fast = msgspec.structs.replace(costs.fast, curve=((0, 1000), (1000, 1000)))
    costs = msgspec.structs.replace(costs, fast=fast, context_switch_ps=0)
    guest, report = run_guest(
        guest_config(costs, workload_params=params, fast_pages=2048, transactions=100_000, run_ps=0)
    )
    assert report["access"]["slow"] == 0
    each = 2_000 + (costs.stlb_hit_ps + fast.latency_random_ps) // 4
    local = 2_000 + (costs.stlb_hit_ps + fast.latency_local_ps) // 4
    assert each == local
    access = report["access"]
    assert access["total"] == 100_000
    # 1228 pages fit the 2048 entries but for sets that overflow; each walk costs its own price instead of the hit's.
    walked = access["walks"] * (report["access"]["walk_ns_mean"] * 1000 - costs.stlb_hit_ps) / 4
    assert run_clock(guest) == pytest.approx(100_000 * each + walked, abs=access["walks"] + 1)


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
