"""What the hardware and the kernels of one host cost, as integers ready for the engine.

The figures with unit, plausible range, source and grade live in the host profiles (fleet/profiles/*.toml); this is the
resolved form that travels to host and guests. Times are integer picoseconds; every field here has one entry of the
same name (without ``_ps``) in a profile. No cost is a literal anywhere else.
"""

from msgspec import Struct

WALK_WAYS = 4
"""Associativity of every paging-structure cache and of the nested TLB; unpublished, the emulator's."""
MOST_WAYS = 32
"""Of a TLB: its ways are bits of one mask."""


class TierCosts(Struct, frozen=True):
    """One memory tier of a host."""

    name: str
    latency_random_ps: int
    """Idle load latency of a random 64-byte access."""
    latency_local_ps: int
    """Idle load latency within the 256-byte block of the access before it (PMEM's granule)."""
    read_bandwidth: int
    """Attainable sequential read bandwidth, bytes per second."""
    write_bandwidth: int
    """Attainable sequential write bandwidth, bytes per second."""
    granule_bytes: int
    """Media granule: what a random 64-byte access moves."""
    curve: tuple[tuple[int, int], ...]
    """Loaded latency: (utilisation, factor on the idle latency), both in thousandths, utilisation rising from 0."""
    write_curve: tuple[tuple[int, int], ...]
    """Write ceiling: (writing threads, factor on `write_bandwidth` in thousandths); factors fall from 1000."""


class Costs(Struct, frozen=True):
    """Everything that an event costs on one host. Sources: the host profile."""

    fast: TierCosts
    slow: TierCosts

    l1_dtlb_4k_entries: int
    """L1 data TLB of a vCPU for 4 KiB pages. Sets (entries / ways) of every TLB are a power of two."""
    l1_dtlb_4k_ways: int
    l1_dtlb_2m_entries: int
    """L1 data TLB of a vCPU for 2 MiB pages."""
    l1_dtlb_2m_ways: int
    stlb_entries: int
    """Second-level TLB, of both page sizes."""
    stlb_ways: int
    stlb_2m_ways: int
    """How many ways of a set of it 2 MiB entries may take."""
    pde_cache_entries: int
    """Guest paging-structure cache (combined mappings), entries that map 2 MiB each."""
    pdpte_cache_entries: int
    """The same, entries that map 1 GiB each."""
    pml4e_cache_entries: int
    """The same, entries that map 512 GiB each."""
    nested_tlb_entries: int
    """gPA-to-hPA translations of guest page-table pages."""
    ept_pde_cache_entries: int
    """EPT paging-structure cache, entries that map 2 MiB of gPA each."""
    ept_pdpte_cache_entries: int
    """The same, entries that map 1 GiB of gPA each."""
    ept_pml4e_cache_entries: int
    """The same, entries that map 512 GiB of gPA each."""
    l2_bytes: int
    """Second-level cache of a core."""
    llc_bytes: int
    """Last-level cache of the whole socket, which all its VMs share."""

    stlb_hit_ps: int
    walk_cached_ref_ps: int
    """A walk reference served by L1/L2 (upper levels)."""
    llc_latency_ps: int
    """LLC load-to-use: of data, and of a walk reference that the LLC serves."""

    invlpg_ps: int
    cr3_flush_ps: int
    """Full flush of non-global entries (MOV CR3)."""
    invpcid_addr_ps: int
    """INVPCID type 0: one address of one PCID."""
    invvpid_context_ps: int
    """INVVPID type 1: one VPID."""
    invept_ps: int
    """INVEPT, global."""
    shootdown_base_ps: int
    """What a remote flush in a guest costs its initiator, without the targets."""
    shootdown_target_ps: int
    """What each target vCPU adds to the initiator's wait."""
    ipi_receive_ps: int
    """What a target vCPU loses per IPI received, without the flush itself."""
    vmexit_ps: int
    """VM-exit round trip with an in-kernel handler."""
    kick_base_ps: int
    """What kicking vCPUs out of guest mode costs the host thread that asks, without the targets."""
    kick_target_ps: int
    """What each kicked vCPU adds."""
    vm_pause_ps: int
    """Stop all vCPUs of a VM from user space and let them run again, without what is done meanwhile."""
    pv_flush_entry_ps: int
    """What a preempted vCPU's flush on enter (KVM's paravirtual TLB flush) adds to its next entry."""

    minor_fault_ps: int
    """Guest demand-zero fault, EPT warm, clearing included."""
    hint_fault_ps: int
    """NUMA hint fault, without migration."""
    wp_fault_ps: int
    """Write-protect fault that only makes the page writable again."""
    ept_violation_ps: int
    """EPT violation, host page already there (round trip included)."""
    ept_violation_alloc_ps: int
    """EPT violation that allocates and clears a host page (round trip included)."""
    mmu_lock_hold_ps: int
    """Part of an EPT violation that holds KVM's mmu_lock."""
    zap_pte_ps: int
    """Per leaf EPT entry that an MMU notifier zaps."""
    host_hint_fault_ps: int
    """What a host NUMA hint fault adds to the EPT violation that meets it."""
    populate_page_ps: int
    """Allocate and clear one 4 KiB host page without an exit (a VM populated at launch)."""
    pml_entry_ps: int
    """Per page-modification-log entry collected at an exit."""
    swap_out_ps: int
    """Swap one 4 KiB page out."""
    swap_in_ps: int
    """Swap one 4 KiB page in, in the fault that wants it."""

    clear_page_huge_ps: int
    """Clear one 2 MiB page."""
    split_huge_ps: int
    """Split one 2 MiB page into 4 KiB pages."""
    collapse_huge_ps: int
    """Collapse 512 4 KiB pages into one of 2 MiB, without the copies."""

    migrate_page_ps: int
    """Per page of a migration: locks, rmap, PTE, LRU; no copy, no flush."""
    migrate_sync_ps: int
    """What a lone migration in the fault path adds."""
    copy_fast_fast_ps: int
    copy_slow_fast_ps: int
    """Copy of one 4 KiB page from the slow to the fast tier by one thread."""
    copy_fast_slow_ps: int
    copy_slow_slow_ps: int

    scan_pte_ps: int
    """Test and clear the accessed bit of one PTE."""
    protect_pte_ps: int
    """Change the protection of one PTE in a range."""
    lru_page_ps: int
    """Move one page between or within LRU lists."""
    rmap_walk_ps: int
    """Find the PTE of a page from its frame."""

    context_switch_ps: int
    pebs_record_ps: int
    """What a PEBS record costs the vCPU that it samples (microcode assist)."""
    pmi_ps: int
    """Performance-monitoring interrupt on bare metal."""
    pmi_guest_ps: int
    """What virtualisation adds to a PMI (exit and injection)."""
    drain_record_ps: int
    """Software work per record drained."""
    classify_record_ps: int
    """Software work per sample entered into a hotness structure."""
    classify_range_ps: int
    """Software work per range (or bucket) visited by a classifier pass."""
    load_latency_tag_interval: int
    """One load in this many, on average, is tagged by the load-latency facility."""


def copy_ps(costs: Costs, source_slow: bool, destination_slow: bool) -> int:
    """Copy of one 4 KiB page between two tiers, picoseconds."""
    if source_slow:
        return costs.copy_slow_slow_ps if destination_slow else costs.copy_slow_fast_ps
    return costs.copy_fast_slow_ps if destination_slow else costs.copy_fast_fast_ps
