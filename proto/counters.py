"""Names of everything that is counted, in one place, as Linux and KVM name them (reference: architecture 3.4).

The engine counts into one int64 vector per guest, indexed by these constants; `split` gives the groups of summary.json.
When each increments: arch/x86/mm/tlb.c, include/linux/vm_event_item.h, virt/kvm/kvm_main.c, arch/x86/kvm/x86.c.
"""

from enum import IntEnum, auto

import numpy as np
import numpy.typing as npt


class C(IntEnum):
    """Index into a guest's counter vector. The prefix before ``__`` is the group in the summary."""

    access__total = 0
    access__fast = auto()
    access__slow = auto()
    access__llc_hits = auto()
    """Accesses that the last-level cache served; each is in `fast` or `slow` too, by where its page lies."""
    access__line_swaps = auto()
    """Misses of near memory (`guestd.near_memory`), each of which swapped a line in."""
    access__loads = auto()
    access__stores = auto()
    access__tlb_misses = auto()
    access__dirty_assists = auto()
    access__walks = auto()
    access__walk_refs = auto()
    access__walk_ps = auto()
    access__stlb_hits = auto()
    access__fault_retries = auto()
    """Faults after which the access walked again."""

    vmstat__nr_tlb_local_flush_one = auto()
    vmstat__nr_tlb_local_flush_all = auto()
    vmstat__nr_tlb_remote_flush = auto()
    vmstat__nr_tlb_remote_flush_received = auto()
    vmstat__pgfault = auto()
    vmstat__numa_hint_faults = auto()
    vmstat__numa_pte_updates = auto()
    vmstat__numa_huge_pte_updates = auto()
    vmstat__numa_pages_migrated = auto()
    vmstat__pgpromote_candidate = auto()
    vmstat__pgpromote_candidate_demoted = auto()
    vmstat__pgpromote_success = auto()
    vmstat__pgdemote_kswapd = auto()
    vmstat__pgmigrate_success = auto()
    vmstat__pgmigrate_fail = auto()
    vmstat__pgmigrate_fail_dst_node_full = auto()
    vmstat__pgexchange_success = auto()
    vmstat__pgactivate = auto()
    vmstat__pgdeactivate = auto()
    vmstat__pgscan_kswapd = auto()
    vmstat__pgsteal_kswapd = auto()
    vmstat__nomad_queued = auto()
    """Pages put on the promotion queue."""
    vmstat__nomad_queue_full = auto()
    """Pages passed over, as the queue was full."""
    vmstat__nomad_transaction_success = auto()
    vmstat__nomad_transaction_abort = auto()
    """Copies that were thrown away, as the page was written meanwhile."""
    vmstat__nomad_retry = auto()
    """Pages tried again after that."""
    vmstat__nomad_shadow_link = auto()
    """Shadow pages kept at a promotion. Those that there are: `link` - `drop` - `reclaim` - `demote`."""
    vmstat__nomad_shadow_drop = auto()
    """Shadow pages given up, as their page was written or moved."""
    vmstat__nomad_shadow_reclaim = auto()
    """Shadow pages given up, as memory was short."""
    vmstat__nomad_shadow_demote = auto()
    """Demotions to a shadow page, without a copy."""
    vmstat__nomad_wp_fault = auto()
    """Writes to a page that was read-only for the sake of its shadow."""
    vmstat__thp_fault_alloc = auto()
    vmstat__thp_fault_fallback = auto()
    vmstat__thp_split_page = auto()
    vmstat__thp_collapse_alloc = auto()
    vmstat__thp_migration_success = auto()
    vmstat__thp_migration_fail = auto()
    vmstat__context_switches = auto()

    kvm__tlb_flush = auto()
    kvm__remote_tlb_flush = auto()
    kvm__remote_tlb_flush_requests = auto()
    kvm__remote_flush_executions = auto()
    """`tlb_flush` that remote requests caused: at most one a request and vCPU."""
    kvm__pv_flushes = auto()
    """`tlb_flush` on behalf of the guest, which found the vCPU preempted (KVM_VCPU_FLUSH_TLB)."""
    kvm__mmu_zapped = auto()
    kvm__mmu_retries = auto()
    """EPT violations taken again because a notifier was changing their page."""
    kvm__mmu_lock_wait_ps = auto()

    exit__ept_violation = auto()
    exit__kick = auto()
    exit__pmi = auto()
    exit__host_task = auto()
    exit__paused = auto()
    exit__preempted = auto()
    exit__pml_full = auto()

    instr__invlpg = auto()
    """This group: as executed, and those that Linux and KVM execute for what is emulated. INVPCID types 1 to 3 are for
    kernel mappings, INVVPID of an address for shadow paging, INVEPT of one context for a root table that is new."""
    instr__invpcid_0 = auto()
    instr__mov_cr3 = auto()
    instr__invvpid_ctx = auto()
    instr__invept_global = auto()

    pebs__records = auto()
    pebs__pmi = auto()
    pebs__dropped = auto()
    pebs__drains = auto()
    pebs__drained_records = auto()
    pebs__ept_violations = auto()

    pml__entries = auto()
    pml__useless = auto()
    pml__copied_again = auto()
    """Pages under migration that were written after their copy, and copied again while the VM was paused."""

    time__think_ps = auto()
    """Compute between accesses. All of this group: vCPU time, kept in the vCPUs' ledgers."""
    time__stall_ps = auto()
    """Waiting for translations and memory."""
    time__minor_fault_ps = auto()
    time__hint_fault_ps = auto()
    """NUMA hint faults, with the migrations in them; writers that wait for pages under write protection."""
    time__wp_fault_ps = auto()
    """Writes to pages that are read-only for the sake of their shadows."""
    time__ept_violation_ps = auto()
    """Exits for gPA frames that the EPT never mapped."""
    time__ept_refault_ps = auto()
    """Exits for gPA frames that management unmapped, or was the first to touch: its copies, and PEBS records."""
    time__kick_ps = auto()
    """Exits forced by flush requests, with the flush at the entry."""
    time__pmi_exit_ps = auto()
    time__pml_full_ps = auto()
    time__host_task_ps = auto()
    """The vCPU's thread works for the host before it enters the guest again."""
    time__paused_ps = auto()
    """Stopped with the whole VM, while the host rewrites its EPT, or has no frame for one of its faults."""
    time__preempted_ps = auto()
    """Others run on the vCPU's pCPU."""
    time__interrupt_ps = auto()
    """Shootdown IPIs received, PMI handlers."""
    time__agent_ps = auto()
    """Kernel threads and task work of tiering on the vCPU."""
    time__context_switch_ps = auto()
    time__pebs_record_ps = auto()
    time__throttle_ps = auto()
    """Out of the bandwidth that the host granted."""
    time__halted_ps = auto()

    integrity__accesses_checked = auto()
    integrity__mismatches = auto()

    bytes__migrated = auto()

    truth__believed = auto()
    """Pages of the policy's hot set. All of this group: the emulator's knowledge, summed over sampling intervals of the
    run phase (`guestd.hotness`)."""
    truth__right = auto()
    """Those of them that are in the true hot set, or as hot as its last ones."""
    truth__asked = auto()
    """Pages that any true hot set has."""
    truth__found = auto()
    """Those of them that the policy's has."""
    truth__accesses = auto()
    truth__fast = auto()
    truth__oracle_fast = auto()
    """Accesses that the best placement of each interval would have served from fast memory."""


COUNTERS = len(C)
LEDGER = C.time__halted_ps - C.time__think_ps + 1
"""Parts of a vCPU's time."""
EXIT_PARTS = ("ept_violation", "ept_refault", "kick", "pmi_exit", "pml_full", "host_task", "paused", "preempted",
              "halted")  # fmt: skip
"""Parts of a vCPU's time in which it is outside guest mode."""
STOLEN_PARTS = ("hint_fault", "wp_fault", "ept_refault", "kick", "pmi_exit", "pml_full", "host_task", "paused",
                "interrupt", "agent", "pebs_record")  # fmt: skip
"""Parts of a vCPU's time that management took from it."""
Counters = npt.NDArray[np.int64]
"""int64[COUNTERS]"""


def new_counters() -> Counters:
    """A zeroed vector."""
    return np.zeros(COUNTERS, np.int64)


def split(counters: Counters) -> dict[str, dict[str, int]]:
    """The vector as ``{group: {name: value}}``."""
    groups: dict[str, dict[str, int]] = {}
    for index in C:
        group, name = index.name.split("__")
        groups.setdefault(group, {})[name] = int(counters[index])
    return groups


def sum_parts(time_ps: dict[str, int], parts: tuple[str, ...]) -> int:
    """Sum of some parts of the ``time`` group, ps."""
    return sum(time_ps[f"{part}_ps"] for part in parts)


def flush_totals(vmstat: dict[str, int], kvm: dict[str, int]) -> dict[str, int]:
    """The seed's table: received shootdowns are not in the total; its "invept" column is remote requests."""
    total = (
        kvm["tlb_flush"]
        + kvm["remote_tlb_flush"]
        + vmstat["nr_tlb_local_flush_one"]
        + vmstat["nr_tlb_remote_flush"]
        + vmstat["nr_tlb_local_flush_all"]
    )
    return {"total": total, "remote_requests": kvm["remote_tlb_flush"], "single": total - kvm["remote_tlb_flush"]}
