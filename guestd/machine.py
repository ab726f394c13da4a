"""The emulated machine of one guest: its vCPUs, tables, memory and PMU as one tuple of arrays for the kernels."""

from enum import IntEnum, auto
from typing import NamedTuple

import numpy as np

from guestd.address_space import AddressSpace
from guestd.mmu_lock import new_mmu_lock
from guestd.pebs import DsArea, new_ds_area
from guestd.pml import Pml, new_pml
from guestd.tiering.policy import Sampling
from guestd.tlb import TlbGeometry, tlb_geometry
from guestd.vcpu import Vcpus, new_vcpus
from guestd.walk import PRICES, PageTables, WalkGeometry, walk_geometry
from proto.arrays import Words
from proto.config import GuestConfig
from proto.counters import Counters, new_counters
from proto.entry import owner_stamp
from proto.layout import VmMemory
from proto.units import LINE_SIZE


class S(IntEnum):
    """Index into `Machine.state`; times in ps."""

    NOW = 0
    """What all vCPUs have reached."""
    TURN = auto()
    """The vCPU whose turn it is, when the engine stopped on its account."""
    OPERATION = auto()
    """Next host operation of the quantum."""
    LEFT = auto()
    """Transactions left in this phase; negative = unlimited."""
    END_PS = auto()
    """End of the quantum, for a throttled vCPU to wait for."""
    OWNER = auto()
    """Owner part of this VM's stamps."""
    SLOW_FRAMES = auto()
    """First slow frame slot."""
    MLP_Q8 = auto()
    """256 / memory-level parallelism."""
    INVEPT_PS = auto()
    """Cost of one global INVEPT."""
    VMEXIT_PS = auto()
    SLICE_PS = auto()
    STLB_HIT_PS = auto()
    LLC_PS = auto()
    """Latency of an access that the LLC serves."""
    EPT_VIOLATION_PS = auto()
    MMU_LOCK_PS = auto()
    """For how long an EPT violation holds mmu_lock, where it holds it alone."""
    TDP_MMU = auto()
    """1: EPT violations share mmu_lock."""
    EPT_EPOCH = auto()
    """Rises whenever the host changes the EPT; see `guestd.walk`."""
    NOTIFIER_FIRST = auto()
    NOTIFIER_END = auto()
    """gPA frames that an mmu notifier is changing, until `NOTIFIER_UNTIL`."""
    NOTIFIER_UNTIL = auto()
    MIGRATING = auto()
    MIGRATING_TOO = auto()
    """gPA frames that the host is migrating, until `MIGRATING_UNTIL`; each the first of `MIGRATING_PAGES`."""
    MIGRATING_PAGES = auto()
    MIGRATING_UNTIL = auto()
    PCPUS = auto()
    """Physical CPUs that the fleet's vCPUs share; 0 = each has its own."""
    FIRST_VCPU = auto()
    FLEET_VCPUS = auto()
    HOST_SLICE_PS = auto()
    """The host scheduler's slice on a shared pCPU."""


class Machine(NamedTuple):
    """Everything that the engine works on; passed whole to the kernels."""

    vcpus: Vcpus
    tlb_geometry: TlbGeometry
    walk_geometry: WalkGeometry
    gpt: Words
    """int64[pages]: the leaves of the guest page table over its dense page index."""
    tables: PageTables
    """Both page tables above their leaves."""
    ept: Words
    stamps: Words
    table_gva: Words
    """int64[tables]: gVA of the first page of each leaf table."""
    ds: DsArea
    pml: Pml
    walk: Words
    """`proto.layout.VmMemory.walk`"""
    mmu_lock: Words
    """See `guestd.mmu_lock`."""
    near: Words
    """int64[pairs]: which lines are in DRAM (`guestd.near_memory`); empty where memory is not in flat mode."""
    state: Words
    """int64[len(S)]"""
    latency_ps: Words
    """int64[2, 2]: loaded latency by tier (slow?) and locality (local?)."""
    read_bytes: Words
    """int64[2, 2]: media bytes of a read, by tier and locality."""
    write_bytes: Words
    budget: Words
    """int64[2, 2]: media bytes left in the quantum, by direction (write?) and tier."""
    price: Words
    """int64[PRICES]: walk references."""
    counters: Counters


def new_machine(
    config: GuestConfig, space: AddressSpace, memory: VmMemory, sampling: Sampling | None, mlp: float
) -> Machine:
    """A powered-on machine with empty tables and caches. ``mlp``: the workload's memory-level parallelism."""
    costs, host = config.costs, config.host
    state = np.zeros(len(S), np.int64)
    state[S.LEFT] = -1
    state[S.OWNER] = owner_stamp(config.vm)
    state[S.SLOW_FRAMES] = config.total_pages
    state[S.MLP_Q8] = max(1, round(256 / mlp))
    state[S.INVEPT_PS] = costs.invept_ps
    state[S.VMEXIT_PS] = costs.vmexit_ps
    state[S.SLICE_PS] = config.engine.slice_ps
    state[S.STLB_HIT_PS] = costs.stlb_hit_ps
    state[S.LLC_PS] = costs.llc_latency_ps
    state[S.EPT_VIOLATION_PS] = costs.ept_violation_ps
    state[S.MMU_LOCK_PS] = costs.mmu_lock_hold_ps
    state[S.TDP_MMU] = host.tdp_mmu
    state[S.EPT_EPOCH] = 1
    state[S.PCPUS] = host.pcpus if host.pcpus < config.fleet_vcpus else 0
    state[S.FIRST_VCPU], state[S.FLEET_VCPUS] = config.first_vcpu, config.fleet_vcpus
    state[S.HOST_SLICE_PS] = host.sched_slice_ps
    tiers = (costs.fast, costs.slow)
    # A local access finds its block in the device's buffer; only granules above a line have such a block.
    media = np.array([[t.granule_bytes, LINE_SIZE if t.granule_bytes == LINE_SIZE else 0] for t in tiers], np.int64)
    upper, parent = space.upper_entries(config.kernel.page_table_levels)
    return Machine(
        vcpus=new_vcpus(config.vcpus, costs, config.seed),
        tlb_geometry=tlb_geometry(costs),
        walk_geometry=walk_geometry(costs, config.kernel.page_table_levels, host.ept_levels),
        gpt=np.zeros(space.pages, np.int64),
        tables=PageTables(upper, parent, memory.ept_pde, memory.ept_pdpte),
        ept=memory.ept,
        stamps=memory.stamps,
        table_gva=space.table_gva,
        ds=new_ds_area(config.vcpus, config.kernel.ds_pages, sampling, costs, _host_buffer(config, memory)),
        pml=new_pml(config.vcpus, memory.dirty, config.host.pml, costs),
        walk=memory.walk,
        mmu_lock=new_mmu_lock(),
        near=np.zeros(config.total_pages if config.flat_memory else 0, np.int64),
        state=state,
        latency_ps=np.zeros((2, 2), np.int64),
        read_bytes=media,
        write_bytes=media.copy(),
        budget=np.zeros((2, 2), np.int64),
        price=np.zeros(PRICES, np.int64),
        counters=new_counters(),
    )


def _host_buffer(config: GuestConfig, memory: VmMemory) -> Words | None:
    """This VM's part of the host's PEBS buffer, if records go there (``host.pebs=shared``)."""
    area = memory.pebs.size // config.fleet_vcpus
    return memory.pebs[config.first_vcpu * area :] if area else None
