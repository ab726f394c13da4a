"""Small guests for tests: a bare machine for the kernels, a configuration, and a whole guest with its host."""

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from fleet.in_process import InProcessFleet
from guestd.address_space import AddressSpace, Vma
from guestd.guest import Guest
from guestd.machine import Machine, S
from guestd.mmu_lock import new_mmu_lock
from guestd.pebs import new_ds_area
from guestd.pml import new_pml
from guestd.tiering.policy import Sampling
from guestd.tlb import tlb_geometry
from guestd.vcpu import LENGTH, POSITION, new_vcpus
from guestd.walk import PRICES, PageTables, walk_geometry
from proto.config import EngineConfig, GuestConfig, GuestKernel, HostConfig, HostKernel, Scalar
from proto.costs import Costs
from proto.counters import new_counters
from proto.entry import FRAME_SHIFT, PRESENT, WRITABLE, owner_stamp
from proto.trace import LOAD
from proto.units import PAGE_SHIFT, PS_PER_MS, PS_PER_NS

SLOTS = 4096
"""Frame slots of a bare machine; the first half is fast."""
GPA_PAGES = 1 << 14
"""gPA frames of a bare machine, but for its DS areas, which lie behind them."""
TABLE_SLOTS = 3 * SLOTS // 8
"""First of the fast slots that hold page-table pages; every other one lies in as many slow slots behind the middle."""
VMAS = [
    Vma(name, start, 512)
    for name, start in (
        ("heap", 0x5555_5540_0000), ("next", 0x5555_5560_0000), ("far", 0x5555_8000_0000), ("small", 0x5555_8020_0000),
        ("ept 2m", 0x55D5_5540_0000), ("both 2m", 0x7000_0000_0000), ("fractured", 0x7000_4000_0000),
        ("last", 0x7FFF_F000_0000),
    )
]  # fmt: skip
"""Eight leaf tables, which differ in the level from which on their ways up are one."""
TABLES = len(VMAS)


def small_costs(costs: Costs, **changes: object) -> Costs:
    """``costs`` with caches so small that a few dozen pages overflow them, and with ``changes``."""
    small: dict[str, Any] = {"l1_dtlb_4k_entries": 8, "l1_dtlb_4k_ways": 4, "l1_dtlb_2m_entries": 2,
                             "l1_dtlb_2m_ways": 2, "stlb_entries": 16, "stlb_ways": 4, "stlb_2m_ways": 2,
                             "pde_cache_entries": 4, "pdpte_cache_entries": 4, "pml4e_cache_entries": 4,
                             "nested_tlb_entries": 8, "ept_pde_cache_entries": 4, "ept_pdpte_cache_entries": 4,
                             "ept_pml4e_cache_entries": 4}  # fmt: skip
    return msgspec.structs.replace(costs, **small | changes)


def bare_machine(costs: Costs, vcpus: int, seed: int = 1, sampling: Sampling | None = None, guest_levels: int = 4,
                 ept_levels: int = 4, pml: bool = False, flat: bool = False) -> Machine:  # fmt: skip
    """A machine with the page-table pages of `VMAS`, backed, and its DS areas; no leaf is mapped."""
    state, price = np.zeros(len(S), np.int64), np.zeros(PRICES, np.int64)
    state[S.LEFT] = -1
    state[S.OWNER] = owner_stamp(3)
    state[S.SLOW_FRAMES] = SLOTS // 2
    state[S.MLP_Q8] = 256
    state[S.INVEPT_PS], state[S.VMEXIT_PS] = costs.invept_ps, costs.vmexit_ps
    state[S.EPT_VIOLATION_PS], state[S.MMU_LOCK_PS] = costs.ept_violation_ps, costs.mmu_lock_hold_ps
    state[S.SLICE_PS] = 1000 * PS_PER_NS
    state[S.STLB_HIT_PS], state[S.LLC_PS] = costs.stlb_hit_ps, costs.llc_latency_ps
    state[[S.TDP_MMU, S.EPT_EPOCH]] = 1
    price[:] = (3 + np.arange(PRICES)) * PS_PER_NS
    space = AddressSpace(VMAS)
    upper, parent = space.upper_entries(guest_levels)
    ds = new_ds_area(vcpus, 2, sampling, costs)
    buffers = np.arange(ds.gpfn.size)
    ept = np.zeros(GPA_PAGES + 512, np.int64)
    ept[GPA_PAGES + buffers] = (SLOTS + buffers) << FRAME_SHIFT | PRESENT | WRITABLE
    ds.gpfn[:] = GPA_PAGES + buffers.reshape(ds.gpfn.shape)
    # Page-table pages lie 150 gPA frames apart, so that some share 2 MiB of gPA and others do not.
    number = np.arange(upper.size)
    gpfns = GPA_PAGES - 1 - 150 * number
    upper[:] = gpfns << FRAME_SHIFT | PRESENT | WRITABLE
    ept[gpfns] = (TABLE_SLOTS + number + number % 2 * SLOTS // 2) << FRAME_SHIFT | PRESENT | WRITABLE
    return Machine(
        vcpus=new_vcpus(vcpus, costs, seed),
        tlb_geometry=tlb_geometry(costs),
        walk_geometry=walk_geometry(costs, guest_levels, ept_levels),
        gpt=np.zeros(space.pages, np.int64),
        tables=PageTables(upper, parent, np.zeros(ept.size >> 9, np.uint8), np.zeros(1, np.uint8)),
        ept=ept,
        stamps=np.zeros(SLOTS + buffers.size, np.int64),
        table_gva=space.table_gva,
        ds=ds,
        pml=new_pml(vcpus, np.zeros((2, ept.size // 64), np.int64), pml, costs),
        walk=np.zeros((4, ept.size // 64), np.int64),
        mmu_lock=new_mmu_lock(),
        near=np.zeros(SLOTS // 2 if flat else 0, np.int64),
        state=state,
        latency_ps=np.array([[69, 60], [300, 177]], np.int64) * PS_PER_NS,
        read_bytes=np.array([[64, 64], [256, 0]], np.int64),
        write_bytes=np.array([[64, 64], [256, 0]], np.int64),
        budget=np.full((2, 2), 1 << 60, np.int64),
        price=price,
        counters=new_counters(),
    )


def fill(machine: Machine, vcpu: int, addresses: list[int], kind: int = LOAD) -> None:
    """Give ``vcpu`` accesses of one kind to dense byte addresses, in place of those it has left."""
    vcpus = machine.vcpus
    vcpus.address[vcpu, : len(addresses)] = addresses
    vcpus.kind[vcpu, : len(addresses)] = kind
    vcpus.think_ps[vcpu, : len(addresses)] = 0
    vcpus.retries[vcpu, : len(addresses)] = 0
    vcpus.field[vcpu, POSITION], vcpus.field[vcpu, LENGTH] = 0, len(addresses)


def touch_pages(machine: Machine, vcpu: int, pages: list[int], kind: int = LOAD) -> None:
    """Let ``vcpu`` access ``pages`` in order, for as long as it takes."""
    fill(machine, vcpu, [page << PAGE_SHIFT for page in pages], kind)


def guest_config(
    costs: Costs,
    policy: str = "none",
    policy_params: dict[str, Scalar] | None = None,
    workload: str = "gups",
    workload_params: dict[str, Scalar] | None = None,
    *,
    total_pages: int = 4096,
    fast_pages: int = 1024,
    **changes: Any,
) -> GuestConfig:
    """A guest of 16 MiB, a quarter of it fast, with one vCPU, for 20 ms; ``changes`` replace fields."""
    config = GuestConfig(
        vm=0,
        name="vm0",
        seed=11,
        vcpus=1,
        first_vcpu=0,
        fleet_vcpus=1,
        total_pages=total_pages,
        fast_pages=fast_pages,
        slow_pages=total_pages - fast_pages,
        policy=policy,
        policy_params=policy_params or {},
        workload=workload,
        workload_params=workload_params or {},
        run_ps=20 * PS_PER_MS,
        transactions=0,
        start_ps=0,
        sample_ps=100 * PS_PER_MS,
        engine=EngineConfig(quantum_ps=10 * PS_PER_MS, slice_ps=PS_PER_MS, block=2048),
        kernel=GuestKernel(hz=250, sched_slice_ps=8 * PS_PER_MS, single_page_flush_ceiling=33, ds_pages=16,
                           ds_prefault=True, batched_unmap_flush=False),
        host=HostKernel(),
        costs=costs,
        log_path="",
        events_path="",
    )  # fmt: skip
    config = msgspec.structs.replace(config, **changes)
    return msgspec.structs.replace(config, fleet_vcpus=config.first_vcpu + config.vcpus)


def start_fleet(
    config: GuestConfig, make_guest: Callable[..., Guest] = Guest, llc_bytes: int | None = None
) -> InProcessFleet:
    """One guest with its host, before the first message.

    ``llc_bytes``: of the host; None = none, so that data meets memory.
    """
    llc_bytes = 0 if llc_bytes is None else llc_bytes
    costs = msgspec.structs.replace(config.costs, llc_bytes=llc_bytes)
    host = HostConfig(costs=costs, engine=config.engine, sample_ps=config.sample_ps, kernel=config.host)
    return InProcessFleet(host, [config], make_guest)


def running_guest(config: GuestConfig) -> Guest:
    """A guest at a barrier of its run phase; the host serves its EPT faults."""
    fleet = start_fleet(config)
    guest = fleet.guests[config.vm]
    while guest.phase == "populate":
        assert fleet.step()
    assert not guest.finished
    return guest


def run_guest(
    config: GuestConfig, make_guest: Callable[..., Guest] = Guest, llc_bytes: int | None = None
) -> tuple[Guest, dict[str, Any]]:
    """Run one guest with its host to the end: the guest as it was left, and its report."""
    fleet = start_fleet(config, make_guest, llc_bytes)
    guest = fleet.guests[config.vm]
    return guest, fleet.run().reports[config.vm]
