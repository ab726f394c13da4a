"""Parameters that every experiment has: the emulator's engine and the guest's kernel, declared like a policy's."""

from collections.abc import Mapping

from fleet.errors import SpecError
from guestd.params import Param
from proto.config import EngineConfig, GuestKernel, Scalar
from proto.units import PS_PER_US

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
    )
