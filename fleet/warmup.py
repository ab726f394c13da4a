"""Compile (or load from the cache) every kernel that a run will use, before any process is forked.

It runs small fleets in this process, one per policy with parameters that make each of its mechanisms act within
milliseconds of virtual time (`Policy.warm_up`), and one per workload.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import msgspec
import numpy as np

from fleet.in_process import InProcessFleet
from guestd.hotness import count_pages, mark_mapped
from guestd.meter import meter_cost_ns
from guestd.mm.nodes import FAST, SLOW
from guestd.tiering.registry import policies as all_policies
from proto.config import EngineConfig, GuestConfig, GuestKernel, HostConfig, HostKernel, Scalar
from proto.costs import Costs
from proto.trace import STORE, Trace, TraceMeta, write_trace
from proto.units import PAGE_SIZE, PS_PER_MS

Progress = Callable[[int, int, str], None]
"""``progress(done, total, label)``"""

_PAGES = 4096
_FAST_PAGES = 1024
_LLC_BYTES = 1 << 16


def warm_up(
    policies: list[str], workloads: list[str], costs: Costs, progress: Progress, kernel: HostKernel | None = None,
    *, huge: bool = False, heat: bool = False, scratch: Path | None = None,
) -> None:  # fmt: skip
    """Run one small fleet per policy and workload.

    ``costs``: any valid ones; ``kernel``: the host's (None: stock); ``huge``: guests or host use huge pages;
    ``heat``: page heat is recorded; ``scratch``: a new directory for files that a trace or heat take, gone at the end
    (None: one of its own).
    """
    brisk = _brisk(kernel or HostKernel())
    jobs: list[tuple[str, str, str, dict[str, Scalar]]] = [("engine", "none", "gups", {})]
    jobs += [(policy, policy, "gups", {}) for policy in policies if policy != "none"]
    jobs += [(workload, "none", workload, {}) for workload in workloads if workload not in ("gups", "trace")]
    jobs += [("gups zipf", "none", "gups", {"distribution": "zipf"})] if "gups" in workloads else []
    huge_views = [policy for policy in ("none", "h-tpp") if huge]
    total = len(jobs) + ("trace" in workloads) + heat + len(huge_views)
    with _folder(scratch) if "trace" in workloads or heat else nullcontext(Path()) as folder:
        if "trace" in workloads:
            jobs.append(("trace", "none", "trace", {"file": str(tiny_trace(folder / "warm.trace"))}))
        for done, (label, policy, workload, params) in enumerate(jobs):
            progress(done, total, label)
            fleet = _fleet(policy, workload, params, costs, brisk, vms=1 if all_policies()[policy].moves_alone else 2)
            fleet.run()
            fleet.guests[0].workload.heat()
        if heat:
            progress(len(jobs), total, "page heat")
            _fleet("hyperplace", "gups", {}, costs, brisk, heat_path=str(folder / "heat.bin")).run()
    for done, policy in enumerate(huge_views, len(jobs) + heat):
        progress(done, total, f"huge pages of {policy}")
        _use_huge_pages(policy, costs, brisk)
    meter_cost_ns(1)
    _judge()
    progress(total, total, "")


@contextmanager
def _folder(path: Path | None) -> Iterator[Path]:
    if path is None:
        path = Path(tempfile.mkdtemp(prefix="fleet-warm-"))
    else:
        path.mkdir(mode=0o700)
    try:
        yield path
    finally:
        shutil.rmtree(path)


def _judge() -> None:
    """What ground truth needs for workloads and stages with other parameters than those above."""
    nothing = np.zeros(0, np.int64)
    count_pages(nothing, 0, 0, nothing)
    mark_mapped(nothing, nothing, nothing, np.zeros(0, np.uint8))


def _brisk(kernel: HostKernel) -> HostKernel:
    """The same kernel with threads that act within milliseconds, and on hardware that kills no guest."""
    return msgspec.structs.replace(
        kernel,
        pebs="ept-friendly" if kernel.pebs == "legacy" else kernel.pebs,
        pml_harvest_ps=min(kernel.pml_harvest_ps, 2 * PS_PER_MS),
        swap_pages_per_s=400_000 if kernel.swap_pages_per_s else 0,
    )


def _use_huge_pages(policy: str, costs: Costs, kernel: HostKernel) -> None:
    """Do with huge pages, in the host's view or else in the guest's, all that any policy may do with them."""
    kernel = msgspec.structs.replace(kernel, thp="always", pml=False)
    fleet = _fleet(policy, "gups", {"footprint": 0.7}, costs, kernel, "always", _PAGES // 2)
    guest = fleet.guests[0]
    while guest.phase == "populate":
        fleet.step()
    vm = fleet.host.vms[0]
    view = vm.view if all_policies()[policy].view == "host" else guest.view
    # What the host does now, its thread does in the quantum to come.
    vm.meter.now = vm.until_ps
    slow, fast = (view.on_node(0, view.pages, node, view.pages) for node in (SLOW, FAST))
    slow, fast = slow[view.sizes(slow) > 1], fast[view.sizes(fast) > 1]
    view.exchange(slow[:1], fast[:1], batched=True)
    view.collapse(slow[1:2][view.split(slow[1:2])])
    view.move(slow[:1], SLOW, 0)
    view.scan_young(0, view.pages, flush=True)
    view.scan_dirty(0, view.pages)
    fleet.run()


def _fleet(
    policy: str,
    workload: str,
    params: dict[str, Scalar],
    costs: Costs,
    kernel: HostKernel,
    thp: str = "never",
    fast_pages: int = _FAST_PAGES,
    heat_path: str = "",
    vms: int = 1,
) -> InProcessFleet:
    engine = EngineConfig(quantum_ps=10 * PS_PER_MS, slice_ps=PS_PER_MS, block=1024)
    fast_pages = max(fast_pages, 5 * _PAGES // 8) if all_policies()[policy].flat_memory else fast_pages
    guest = GuestConfig(
        vm=0,
        name="warm-up",
        seed=1,
        vcpus=2,
        first_vcpu=0,
        fleet_vcpus=2,
        total_pages=_PAGES,
        fast_pages=fast_pages,
        slow_pages=_PAGES - fast_pages,
        policy=policy,
        policy_params=dict(all_policies()[policy].warm_up),
        workload=workload,
        workload_params=params,
        run_ps=60 * PS_PER_MS,
        transactions=0,
        start_ps=0,
        sample_ps=PS_PER_MS,
        engine=engine,
        kernel=GuestKernel(
            hz=1000,
            sched_slice_ps=PS_PER_MS,
            single_page_flush_ceiling=33,
            ds_pages=1,
            ds_prefault=True,
            batched_unmap_flush=False,
            thp=thp,
            thp_defrag="always",
            khugepaged_scan_sleep_ps=5 * PS_PER_MS,
        ),
        host=kernel,
        costs=costs,
        log_path="",
        events_path="",
        heat_path=heat_path,
    )
    guests = [msgspec.structs.replace(guest, vm=vm, first_vcpu=2 * vm, fleet_vcpus=2 * vms) for vm in range(vms)]
    # A real LLC would swallow so small a guest, and no mechanism would see an access; this one has a little of it.
    costs = msgspec.structs.replace(costs, llc_bytes=_LLC_BYTES)
    return InProcessFleet(HostConfig(costs=costs, engine=engine, sample_ps=PS_PER_MS, kernel=kernel), guests)


def tiny_trace(path: Path) -> Path:
    pages = np.arange(64, dtype=np.uint64)
    write_trace(
        path,
        Trace(
            address=(pages + 256) * PAGE_SIZE,
            kind=np.full(64, STORE, np.uint8),
            size=np.full(64, 8, np.uint16),
            compute=np.zeros(64, np.uint32),
            meta=TraceMeta(source="warm-up"),
        ),
    )
    return path
