"""The emulated machine of one guest: its vCPUs, tables, memory and PMU as one tuple of arrays for the kernels."""

from enum import IntEnum, auto
from typing import NamedTuple

import numpy as np

from guestd.address_space import AddressSpace
from guestd.fault import NO_FRAME, locate_tables
from guestd.pebs import DsArea, new_ds_area
from guestd.pml import Pml, new_pml
from guestd.tiering.policy import Sampling
from guestd.vcpu import Vcpus, new_vcpus
from guestd.walk import PRICE_EPT_LEAF, PRICE_GUEST_LEAF_FAST, PRICE_GUEST_LEAF_SLOW, PRICE_UPPER, PRICES
from proto.arrays import Words
from proto.config import GuestConfig
from proto.costs import Costs
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
    FLUSH_PS = auto()
    """Cost of one INVEPT."""
    VMEXIT_PS = auto()
    SLICE_PS = auto()
    STLB_HIT_PS = auto()


class Machine(NamedTuple):
    """Everything that the engine works on; passed whole to the kernels."""

    vcpus: Vcpus
    gpt: Words
    """int64[pages]: the guest's leaf page table over its dense page index."""
    ept: Words
    stamps: Words
    table_gva: Words
    """int64[tables]: gVA of the first page of each leaf table."""
    table_gpfn: Words
    """int64[tables]: gPA frame of each leaf page-table page."""
    table_slow: Words
    """int64[tables]: 1 if that page lies in the slow tier."""
    ds: DsArea
    pml: Pml
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
    costs = config.costs
    state = np.zeros(len(S), np.int64)
    state[S.LEFT] = -1
    state[S.OWNER] = owner_stamp(config.vm)
    state[S.SLOW_FRAMES] = config.total_pages
    state[S.MLP_Q8] = max(1, round(256 / mlp))
    state[S.FLUSH_PS] = costs.invept_ps
    state[S.VMEXIT_PS] = costs.vmexit_ps
    state[S.SLICE_PS] = config.engine.slice_ps
    state[S.STLB_HIT_PS] = costs.stlb_hit_ps
    tiers = (costs.fast, costs.slow)
    # A local access finds its block in the device's buffer; only granules above a line have such a block.
    media = np.array([[t.granule_bytes, LINE_SIZE if t.granule_bytes == LINE_SIZE else 0] for t in tiers], np.int64)
    return Machine(
        vcpus=new_vcpus(config.vcpus, costs, config.seed),
        gpt=np.zeros(space.pages, np.int64),
        ept=memory.ept,
        stamps=memory.stamps,
        table_gva=space.table_gva,
        table_gpfn=np.full(space.tables, NO_FRAME, np.int64),
        table_slow=np.zeros(space.tables, np.int64),
        ds=new_ds_area(config.vcpus, config.kernel.ds_pages, sampling, costs, _host_buffer(config, memory)),
        pml=new_pml(config.vcpus, memory.dirty, config.host.pml, costs),
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


def price_walks(machine: Machine, costs: Costs, used_pages: int, llc_bytes: int) -> None:
    """Set the walk prices for a quantum from the loaded latencies and where the page-table pages lie now.

    A leaf line sits in the LLC with the probability that the page tables of ``used_pages`` (GPT and EPT) fit there.
    ``llc_bytes``: this VM's share of it.
    """
    locate_tables(machine.ept, machine.table_gpfn, int(machine.state[S.SLOW_FRAMES]), machine.table_slow)
    fits = min(1000, 1000 * llc_bytes // max(1, 16 * used_pages))
    cached = fits * costs.llc_latency_ps
    fast, slow = (int(machine.latency_ps[tier, 0]) for tier in (0, 1))
    price = machine.price
    price[PRICE_UPPER] = costs.walk_cached_ref_ps
    price[PRICE_GUEST_LEAF_FAST] = (cached + (1000 - fits) * fast) // 1000
    price[PRICE_GUEST_LEAF_SLOW] = (cached + (1000 - fits) * slow) // 1000
    price[PRICE_EPT_LEAF] = price[PRICE_GUEST_LEAF_FAST]
