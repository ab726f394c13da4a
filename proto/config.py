"""What one guest is to be: resolved, complete and valid. Written by fleet, carried by `welcome`, trusted inside."""

from collections.abc import Iterable

from msgspec import Struct

from proto.costs import Costs
from proto.units import PAGE_SIZE, PS_PER_S, PS_PER_US, TABLE_PAGES

Scalar = bool | int | float | str


class EngineConfig(Struct, frozen=True):
    """How the emulator advances. None of it may move a result by more than 2 % (the invariance law)."""

    quantum_ps: int
    """Virtual time between two barriers of the fleet."""
    slice_ps: int
    """Virtual time that one vCPU runs before the next takes its turn."""
    block: int
    """Accesses generated at a time."""


class GuestKernel(Struct, frozen=True):
    """The guest's kernel, as far as tiering meets it."""

    hz: int
    """Scheduler ticks per second (CONFIG_HZ)."""
    sched_slice_ps: int
    """Time after which a busy vCPU switches context once (to kernel threads and back)."""
    single_page_flush_ceiling: int
    """tlb_single_page_flush_ceiling: larger ranges are flushed whole (arch/x86/mm/tlb.c)."""
    ds_pages: int
    """PEBS buffer per vCPU in pages (Linux: 16)."""
    ds_prefault: bool
    """Stock Linux clears the PEBS buffer when it allocates it, so no record meets an EPT violation."""
    batched_unmap_flush: bool
    """Migration flushes once per batch (Linux 6.3 on) instead of once per page (5.15, the published baselines)."""
    thp: str = "never"
    """Transparent huge pages: ``never`` or ``always``."""
    thp_defrag: str = "madvise"
    """``madvise``: a fault takes a huge page of its own node or none; ``always``: of the other node as well."""
    thp_flush_stride: str = "4KiB"
    """Step of a huge page's flush: ``4KiB``, as on x86, which goes beyond the ceiling, or ``2MiB``, one INVLPG."""
    khugepaged_pages_to_scan: int = 4096
    """Pages that khugepaged looks at each time it wakes; 0 = there is none."""
    khugepaged_scan_sleep_ps: int = 10 * PS_PER_S
    """Time between two of its passes."""
    pti: bool = False
    """Page-table isolation: flushing a page also executes an INVPCID for the user PCID."""
    pv_tlb_flush: bool = True
    """A shootdown skips preempted vCPUs, which flush at their next entry (KVM_FEATURE_PV_TLB_FLUSH)."""
    page_table_levels: int = 4
    """4, or 5 (LA57)."""


class HostKernel(Struct, frozen=True):
    """The host's kernel and KVM, as far as a VM meets them; no costs. Defaults: a stock host."""

    pebs: str = "ept-friendly"
    """What a PEBS record write that meets an EPT violation does: ``ept-friendly`` (Ice Lake on: taken after the
    fault), ``legacy`` (before: kills the VM); or ``shared``: all guests' records in one buffer, the assumption that the
    design refutes."""
    populate: bool = False
    """Back and pin all memory of each VM before it runs."""
    thp: str = "never"
    """Transparent huge pages: ``never`` or ``always``."""
    ept_levels: int = 4
    tdp_mmu: bool = True
    """KVM's TDP MMU (on by default since 5.15): EPT faults share mmu_lock, notifiers take it alone."""
    pcpus: int = 0
    """Physical CPUs; 0 = one per vCPU."""
    sched_slice_ps: int = 3_000 * PS_PER_US
    """The host scheduler's slice on a pCPU with several vCPUs."""
    pml: bool = False
    """Page-modification logging is on."""
    pml_harvest_ps: int = PS_PER_S
    """Time between two harvests of the dirty bitmap; 0 = none."""
    swap_pages_per_s: int = 0
    """Pages that the host's swap daemon looks at per second and VM; 0 = no swap."""

    @property
    def backs_huge(self) -> bool:
        """Whether the host backs guests with huge pages: KVM maps 4 KiB while it logs dirty pages."""
        return self.thp == "always" and not self.pml


class GuestConfig(Struct, frozen=True):
    """One guest."""

    vm: int
    name: str
    seed: int
    vcpus: int
    first_vcpu: int
    """Number of this VM's first vCPU when those of the whole fleet are counted through."""
    fleet_vcpus: int
    """vCPUs of the whole fleet."""
    total_pages: int
    fast_pages: int
    slow_pages: int
    policy: str
    policy_params: dict[str, Scalar]
    workload: str
    workload_params: dict[str, Scalar]
    run_ps: int
    """Virtual time of the run phase; 0 = until `transactions`."""
    transactions: int
    """Accesses (all vCPUs together) of the run phase; 0 = until `run_ps`."""
    start_ps: int
    """Virtual time at which this tenant starts."""
    sample_ps: int
    """Interval of the time series."""
    engine: EngineConfig
    kernel: GuestKernel
    host: HostKernel
    costs: Costs
    log_path: str
    """File to which the guest appends its log lines; empty = none."""
    events_path: str
    """File to which the guest appends `proto.events.EVENT` records; empty = none."""
    heat_path: str = ""
    """File to which the guest appends `proto.layout.HEAT` records; empty = page heat is not recorded."""
    stages: dict[str, str] = {}
    """Stages of the policy that were exchanged: tracker, classifier or migrator -> name."""
    flat_memory: bool = False
    """The memory controller swaps lines between the tiers; what runs the VM sets it if the policy needs it."""

    @property
    def policy_label(self) -> str:
        """The policy's name, and those of the stages that it has instead of its own."""
        return "+".join([self.policy, *self.stages.values()])


def pebs_buffer_bytes(guests: Iterable[GuestConfig]) -> int:
    """Size of the host's PEBS buffer (``host.pebs=shared``): an area of the largest size for each vCPU of the fleet."""
    configs = list(guests)
    return sum(config.vcpus for config in configs) * max(config.kernel.ds_pages for config in configs) * PAGE_SIZE


def launch_ps(config: GuestConfig) -> int:
    """Virtual time at which a VM's vCPUs first run: its start, and what populating its memory takes."""
    pages = config.fast_pages + config.slow_pages if config.host.populate else 0
    huge = pages // TABLE_PAGES if config.host.backs_huge else 0
    cost_ps = huge * config.costs.clear_page_huge_ps + (pages - huge * TABLE_PAGES) * config.costs.populate_page_ps
    return config.start_ps + cost_ps


class HostConfig(Struct, frozen=True):
    """The host of a run."""

    costs: Costs
    engine: EngineConfig
    sample_ps: int
    """Interval of the time series in virtual time."""
    kernel: HostKernel = HostKernel()
    hang_timeout_s: float = 60.0
    """Wall time for which a guest may leave the barrier waiting without a word; then it is taken for hung."""
    endpoint: str = "ipc"
    """Transport of the hypercalls: ``ipc``, or ``tcp`` (loopback, CURVE)."""
    log_path: str = ""
    """File to which the host appends its log lines; empty = none."""
