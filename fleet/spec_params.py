"""Parameters that every experiment has, declared like a policy's: engine, kernel of the guest, kernel of the host."""

from collections.abc import Mapping

from fleet.errors import SpecError
from guestd.params import Param
from proto.config import EngineConfig, GuestKernel, HostKernel, Scalar
from proto.units import PS_PER_MS, PS_PER_US

_LAW = "architecture: the invariance law; no figure may move by more than 2 % with it"

ENGINE_PARAMS = (
    Param(
        "quantum", 4_000, "us", "virtual time between two barriers of the fleet", _LAW, minimum=100, maximum=1_000_000
    ),
    Param(
        "slice", 1_000, "us", "virtual time that a vCPU runs before the next one", _LAW, minimum=10, maximum=1_000_000
    ),
    Param("block", 2048, "accesses", "accesses that are generated at a time", _LAW, minimum=64, maximum=1 << 16),
)

GUEST_PARAMS = (
    Param(
        "hz",
        250,
        "1/s",
        "scheduler ticks per second",
        "CONFIG_HZ, Debian and Ubuntu kernels",
        minimum=1,
        maximum=10_000,
    ),
    Param(
        "sched_slice",
        8_000,
        "us",
        "time after which a busy vCPU switches context once",
        "estimated: 7.5 to 10 ms per vCPU from the drain calls that the Demeter authors' notes count in a guest",
        minimum=100,
        maximum=1_000_000,
    ),
    Param(
        "single_page_flush_ceiling",
        33,
        "pages",
        "larger ranges are flushed whole",
        "arch/x86/mm/tlb.c, tlb_single_page_flush_ceiling; Linux commit a5102476a24b",
        minimum=0,
        maximum=1 << 20,
    ),
    Param(
        "ds_pages",
        16,
        "pages",
        "PEBS buffer per vCPU",
        "arch/x86/include/asm/intel_ds.h, PEBS_BUFFER_SIZE",
        minimum=1,
        maximum=1 << 12,
    ),
    Param(
        "ds_prefault",
        True,
        "",
        "the kernel clears the PEBS buffer when it allocates it",
        "arch/x86/events/intel/ds.c, dsalloc_pages",
    ),
    Param(
        "batched_unmap_flush",
        False,
        "",
        "migration flushes once per batch (Linux 6.3 on), not per page",
        "mm/migrate.c; the published baselines run 5.15",
    ),
    Param(
        "thp",
        "never",
        "",
        "transparent huge pages in the guest",
        "Documentation/admin-guide/mm/transhuge.rst; the published evaluation runs without",
        ("never", "always"),
    ),
    Param(
        "thp_defrag",
        "madvise",
        "",
        "a fault takes a huge page of its own node or none (madvise), or also of the other one (always)",
        "mm/mempolicy.c, alloc_pages_vma: __GFP_THISNODE unless __GFP_DIRECT_RECLAIM",
        ("madvise", "always"),
    ),
    Param(
        "thp_flush_stride",
        "4KiB",
        "",
        "step of a huge page's flush: 4KiB makes 512 pages, which exceed the ceiling; 2MiB one INVLPG",
        "arch/x86/include/asm/tlbflush.h, flush_tlb_range: PAGE_SHIFT but for hugetlbfs",
        ("4KiB", "2MiB"),
    ),
    Param(
        "khugepaged_pages_to_scan",
        4096,
        "pages",
        "pages that khugepaged looks at each time it wakes; 0 = it never runs",
        "mm/khugepaged.c",
        minimum=0,
        maximum=1 << 30,
    ),
    Param(
        "khugepaged_scan_sleep",
        10_000,
        "ms",
        "time between two passes of khugepaged",
        "mm/khugepaged.c",
        minimum=1,
        maximum=600_000,
    ),
    Param(
        "pti",
        False,
        "",
        "page-table isolation: a page's flush also executes an INVPCID for the user PCID",
        "arch/x86/mm/tlb.c, flush_tlb_one_user; off in the published guests (mitigations=off)",
    ),
    Param(
        "pv_tlb_flush",
        True,
        "",
        "a shootdown skips preempted vCPUs; they flush at their next entry",
        "arch/x86/kernel/kvm.c, kvm_flush_tlb_multi",
    ),
    Param(
        "page_table_levels",
        4,
        "levels",
        "of the guest's page table; 5 = LA57",
        "Intel SDM vol. 3, 4.5",
        minimum=4,
        maximum=5,
    ),
)

_STOCK = HostKernel()
HOST_PARAMS = (
    Param(
        "pebs",
        _STOCK.pebs,
        "",
        "what a guest's PEBS record does that meets an EPT violation: it is written after the fault, or kills the VM; "
        "or all guests' records go to one buffer that all can read",
        "arch/x86/events/intel/core.c (pebs_ept, pebs_no_isolation); shared: what vTMM assumes, refuted by the seed",
        ("ept-friendly", "legacy", "shared"),
    ),
    Param(
        "populate",
        _STOCK.populate,
        "",
        "back and pin all memory of a VM before it runs",
        "Intel SDM vol. 3, 20.9.5: the workaround for PEBS before pebs_ept; QEMU -mem-prealloc with mlock",
    ),
    Param(
        "thp",
        _STOCK.thp,
        "",
        "transparent huge pages in the host",
        "Documentation/admin-guide/mm/transhuge.rst; the published evaluation runs without",
        ("never", "always"),
    ),
    Param(
        "ept_levels",
        _STOCK.ept_levels,
        "levels",
        "of the EPT; 5 where the host has LA57",
        "arch/x86/kvm/mmu/mmu.c, max_tdp_level",
        minimum=4,
        maximum=5,
    ),
    Param(
        "tdp_mmu",
        _STOCK.tdp_mmu,
        "",
        "KVM's TDP MMU: EPT faults share mmu_lock, notifiers take it alone",
        "arch/x86/kvm/mmu/tdp_mmu.c; default since Linux 5.15",
    ),
    Param(
        "pcpus",
        _STOCK.pcpus,
        "CPUs",
        "physical CPUs; 0 = one per vCPU",
        "the published evaluation never overcommits CPUs",
        minimum=0,
        maximum=1 << 16,
    ),
    Param(
        "sched_slice",
        _STOCK.sched_slice_ps // PS_PER_US,
        "us",
        "the host scheduler's slice on a CPU with several vCPUs",
        "kernel/sched/fair.c, sysctl_sched_base_slice: 0.75 ms x (1 + log2 of up to 8 CPUs)",
        minimum=100,
        maximum=1_000_000,
    ),
    Param(
        "pml",
        _STOCK.pml,
        "",
        "page-modification logging",
        "Intel SDM vol. 3, 29.3.6; arch/x86/kvm/vmx/vmx.c",
    ),
    Param(
        "pml_harvest",
        _STOCK.pml_harvest_ps // PS_PER_MS,
        "ms",
        "time between two harvests of the dirty bitmap; 0 = none",
        "unpublished: vTMM's window",
        minimum=0,
        maximum=1_000_000,
    ),
    Param(
        "swap_pages_per_s",
        _STOCK.swap_pages_per_s,
        "pages/s",
        "pages that the host's swap daemon looks at, per VM; 0 = no swap",
        "unpublished: a load, not a mechanism",
        minimum=0,
        maximum=100_000_000,
    ),
)


def engine_config(values: Mapping[str, Scalar]) -> EngineConfig:
    """The engine's configuration from checked values. Raises SpecError if a slice exceeds the quantum."""
    quantum_us, slice_us = int(values["quantum"]), int(values["slice"])
    if slice_us > quantum_us:
        raise SpecError(f"engine.slice ({slice_us}us) is longer than engine.quantum ({quantum_us}us); set it too")
    return EngineConfig(quantum_us * PS_PER_US, slice_us * PS_PER_US, int(values["block"]))


def guest_kernel(values: Mapping[str, Scalar]) -> GuestKernel:
    """The guest kernel's configuration from checked values."""
    return GuestKernel(
        hz=int(values["hz"]),
        sched_slice_ps=int(values["sched_slice"]) * PS_PER_US,
        single_page_flush_ceiling=int(values["single_page_flush_ceiling"]),
        ds_pages=int(values["ds_pages"]),
        ds_prefault=bool(values["ds_prefault"]),
        batched_unmap_flush=bool(values["batched_unmap_flush"]),
        thp=str(values["thp"]),
        thp_defrag=str(values["thp_defrag"]),
        thp_flush_stride=str(values["thp_flush_stride"]),
        khugepaged_pages_to_scan=int(values["khugepaged_pages_to_scan"]),
        khugepaged_scan_sleep_ps=int(values["khugepaged_scan_sleep"]) * PS_PER_MS,
        pti=bool(values["pti"]),
        pv_tlb_flush=bool(values["pv_tlb_flush"]),
        page_table_levels=int(values["page_table_levels"]),
    )


def host_kernel(values: Mapping[str, Scalar]) -> HostKernel:
    """The host kernel's configuration from checked values."""
    return HostKernel(
        pebs=str(values["pebs"]),
        populate=bool(values["populate"]),
        thp=str(values["thp"]),
        ept_levels=int(values["ept_levels"]),
        tdp_mmu=bool(values["tdp_mmu"]),
        pcpus=int(values["pcpus"]),
        sched_slice_ps=int(values["sched_slice"]) * PS_PER_US,
        pml=bool(values["pml"]),
        pml_harvest_ps=int(values["pml_harvest"]) * PS_PER_MS,
        swap_pages_per_s=int(values["swap_pages_per_s"]),
    )
