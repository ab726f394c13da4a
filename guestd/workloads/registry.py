"""All workloads by name."""

from functools import cache

from guestd.workloads import gups, scan, trace
from guestd.workloads.base import WorkloadType


@cache
def workloads() -> dict[str, WorkloadType]:
    """Name -> workload."""
    return {kind.name: kind for kind in (gups.TYPE, scan.TYPE, trace.TYPE)}
