"""What a cell will take: wall time, from its virtual length and a rate, and memory, from the upper bound of its pages.

A vCPU of the emulated fleet costs this machine so many core-seconds per virtual second, in which its accesses count
and little else. Where cells of the sweep are done, the rate is measured on them; until then it is assumed.
"""

import os
from collections.abc import Iterable
from typing import NamedTuple

from fleet.doctor import demand_of
from fleet.experiment import Experiment, scaled_transactions
from fleet.sweep.store import Cell
from proto.units import PS_PER_S

ASSUMED_RATE = 0.6
"""Core-seconds of this machine per vCPU-second: 3 M accesses, of which a core of 2020 emulates 5 M a second."""
ACCESSES_PER_VCPU_S = 3_000_000
"""Of a vCPU on slow memory of some 300 ns; for runs whose length is given in transactions."""
START_S = 3.0
"""Wall time until the processes of a cell are up, with warm kernels."""


class Rate(NamedTuple):
    """Core-seconds per vCPU-second, and where that comes from."""

    value: float
    source: str


def vcpu_seconds(experiment: Experiment) -> float:
    """Virtual seconds of all vCPUs of the run phase."""
    total = 0.0
    for tenant in experiment.tenants:
        accesses = scaled_transactions(tenant.transactions, experiment.scale)
        each = accesses / ACCESSES_PER_VCPU_S if accesses else tenant.run_ps / PS_PER_S * tenant.vcpus
        total += tenant.vms * each
    return total


def rate(cells: Iterable[Cell]) -> Rate:
    """Measured on the cells that are done, else assumed."""
    cores = work = 0.0
    known = 0
    for cell in cells:
        if cell.status == "done" and cell.summary is not None and cell.info.get("cpu_measured") == "alone":
            vms = cell.summary["vms"]
            cores += cell.summary["elapsed"]["wall_s"] * parallel(len(vms))
            work += sum(vm["virtual_s"] * vm["vcpus"] for vm in vms)
            known += 1
    if not work:
        return Rate(ASSUMED_RATE, "assumed")
    return Rate(cores / work, f"measured on {known} cells")


def parallel(vms: int) -> int:
    """Cores that a fleet keeps busy: one a VM, as far as they go."""
    return max(1, min(vms, len(os.sched_getaffinity(0))))


def seconds(experiment: Experiment, rate: Rate) -> float:
    """Wall time of a cell that runs alone."""
    vms = sum(tenant.vms for tenant in experiment.tenants)
    return START_S + vcpu_seconds(experiment) * rate.value / parallel(vms)


def memory_bytes(experiment: Experiment) -> int:
    """Upper bound of the memory of all processes of a cell."""
    return demand_of(experiment.guests()).memory_bytes
