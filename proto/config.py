"""What one guest is to be: resolved, complete and valid. Written by fleet, carried by `welcome`, trusted inside."""

from msgspec import Struct

from proto.costs import Costs

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


class GuestConfig(Struct, frozen=True):
    """One guest."""

    vm: int
    name: str
    seed: int
    vcpus: int
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
    costs: Costs
    log_path: str
    """File to which the guest appends its log lines; empty = none."""
    events_path: str
    """File to which the guest appends `proto.events.EVENT` records; empty = none."""


class HostConfig(Struct, frozen=True):
    """The host of a run."""

    costs: Costs
    engine: EngineConfig
    sample_ps: int
    """Interval of the time series in virtual time."""
    hang_timeout_s: float = 60.0
    """Wall time for which a guest may leave the barrier waiting without a word; then it is taken for hung."""
    endpoint: str = "ipc"
    """Transport of the hypercalls: ``ipc``, or ``tcp`` (loopback, CURVE)."""
    log_path: str = ""
    """File to which the host appends its log lines; empty = none."""
