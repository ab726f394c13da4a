"""Small guests for tests: a bare machine for the kernels, a configuration, and a whole guest with its host."""

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from fleet.in_process import InProcessFleet
from guestd.guest import Guest
from guestd.machine import Machine, S
from guestd.pebs import new_ds_area
from guestd.pml import new_pml
from guestd.tiering.policy import Sampling
from guestd.vcpu import LENGTH, POSITION, new_vcpus
from guestd.walk import PRICES
from proto.config import EngineConfig, GuestConfig, GuestKernel, HostConfig, HostKernel, Scalar
from proto.costs import Costs
from proto.counters import new_counters
from proto.entry import FRAME_SHIFT, PRESENT, WRITABLE, owner_stamp
from proto.trace import LOAD
from proto.units import PAGE_SHIFT, PS_PER_MS, PS_PER_NS

SLOTS = 256
"""Frame slots of a bare machine; the first half is fast."""
GPA_PAGES = 1 << 13
TABLES = 6
TABLE_BYTES = 1 << 21


def small_costs(costs: Costs, **changes: object) -> Costs:
    """``costs`` with caches so small that a few dozen pages overflow them, and with ``changes``."""
    small: dict[str, Any] = {"stlb_entries": 16, "stlb_ways": 4, "pde_cache_entries": 4, "nested_tlb_entries": 8,
                             "ept_pde_cache_entries": 4}  # fmt: skip
    return msgspec.structs.replace(costs, **small | changes)


def bare_machine(
    costs: Costs, vcpus: int, seed: int = 1, sampling: Sampling | None = None, pml: bool = False
) -> Machine:
    """A machine with nothing mapped but its DS areas and page tables, which lie behind the gPA space of 8192 pages.

    It has 6 leaf tables of gVA and 128 frame slots in each tier; a DS area has two pages.
    """
    state, price = np.zeros(len(S), np.int64), np.zeros(PRICES, np.int64)
    state[S.LEFT] = -1
    state[S.OWNER] = owner_stamp(3)
    state[S.SLOW_FRAMES] = SLOTS // 2
    state[S.MLP_Q8] = 256
    state[S.FLUSH_PS] = costs.invept_ps
    state[S.VMEXIT_PS] = costs.vmexit_ps
    state[S.SLICE_PS] = 1000 * PS_PER_NS
    state[S.STLB_HIT_PS] = costs.stlb_hit_ps
    price[:] = (5 * PS_PER_NS, 22 * PS_PER_NS, 31 * PS_PER_NS, 23 * PS_PER_NS)
    tables = np.arange(TABLES, dtype=np.int64)
    ds = new_ds_area(vcpus, 2, sampling, costs)
    ds.gpfn[:] = GPA_PAGES + np.arange(ds.gpfn.size).reshape(ds.gpfn.shape)
    table_gpfn = GPA_PAGES + 64 + tables * 700
    ept = np.zeros(GPA_PAGES + 64 + TABLES * 700, np.int64)
    kernel = np.concatenate([ds.gpfn.reshape(-1), table_gpfn])
    ept[kernel] = (SLOTS + np.arange(kernel.size)) << FRAME_SHIFT | PRESENT | WRITABLE
    return Machine(
        vcpus=new_vcpus(vcpus, costs, seed),
        gpt=np.zeros(TABLES << 9, np.int64),
        ept=ept,
        stamps=np.zeros(SLOTS, np.int64),
        table_gva=0x5555_5540_0000 + tables * 3 * TABLE_BYTES,
        table_gpfn=table_gpfn,
        table_slow=tables & 1,
        ds=ds,
        pml=new_pml(vcpus, np.zeros((2, -(-ept.size // 64)), np.int64), pml, costs),
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


def start_fleet(config: GuestConfig, make_guest: Callable[..., Guest] = Guest) -> InProcessFleet:
    """One guest with its host, before the first message."""
    host = HostConfig(costs=config.costs, engine=config.engine, sample_ps=config.sample_ps, kernel=config.host)
    return InProcessFleet(host, [config], make_guest)


def running_guest(config: GuestConfig) -> Guest:
    """A guest at a barrier of its run phase; the host serves its EPT faults."""
    fleet = start_fleet(config)
    guest = fleet.guests[config.vm]
    while guest.phase == "populate":
        assert fleet.step()
    assert not guest.finished
    return guest


def run_guest(config: GuestConfig, make_guest: Callable[..., Guest] = Guest) -> tuple[Guest, dict[str, Any]]:
    """Run one guest with its host to the end: the guest as it was left, and its report."""
    fleet = start_fleet(config, make_guest)
    guest = fleet.guests[config.vm]
    return guest, fleet.run().reports[config.vm]
