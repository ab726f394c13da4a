"""The form of ``summary.json`` (docs/output.md): which keys there are, what type each has, which must be there.

Keys may be added by anybody, so unknown ones pass; a missing or mistyped one does not. A field with a default is one
that may be absent, which means "not applicable": a guest that died left no figures, a policy without PEBS has none to
tell. The order of the fields is the order of the keys in the file.
"""

from typing import Any, Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

SCHEMA = 1
"""Raised when a key is renamed or removed, never when one is added."""

Counts = dict[str, int]
Outcome = Literal["ok", "failed", "interrupted"]


class Error(Struct):
    """One thing that went wrong; ``vm`` is absent where no single VM is concerned."""

    kind: str
    message: str
    vm: int | UnsetType = UNSET


class Run(Struct):
    """Which run this was."""

    name: str
    spec_digest: str
    seed: int
    clock: str
    scale: float
    host_profile: str
    started: str
    argv: list[str]
    version: str
    commit: str | UnsetType = UNSET
    dirty: bool | UnsetType = UNSET


class Elapsed(Struct):
    """Longest phases of any VM in virtual seconds, and the wall clock."""

    virtual_s: float
    populate_virtual_s: float
    wall_s: float
    realtime_factor: float
    slip_s: float | UnsetType = UNSET


class Memory(Struct):
    """Sizes of a VM, what of it the host backed, and last two sizes of its process on this machine."""

    total_bytes: int
    fast_bytes: int
    slow_bytes: int
    backed_bytes: int | UnsetType = UNSET
    touched_bytes: int | UnsetType = UNSET
    pinned_bytes: int | UnsetType = UNSET
    huge_bytes: int | UnsetType = UNSET
    rss_bytes: int | UnsetType = UNSET
    private_bytes: int | UnsetType = UNSET


class Latency(Struct):
    """Percentiles over all accesses, ns."""

    p50: float
    p90: float
    p99: float


class Access(Struct):
    """Memory accesses of the run phase."""

    total: int
    fast: int
    slow: int
    fast_ratio: float
    llc_hits: int
    llc_hit_ratio: float
    tlb_miss_ratio: float
    walk_ns_mean: float
    latency_ns: Latency | UnsetType = UNSET


class Kvm(Struct):
    """KVM's counters of one VM."""

    tlb_flush: int
    remote_tlb_flush: int
    remote_tlb_flush_requests: int
    executions_per_request: float | UnsetType = UNSET
    exits: Counts | UnsetType = UNSET
    guest_mode_ratio: float | UnsetType = UNSET


class Flushes(Struct):
    """The TLB-flush table of the published comparison."""

    total: int
    remote_requests: int
    single: int


class PebsEvent(Struct):
    """One event of the PMU; of load latency only tagged loads above the threshold count."""

    period: int
    events: int
    records: int
    dropped: int


class CpuPerSample(Struct):
    """CPU of tracking over the records drained, ns."""

    measured: float
    modelled: float


class Pebs(Struct):
    """Sampling."""

    records: int
    pmi: int
    dropped: int
    drains: int
    period: int | UnsetType = UNSET
    ept_violations: int | UnsetType = UNSET
    record_bytes: int | UnsetType = UNSET
    events: dict[str, PebsEvent] | UnsetType = UNSET
    vcpus: list[dict[str, PebsEvent]] | UnsetType = UNSET
    foreign_records_visible: int | UnsetType = UNSET
    cpu_ns_per_sample: CpuPerSample | UnsetType = UNSET


class Pml(Struct):
    """Page-modification logging."""

    entries: int
    full_exits: int
    useless_ratio: float
    copied_again: int
    harvested_pages: int | UnsetType = UNSET
    modelled_s: float | UnsetType = UNSET


class Swap(Struct):
    """The host's swap."""

    scanned_pages: int
    out_pages: int
    in_pages: int
    modelled_s: float


class FlatMemory(Struct):
    """Where a VM's pages lie in flat memory mode."""

    dedicated_pages: int
    contended_pages: int


class HostThp(Struct):
    """Huge pages with which the host backs a VM."""

    fault_alloc: int
    fault_fallback: int
    split_page: int
    collapse_alloc: int
    migration_success: int
    migration_fail: int
    huge_bytes: int


class Migration(Struct):
    """Pages moved between tiers."""

    promoted_pages: int
    demoted_pages: int
    swapped_pairs: int
    failed_pages: int
    bytes: int


class Hotness(Struct):
    """The policy's hot set and fast ratio against the workload's ground truth."""

    hot_set: Literal["policy", "fast node"] | UnsetType = UNSET
    precision: float | UnsetType = UNSET
    recall: float | UnsetType = UNSET
    f1: float | UnsetType = UNSET
    oracle_fast_ratio: float | UnsetType = UNSET
    share_of_oracle: float | UnsetType = UNSET


class Locality(Struct):
    """How well ranges of one address space tell hot from cold; of `ranges` on only where there are PEBS records."""

    bins_fast_ratio: float
    ranges: int | UnsetType = UNSET
    hot_ranges: int | UnsetType = UNSET
    ranges_fast_ratio: float | UnsetType = UNSET


class MeasuredStages(Struct):
    """CPU-seconds that this machine spent, per stage."""

    track: float
    classify: float
    migrate: float
    other: float
    total: float


class ModelledStages(Struct):
    """CPU-seconds that a kernel implementation would spend on the host of the profile, per stage."""

    track: float
    classify: float
    migrate: float
    total: float


class AgentCpu(Struct):
    """The three figures of CPU, never mixed."""

    measured_s: MeasuredStages
    modelled_s: ModelledStages
    measured_cores: float
    modelled_cores: float
    stolen_s: float
    floor_s: float | UnsetType = UNSET
    by_definition: list[str] | UnsetType = UNSET


class ProcessCpu(Struct):
    """The ledger of a guest's process."""

    vcpu_s: float
    agent_s: float
    control_s: float
    runtime_s: float
    wait4_s: float | UnsetType = UNSET
    residue_ratio: float | UnsetType = UNSET
    meter_s: float | UnsetType = UNSET


class Hypercalls(Struct):
    """Messages from the guest to the host."""

    count: Counts
    rtt_us: dict[str, float] | UnsetType = UNSET


class Integrity(Struct):
    """Content stamps; a mismatch fails the run."""

    pages_checked: int
    accesses_checked: int
    mismatches: int
    pages_brought_back: int | UnsetType = UNSET


class Vm(Struct):
    """One VM."""

    id: int
    policy: str
    workload: str
    vcpus: int
    memory: Memory
    outcome: Outcome
    transactions: int | UnsetType = UNSET
    virtual_s: float | UnsetType = UNSET
    populate_virtual_s: float | UnsetType = UNSET
    throughput_mops: float | UnsetType = UNSET
    access: Access | UnsetType = UNSET
    vmstat: Counts | UnsetType = UNSET
    kvm: Kvm | UnsetType = UNSET
    instructions: Counts | UnsetType = UNSET
    flushes: Flushes | UnsetType = UNSET
    pebs: Pebs | UnsetType = UNSET
    pml: Pml | UnsetType = UNSET
    swap: Swap | UnsetType = UNSET
    host_thp: HostThp | UnsetType = UNSET
    flat_memory: FlatMemory | UnsetType = UNSET
    migration: Migration | UnsetType = UNSET
    hotness: Hotness | UnsetType = UNSET
    locality: dict[Literal["gva", "gpa", "hpa"], Locality] | UnsetType = UNSET
    agent_cpu: AgentCpu | UnsetType = UNSET
    process_cpu: ProcessCpu | UnsetType = UNSET
    hypercalls: Hypercalls | UnsetType = UNSET
    balloon: dict[str, Any] | UnsetType = UNSET
    integrity: Integrity | UnsetType = UNSET


class Tier(Struct):
    """One tier of the host."""

    name: str
    frames: int
    used: int
    peak: int
    read_bytes: int
    write_bytes: int
    utilisation: float
    loaded_latency_ns: float


class HostCpu(Struct):
    """CPU of the host daemon, in total and for each VM."""

    measured_s: float
    modelled_s: float
    by_vm: list[Any]


class Overcommit(Struct):
    """Memory that all VMs were promised, and what it took to back them."""

    promised_bytes: int
    backed_bytes: int
    touched_bytes: int
    pinned_bytes: int
    ratio: float


class Host(Struct):
    """The host."""

    cpu: HostCpu
    tiers: list[Tier]
    refused: Counts
    overcommit: Overcommit | UnsetType = UNSET
    hypercalls_per_s: float | UnsetType = UNSET


class Summary(Struct):
    """The whole of ``summary.json``."""

    schema: int
    run: Run
    outcome: Outcome
    errors: list[Error]
    digest: str
    elapsed: Elapsed
    vms: list[Vm]
    host: Host | UnsetType = UNSET


def check(summary: dict[str, Any]) -> Summary:
    """The summary as typed structs. Raises `msgspec.ValidationError` that names the key that is missing or wrong."""
    return msgspec.convert(summary, Summary)


def ordered(record: dict[str, Any], form: type[Struct]) -> dict[str, Any]:
    """``record`` with the keys of ``form`` first and in its order, then the others as they came."""
    known = {name: record[name] for name in form.__struct_fields__ if name in record}
    return known | {name: value for name, value in record.items() if name not in known}
