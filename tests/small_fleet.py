"""Small guests for tests in one process, and the laws of memory that hold for them at every barrier."""

from typing import Any

import msgspec
import numpy as np

from fleet.in_process import InProcessFleet
from guestd.fault import table_frames
from guestd.guest import Guest
from guestd.mm.nodes import F_ACTIVE, F_BUSY, F_HUGE, F_LRU, F_SHADOW, FAST, NO_PAGE, Nodes
from guestd.mm.page_alloc import is_free
from guestd.mm.shadows import COUNT, LOWEST
from guestd.tiering.pages import expand
from guestd.tiering.registry import policies
from hostd.flat_memory import FlatMemory
from proto.arrays import Bytes, Mask, Words
from proto.config import EngineConfig, GuestConfig, GuestKernel, HostConfig, HostKernel, Scalar
from proto.costs import Costs
from proto.entry import ACCESSED, DIRTY, FRAME_MASK, FRAME_SHIFT, HUGE, PRESENT, PROTNONE, WRITABLE, YOUNG
from proto.units import PS_PER_MS, TABLE_PAGES

PAGES = 8192
"""32 MiB."""
FAST_PAGES = PAGES // 5
LLC_BYTES = 0
"""The page tables of one populated small guest and nothing else, so that data meets memory."""
MEASURED = ("measured_s", "measured_cores", "floor_s", "guest_thread_s")
ENGINE = EngineConfig(quantum_ps=10 * PS_PER_MS, slice_ps=PS_PER_MS, block=1024)


def small_guest(costs: Costs, policy: str = "none", *, params: dict[str, Scalar] | None = None, run_ms: int = 60,
                pages: int = PAGES, fast: int | None = None, vcpus: int = 2, vm: int = 0, seed: int = 3,
                start_ms: int = 0, transactions: int = 0, workload: dict[str, Scalar] | None = None,
                batched_unmap_flush: bool = False, host: HostKernel | None = None) -> GuestConfig:  # fmt: skip
    """GUPS on ``pages`` pages. ``params`` None: those with which each mechanism acts within milliseconds."""
    fast = pages // 5 if fast is None else fast
    # Of flat memory a part is dedicated.
    fast = max(fast, 5 * pages // 8) if policies()[policy].flat_memory else fast
    return GuestConfig(
        vm=vm,
        name=f"vm{vm}",
        seed=seed,
        vcpus=vcpus,
        first_vcpu=vm * vcpus,
        fleet_vcpus=(vm + 1) * vcpus,
        total_pages=pages,
        fast_pages=fast,
        slow_pages=pages - fast,
        policy=policy,
        policy_params=dict(policies()[policy].warm_up) if params is None else params,
        workload="gups",
        workload_params=workload or {},
        run_ps=0 if transactions else run_ms * PS_PER_MS,
        transactions=transactions,
        start_ps=start_ms * PS_PER_MS,
        sample_ps=10 * PS_PER_MS,
        engine=ENGINE,
        kernel=GuestKernel(
            hz=1000,
            sched_slice_ps=PS_PER_MS,
            single_page_flush_ceiling=33,
            ds_pages=16,
            ds_prefault=True,
            batched_unmap_flush=batched_unmap_flush,
        ),
        host=host or HostKernel(),
        costs=costs,
        log_path="",
        events_path="",
    )


def with_thp(config: GuestConfig, guest: str = "never", host: str = "never", **kernel: Any) -> GuestConfig:
    """``config`` with huge pages in guest or host, and other parameters of the guest's kernel."""
    return msgspec.structs.replace(
        config,
        kernel=msgspec.structs.replace(config.kernel, thp=guest, **kernel),
        host=msgspec.structs.replace(config.host, thp=host),
    )


def small_host(costs: Costs, kernel: HostKernel | None = None) -> HostConfig:
    """A host for such guests."""
    costs = msgspec.structs.replace(costs, llc_bytes=LLC_BYTES)
    return HostConfig(costs=costs, engine=ENGINE, sample_ps=10 * PS_PER_MS, kernel=kernel or HostKernel())


def new_fleet(*guests: GuestConfig) -> InProcessFleet:
    """A fleet of such guests that has not run yet."""
    return InProcessFleet(small_host(guests[0].costs, guests[0].host), list(guests))


def run_fleet(*guests: GuestConfig) -> dict[int, dict[str, Any]]:
    """Run it to the end; the reports."""
    host = new_fleet(*guests).run()
    assert host.failures == []
    return host.reports


def until_populated(fleet: InProcessFleet) -> Guest:
    """Run until VM 0 has touched everything once."""
    guest = fleet.guests[0]
    while guest.phase == "populate":
        assert fleet.step()
    return guest


def without_measured(report: dict[str, Any]) -> dict[str, Any]:
    """A report without what this machine's clock says."""
    cpus = [report["agent_cpu"], report["populate"]["agent_cpu"]]
    cpu, before = ({key: value for key, value in one.items() if key not in MEASURED} for one in cpus)
    rest = {key: value for key, value in report.items() if key != "process_cpu"}
    rest |= {"agent_cpu": cpu, "populate": report["populate"] | {"agent_cpu": before}}
    if "cpu_ns_per_sample" in report.get("pebs", {}):
        rest["pebs"] = report["pebs"] | {"cpu_ns_per_sample": report["pebs"]["cpu_ns_per_sample"]["modelled"]}
    return rest


def check_memory(fleet: InProcessFleet) -> None:
    """Frames are conserved and mapped once; the LRU lists hold what they should. In guest and host, for each VM."""
    for vm, guest in fleet.guests.items():
        machine = guest.machine
        gpt = machine.gpt
        pages = np.flatnonzero(gpt & (PRESENT | PROTNONE))
        frames = (gpt[pages] & FRAME_MASK) >> FRAME_SHIFT
        kernel = np.concatenate([table_frames(machine.tables), machine.ds.gpfn.reshape(-1)])
        kernel = kernel[kernel >= 0]
        flags = guest.nodes.flags
        # A page that is being copied has two frames, and shadows are in use.
        own = np.flatnonzero(flags & (F_BUSY | F_SHADOW))
        _check_nodes(guest.nodes, np.union1d(own, np.concatenate([frames, kernel])))
        assert np.unique(frames).size == frames.size
        _check_shadows(guest)
        assert (guest.nodes.page[frames] == pages).all()
        upper = machine.tables.upper
        huge = _check_units(gpt, upper[: gpt.size // TABLE_PAGES], guest.nodes)
        own = upper[huge // TABLE_PAGES]
        assert ((own ^ gpt[huge]) & (FRAME_MASK | PRESENT | PROTNONE) == 0).all(), "entry and books of a huge page"
        copied = (flags[frames] & F_BUSY) != 0
        assert (flags[frames[_is_base(pages, huge) & ~copied]] & F_LRU).all()
        _check_lists(guest.nodes, frames.size - int(copied.sum()))

        host = fleet.host.vms[vm]
        ept = machine.ept
        gpfns = np.flatnonzero(ept & WRITABLE)
        slots = (ept[gpfns] & FRAME_MASK) >> FRAME_SHIFT
        assert set(frames) | set(kernel) <= set(gpfns) | set(host.waiting)
        # A page that a host thread is moving has two frames until the move is settled.
        busy = np.flatnonzero(host.nodes.flags & F_BUSY)
        share = host.view.share if isinstance(host.view, FlatMemory) else None
        _check_nodes(host.nodes, np.union1d(slots, busy), share)
        given = slots if share is None else slots[share[slots]]
        assert (given < guest.config.total_pages).sum() <= host.nodes.managed[FAST]
        assert np.unique(slots).size == slots.size
        _check_units(ept, host.memory.ept_pde, host.nodes)
        assert (host.memory.ept_pde[gpfns // TABLE_PAGES] & PRESENT).all(), "what is backed lies in a table"
        if host.flat:
            still = (host.nodes.flags[slots] & F_BUSY) == 0
            assert (host.nodes.page[slots[still]] == gpfns[still]).all()
            _check_lists(host.nodes, gpfns.size)


def _check_shadows(guest: Guest) -> None:
    """Each shadow keeps the content of one page in fast memory, which is read-only."""
    shadows, flags, machine = guest.view.shadows, guest.nodes.flags, guest.machine
    if shadows is None:
        assert not (flags & F_SHADOW).any()
        return
    owners = np.flatnonzero(shadows.of)
    assert sorted(shadows.of[owners]) == np.flatnonzero(flags & F_SHADOW).tolist()
    assert owners.size == shadows.state[COUNT] and (owners >= shadows.state[LOWEST]).all()
    assert (shadows.of[owners] >= flags.size // 2).all()
    entries = machine.gpt[guest.nodes.page[owners]]
    assert ((entries & FRAME_MASK) >> FRAME_SHIFT == owners).all() and not (entries & (WRITABLE | DIRTY)).any()
    backed = [(machine.ept[frames] & FRAME_MASK) >> FRAME_SHIFT for frames in (owners, shadows.of[owners])]
    assert (machine.stamps[backed[0]] == machine.stamps[backed[1]]).all()


def _is_base(pages: Words, huge: Words) -> Mask:
    """Which pages are not part of the huge pages with these heads."""
    return ~np.isin(pages // TABLE_PAGES, huge // TABLE_PAGES)


def _check_units(table: Words, pde: Words | Bytes, nodes: Nodes) -> Words:
    """Each huge page lies in one block, all of it mapped alike, its A and D in one place; the heads (int64[n])."""
    heads = np.flatnonzero(pde & HUGE) * TABLE_PAGES
    for head in heads:
        leaves = table[head : head + TABLE_PAGES]
        frames = (leaves & FRAME_MASK) >> FRAME_SHIFT
        assert np.array_equal(frames, frames[0] + np.arange(TABLE_PAGES)) and frames[0] % TABLE_PAGES == 0
        assert np.unique(leaves & (PRESENT | PROTNONE | WRITABLE)).size == 1
        assert not (leaves & (ACCESSED | DIRTY)).any() and not (leaves[1:] & YOUNG).any()
        if not nodes.flags[frames[0]] & F_BUSY:
            assert nodes.flags[frames[0]] & F_HUGE
            assert not nodes.flags[frames[1:]].any(), "only the head has flags"
    known = np.flatnonzero((nodes.flags & (F_HUGE | F_BUSY)) == F_HUGE)
    mapped = (table[heads] & FRAME_MASK) >> FRAME_SHIFT
    assert set(known) <= set(mapped), "no page is huge for the nodes alone"
    return heads


def _check_nodes(nodes: Nodes, used: Words, share: Mask | None = None) -> None:
    """``used`` (int64[n]) and the free frames are the managed ones, each once.

    ``share``: which these are (bool[frames]), if not the first ones; what is about to leave it is used, and empty.
    """
    span = nodes.page.size // 2
    unused = np.flatnonzero(is_free(nodes.free, span))
    free = [unused[(unused >= span) == (node == 1)] for node in (0, 1)]
    for node in (0, 1):
        assert free[node].size == nodes.free_count[node]
        mine = used[(used >= span) == (node == 1)]
        every = np.sort(np.concatenate([free[node], mine]))
        if share is None:
            assert np.array_equal(every, node * span + np.arange(int(nodes.managed[node])))
        else:
            mine = node * span + np.flatnonzero(share[node * span : (node + 1) * span])
            assert mine.size == nodes.managed[node]
            assert np.array_equal(every[share[every]], mine)
            leaving = every[~share[every]]
            assert (nodes.flags[leaving] & F_BUSY).all() and (nodes.page[leaving] == NO_PAGE).all()
        assert (nodes.page[free[node]] == NO_PAGE).all()
        assert (nodes.flags[free[node]] == 0).all()


def _check_lists(nodes: Nodes, members: int) -> None:
    """Both directions of each list agree, as do sizes, flags and nodes; ``members`` on all lists together."""
    span = nodes.page.size // 2
    seen: list[int] = []
    for which in range(4):
        head = nodes.page.size + which
        frames = []
        frame = int(nodes.next[head])
        while frame != head:
            assert nodes.previous[nodes.next[frame]] == frame
            frames.append(frame)
            frame = int(nodes.next[frame])
        listed = np.array(frames, np.int64)
        sizes = np.where(nodes.flags[listed] & F_HUGE, TABLE_PAGES, 1)
        assert sizes.sum() == nodes.size[which]
        assert (listed // span == which // 2).all()
        assert (nodes.flags[listed] & F_LRU).all()
        assert ((nodes.flags[listed] & F_ACTIVE) != 0).all() == (which % 2 == 1) or not frames
        assert ((nodes.flags[listed] & F_ACTIVE) == 0).all() == (which % 2 == 0) or not frames
        assert (nodes.page[listed] != NO_PAGE).all()
        seen += expand(listed, sizes).tolist()
    assert len(seen) == len(set(seen)) == members
