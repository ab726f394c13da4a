"""Memory contention of a host: loaded latency per tier, and a byte budget per VM and quantum.

Utilisation is a damped fixed point: each barrier it moves towards the last quantum's demand over the tier's ceiling,
with a time constant that does not depend on the quantum. The loaded latency follows the profile's measured curve. On
top, each VM gets a budget of bytes, so that no tier serves more in a quantum than its ceiling (architecture 3.2); what
the last quantum's demands leave is shared out equally. A tier has a ceiling for reads and one for writes; the latter
falls with the number of threads that write, taken to be all vCPUs of the VMs that wrote to it in the last quantum
(PMEM's buffers thrash: Izraelevitz et al., arXiv 1903.05714). All integers, so that it is the same on any machine.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from proto.arrays import Words
from proto.costs import Costs, TierCosts
from proto.units import PS_PER_MS, PS_PER_S

DAMPING_PS = 20 * PS_PER_MS
"""Time constant of the utilisation: queues of a memory controller settle at once, the damping is the emulator's."""
_MICRO = 1_000_000
MOST = 1 << 40
"""Bytes: more is not believed of a VM and a quantum. Sums over all VMs fit int64."""
ROOM_SHARE = 16
"""Of each ceiling a sixteenth at most is kept for VMs that ask for nothing, so that one that wakes up has room."""
FAST_READ, SLOW_READ, FAST_WRITE, SLOW_WRITE = 0, 1, 2, 3
"""Order of bandwidth vectors: direction, then tier, as the engine keeps its budget."""


def loaded_factor(tier: TierCosts, utilisation_ppm: int) -> int:
    """Factor on the idle latency in thousandths, by linear interpolation of the tier's curve, clamped at its ends."""
    return _interpolate(tier.curve, utilisation_ppm // 1000)


def write_factor(tier: TierCosts, threads: int) -> int:
    """Factor on the write bandwidth in thousandths when so many threads write, in the same way."""
    return _interpolate(tier.write_curve, threads)


def _interpolate(points: tuple[tuple[int, int], ...], x: int) -> int:
    for (low, low_y), (high, high_y) in pairwise(points):
        if x < high:
            return low_y + (high_y - low_y) * max(0, x - low) // (high - low)
    return points[-1][1]


class Contention:
    """State of one host's tiers. ``vcpus``: of each VM, by its number.

    ``utilisation_ppm``: int per tier, in millionths of its ceiling; ``writers``: int per tier, threads writing to it.
    """

    def __init__(self, costs: Costs, vcpus: Sequence[int]) -> None:
        vms = len(vcpus)
        self._tiers = (costs.fast, costs.slow)
        self._vcpus = np.array(vcpus, np.int64)
        self.utilisation_ppm = [0, 0]
        self.writers = [0, 0]
        self._queue = np.zeros((vms, 4), np.int64)
        """int64[vms, 4]: bytes asked for beyond a budget (by a migration in mid-quantum), served later."""
        self._given = np.zeros((vms, 4), np.int64)
        self._demand = np.zeros((vms, 4), np.int64)
        self.served = np.zeros(4, np.int64)
        """int64[4]: bytes moved so far."""

    def ceiling(self, quantum_ps: int) -> Words:
        """Bytes that each tier and direction can move in a quantum (int64[4]) since the last budgets."""
        reads = [tier.read_bandwidth for tier in self._tiers]
        writes = [
            tier.write_bandwidth * write_factor(tier, threads) // 1000
            for tier, threads in zip(self._tiers, self.writers, strict=True)
        ]
        return np.array([rate * quantum_ps // PS_PER_S for rate in (*reads, *writes)], np.int64)

    def settle(self, vm: int, demand: Words, moved: Words | int = 0) -> None:
        """What a VM says that it asked for in the quantum that ends, and what the host moved for it (int64[4] bytes).

        Beyond its budget it waits.
        """
        self._demand[vm] = np.minimum(self._queue[vm] + np.clip(demand, 0, MOST) + moved, MOST)
        served = np.minimum(self._demand[vm], self._given[vm])
        self._queue[vm] = self._demand[vm] - served
        self.served += served

    def keep(self, vms: list[int]) -> None:
        """Forget the demand of all others: they have left, and had their part in the quantum that ended."""
        kept = self._demand[vms]
        self._demand[:] = 0
        self._demand[vms] = kept
        waiting = self._queue[vms]
        self._queue[:] = 0
        self._queue[vms] = waiting

    def close_quantum(self, quantum_ps: int) -> None:
        """Move the utilisation towards the quantum's demand; reads and writes of a tier add up."""
        ceiling = self.ceiling(quantum_ps)
        total = self._demand.sum(axis=0)
        for tier in (0, 1):
            load = sum(int(total[i]) * _MICRO // max(1, int(ceiling[i])) for i in (tier, tier + 2))
            step = min(quantum_ps, DAMPING_PS)
            self.utilisation_ppm[tier] += (min(load, 2 * _MICRO) - self.utilisation_ppm[tier]) * step // DAMPING_PS

    def latencies(self) -> tuple[int, int, int, int]:
        """Loaded latency in ps: fast random, fast local, slow random, slow local."""
        values = []
        for tier, load in zip(self._tiers, self.utilisation_ppm, strict=True):
            factor = loaded_factor(tier, load)
            values += [tier.latency_random_ps * factor // 1000, tier.latency_local_ps * factor // 1000]
        return values[0], values[1], values[2], values[3]

    def budgets(self, vms: list[int], quantum_ps: int) -> dict[int, tuple[int, int, int, int]]:
        """Bytes that each running VM may still ask for: max-min fair shares of each ceiling.

        Who used up its last budget is taken to want all of it. Who did not may have been stopped by another one, of
        which an access needs two or three at once; so what it is taken to want falls by half a quantum at most, and
        never to nothing. What nobody wants is shared out equally. What waits from quanta before comes off first.
        """
        wrote = self._demand[vms, FAST_WRITE:] > 0
        self.writers = [int(threads) for threads in self._vcpus[vms] @ wrote]
        ceiling = self.ceiling(quantum_ps)
        demand, given = self._demand[vms], self._given[vms]
        want = np.where(demand >= given, ceiling, np.maximum(demand, given // 2))
        want = np.clip(want, ceiling // (ROOM_SHARE * len(vms)), ceiling)
        for i in range(4):
            self._given[vms, i] = _max_min_fair(want[:, i], int(ceiling[i]))
        free = self._given[vms] - self._queue[vms]
        return {vm: (int(row[0]), int(row[1]), int(row[2]), int(row[3])) for vm, row in zip(vms, free, strict=True)}


def _max_min_fair(want: Words, room: int) -> Words:
    """Shares (int64[n]) of ``room``: everyone gets what it wants up to one level, and an equal part of what is left."""
    order = np.sort(want)
    left = room - (np.cumsum(order) - order)
    levels = left // np.arange(want.size, 0, -1)
    above = np.flatnonzero(order >= levels)
    share = np.minimum(want, levels[above[0]]) if above.size else want.copy()
    return np.asarray(share + (room - int(share.sum())) // want.size, np.int64)
