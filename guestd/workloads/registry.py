"""All workloads by name."""

from functools import cache

from guestd.workloads import bfs, btree, gups, idle, pagerank, scan, silo, trace
from guestd.workloads.base import WorkloadType

_ALL = (gups.TYPE, scan.TYPE, idle.TYPE, btree.TYPE, silo.TYPE, pagerank.TYPE, bfs.TYPE, trace.TYPE)


@cache
def workloads() -> dict[str, WorkloadType]:
    """Name -> workload."""
    return {kind.name: kind for kind in _ALL}
