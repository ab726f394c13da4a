"""GUPS alone, uniform, in one tier of the 8360Y: latency, hit ratios and throughput against a derivation by hand.

Notation: an array of n pages; accesses are independent and uniform, so a cache of c entries that keeps what it was last
given holds any key with probability c / keys, set by set, whatever its replacement.

- The L1 dTLB (64) hits 64 / n. The STLB (2048) serves another (2048 - 64) / n, as it holds what the L1 holds and
  more; a walk follows the other 1 - 2048 / n of all accesses.
- A walk reads the guest's leaf entry and the EPT's: 2 references. The PDE cache holds p = min(1, 32 / tables) of the
  tables (2 MiB of gVA each), else the PDE is read too: 1 - p. Its combined mapping gave the table's place for nothing;
  now the nested TLB must know it, which it does if all tables fit its 64 entries, else with the probability m, and a
  miss is an EPT walk of its own. Of the EPT, whose caches are alike, q = min(1, 32 / regions) of the 2 MiB regions of
  gPA are held, else an EPT PDE is read: 1 - q. There are few GiB, so nothing above is ever read.
- m: both caches forget in turn, the PDE cache after 32 of its misses, the nested TLB after 64 of its own, which are
  nearly the same ones. So of the tables - 32 that the PDE cache may miss, it knows 64 - 32. When it misses, the EPT
  walk to the table leaves the table's region in the cache. Frames are given out in order, each table's right before
  those of its pages, so that on average half of these (s) lie in that region.
- Upper entries fit the L2 (14 cycles). The leaf entries of both tables, 16 n bytes, fill what the L2 has left, then the
  LLC (22 ns), and the rest is read from the tier of the table: the VM's for the guest's, fast memory for the EPT.
- What of the LLC is left holds that share h of the array's lines. A miss costs the tier's latency (68.7, 300 ns) times
  its curve at the utilisation u that it causes: rate x (1 - h) x granule x (1 / read + 1 / write ceiling), as each
  update reads and writes one granule (64, 256 bytes). Rate = vCPUs / (think + latency / MLP); u by bisection.
- When even the loaded latency asks for more than the write ceiling (9.2 GB/s, x 0.6 for 16 threads), the ceiling is
  what there is: ceiling / 256 bytes misses a second, whatever the latency.
"""

from typing import Any, NamedTuple

import numpy as np
import pytest

from fleet.in_process import InProcessFleet
from fleet.spec import load
from guestd.vcpu import STALL
from proto.arrays import Words
from proto.costs import Costs, TierCosts
from proto.counters import C
from proto.units import PS_PER_MS, PS_PER_S

THINK_PS, MLP = 2_000, 4
SETTLE_PS, MEASURE_PS = 150 * PS_PER_MS, 60 * PS_PER_MS
"""The utilisation follows with a time constant of 20 ms; then what is measured."""
CYCLE_PS = 1000 / 3


class Measured(NamedTuple):
    """Of the measured part of the run, over all vCPUs."""

    counters: Words
    stall_ps: int
    served: float
    """Bytes written to the tier per second."""

    def share(self, name: C) -> float:
        """That counter over all accesses."""
        return int(self.counters[name]) / int(self.counters[C.access__total])

    @property
    def latency_ps(self) -> float:
        """Mean latency as the load saw it."""
        return self.stall_ps * MLP / int(self.counters[C.access__total])

    @property
    def rate(self) -> float:
        """Accesses a second."""
        return int(self.counters[C.access__total]) * PS_PER_S / MEASURE_PS


def measure(policy: str, memory: str, llc: str, vcpus: int) -> tuple[Measured, Costs, int]:
    """Run it; also the host's costs, and the pages of the array."""
    flags: dict[str, Any] = {"policy": policy, "memory": memory, "vcpus": vcpus, "seconds": 10, "workload": "gups",
                             "host": "xeon-8360y-optane"}  # fmt: skip
    sets = ("workload.distribution=uniform", f"host.llc_bytes={llc}", f"workload.mlp={MLP}", "workload.think_ns=2",
            "host.context_switch=0ns")  # fmt: skip
    experiment = load(None, flags, sets)
    fleet = InProcessFleet(experiment.host_config(), experiment.guests())
    guest = fleet.guests[0]
    machine = guest.machine
    tier = 0 if policy == "all-fast" else 1

    def now() -> tuple[Words, int, int]:
        written = fleet.host.host_report({"total_s": 0.0, "by_vm": {}})["tiers"][tier]["write_bytes"]
        return machine.counters.copy(), int(machine.vcpus.ledger[:, STALL].sum()), written

    while guest.phase == "populate":
        assert fleet.step()
    # Barriers are 4 ms apart, so that both ends fall on one.
    start_ps = -(-guest.now // (4 * PS_PER_MS)) * 4 * PS_PER_MS + SETTLE_PS
    start_ps -= start_ps % (4 * PS_PER_MS)
    while guest.now < start_ps:
        assert fleet.step()
    counters, stall_ps, written = now()
    while guest.now < start_ps + MEASURE_PS:
        assert fleet.step()
    counters_2, stall_2_ps, written_2 = now()
    measured = Measured(counters_2 - counters, stall_2_ps - stall_ps, (written_2 - written) * PS_PER_S / MEASURE_PS)
    pages = int(guest.config.total_pages * 0.875)
    return measured, experiment.costs, pages


class Derived(NamedTuple):
    """What the derivation gives; times in ps."""

    llc_hits: float
    stlb_hits: float
    misses: float
    references: float
    """Of a walk."""
    walk_ps: float
    latency_ps: float
    rate: float
    """Accesses a second, if the tier can serve as many."""
    write_ceiling: float
    """Misses a second that the tier can serve."""


def derive(costs: Costs, tier: TierCosts, pages: int, vcpus: int, threads_factor: float) -> Derived:
    tables = regions = pages / 512
    p, q = min(1.0, 32 / tables), min(1.0, 32 / regions)
    m = 1.0 if tables <= 64 else (64 - 32) / (tables - 32)
    table_walks = (1 - p) * (1 - m)
    data_pde = (1 - q) * (1 - table_walks / 2)
    references = 2 + (1 - p) + table_walks * (1 + (1 - q)) + data_pde

    leaves = 16 * pages
    upper = leaves / 512
    in_l2 = min(leaves, (1.25 * 2**20) - upper)
    in_llc = min(leaves - in_l2, costs.llc_bytes)
    h = (costs.llc_bytes - in_llc) / (4096 * pages)
    cached_ps, llc_ps = 14 * CYCLE_PS, 22_000.0

    def latency(load: float) -> tuple[float, float]:
        """(a walk, an access) when the tier is loaded so much."""
        uses, factors = zip(*tier.curve, strict=True)
        factor = float(np.interp(load * 1000, uses, factors)) / 1000

        def leaf(memory_ps: float) -> float:
            return (in_l2 * cached_ps + in_llc * llc_ps + (leaves - in_l2 - in_llc) * memory_ps) / leaves

        guest_leaf = leaf(tier.latency_random_ps * factor)
        # The EPT lies in fast memory, which is loaded only if it is the VM's.
        ept_leaf = leaf(68_700.0 * (factor if tier.latency_random_ps == 68_700 else 1))
        walk = guest_leaf + (1 - p) * cached_ps + table_walks * (ept_leaf + (1 - q) * cached_ps)
        walk += ept_leaf + data_pde * cached_ps
        translated = (2048 - 64) / pages * 7 * CYCLE_PS + (1 - 2048 / pages) * walk
        return walk, translated + h * llc_ps + (1 - h) * tier.latency_random_ps * factor

    def rate(load: float) -> float:
        return vcpus * PS_PER_S / (THINK_PS + latency(load)[1] / MLP)

    write = tier.write_bandwidth * threads_factor
    per_access = (1 - h) * tier.granule_bytes * (1 / tier.read_bandwidth + 1 / write)
    low, high = 0.0, 2.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rate(middle) * per_access > middle else (low, middle)
    return Derived(h, (2048 - 64) / pages, 1 - 2048 / pages, references, *latency(low), rate(low),
                   write / tier.granule_bytes)  # fmt: skip


SMALL, MIDDLE, LARGE = ("64MiB", "16MiB"), ("128MiB", "40MiB"), ("2GiB", "4MiB")
"""(memory, LLC): all tables in every walk cache; in the nested TLB alone; in none, and in memory in part."""


@pytest.mark.parametrize(("size", "vcpus"), [(SMALL, 1), (SMALL, 4), (MIDDLE, 1), (MIDDLE, 4), (LARGE, 1)], ids=str)
@pytest.mark.parametrize("policy", ["all-fast", "all-slow"])
def test_uniform_gups_costs_what_the_derivation_says(policy: str, size: tuple[str, str], vcpus: int) -> None:
    found, costs, pages = measure(policy, *size, vcpus)
    tier = costs.fast if policy == "all-fast" else costs.slow
    expected = derive(costs, tier, pages, vcpus, 1.0)
    total = int(found.counters[C.access__total])

    def noise(share: float) -> float:
        return 5 * (share * (1 - share) / total) ** 0.5

    assert found.share(C.access__fast) == (policy == "all-fast")
    # Other keys of the caches than the array's are few: page-table pages, and parts of tables at the array's ends.
    assert found.share(C.access__llc_hits) == pytest.approx(expected.llc_hits, abs=noise(expected.llc_hits) + 1e-4)
    assert found.share(C.access__tlb_misses) == pytest.approx(expected.misses, abs=noise(expected.misses) + 1e-4)
    assert found.share(C.access__stlb_hits) == pytest.approx(expected.stlb_hits, abs=noise(0.1) + 1e-4)
    walks = int(found.counters[C.access__walks])
    assert int(found.counters[C.access__walk_refs]) / walks == pytest.approx(expected.references, rel=0.01)
    assert int(found.counters[C.access__walk_ps]) / walks == pytest.approx(expected.walk_ps, rel=0.01)
    assert found.latency_ps == pytest.approx(expected.latency_ps, rel=0.01)
    assert found.rate == pytest.approx(expected.rate, rel=0.01)
    assert found.rate * (1 - expected.llc_hits) < expected.write_ceiling


def test_sixteen_vcpus_get_the_write_ceiling_of_the_slow_tier_and_no_more() -> None:
    """0.6 x 9.2 GB/s / 256 bytes = 21.6 million misses a second; the loaded latency would let through far more."""
    found, costs, pages = measure("all-slow", *SMALL, 16)
    expected = derive(costs, costs.slow, pages, 16, 0.6)
    assert expected.write_ceiling == pytest.approx(21.6e6, rel=0.005)
    assert expected.rate * (1 - expected.llc_hits) > 1.5 * expected.write_ceiling
    misses = found.rate * (1 - found.share(C.access__llc_hits))
    assert misses == pytest.approx(expected.write_ceiling, rel=0.005)
    assert found.served == pytest.approx(0.6 * 9.2e9, rel=0.005)
    assert found.served <= 0.6 * 9.2e9
