"""Compiles kernels into this machine's cache, so that no cell has to: ``python -m fleet.sweep.warm NAME...``.

NAMEs are policies and workloads. Several workers of one machine share its cache: the first compiles, the others wait.
"""

import fcntl
import os
import sys
from collections.abc import Sequence

from fleet import numba_cache


def main(names: Sequence[str]) -> int:
    """Warm up; 0."""
    environment = numba_cache.environment()
    os.environ.update(environment)
    with open(os.path.join(environment["NUMBA_CACHE_DIR"], ".warming"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Kernels are compiled as these are imported and run, and look then where to keep them.
        from fleet import hosts
        from fleet.warmup import warm_up
        from guestd.tiering.registry import policies
        from guestd.workloads.registry import workloads

        used = [[name for name in registry if name in names] for registry in (policies(), workloads())]
        costs = hosts.costs(hosts.load_profile(hosts.DEFAULT_PROFILE))
        warm_up(used[0], used[1], costs, lambda done, total, label: None)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
