"""The dirty log's thread: harvests at their times, each dirty page once a harvest, one flush request each."""

from typing import Any

import msgspec
import numpy as np

from guestd.guest import Guest
from proto.config import HostKernel
from proto.costs import Costs
from proto.counters import C
from proto.entry import DIRTY
from proto.units import PS_PER_MS, PS_PER_S
from tests.guestd.reference import bitmap
from tests.small_fleet import new_fleet, run_fleet, small_guest, until_populated

PAGES = 1024


def harvested(costs: Costs, period_ms: int, **options: Any) -> dict[str, Any]:
    host = HostKernel(pml=True, pml_harvest_ps=period_ms * PS_PER_MS)
    (report,) = run_fleet(small_guest(costs, pages=PAGES, host=host, **options)).values()
    assert report["integrity"]["mismatches"] == 0
    return report


def unharvested(guest: Guest) -> set[int]:
    """gPA pages that were logged and not harvested."""
    pml = guest.machine.pml
    found = bitmap(guest.machine, 0)
    for vcpu in range(guest.config.vcpus):
        found |= set((pml.log[vcpu, int(pml.next[vcpu]) + 1 :] >> 12).tolist())
    return found


def test_a_harvest_takes_each_page_that_was_dirtied_since_the_last_one_once(costs: Costs) -> None:
    host = HostKernel(pml=True, pml_harvest_ps=10 * PS_PER_MS)
    fleet = new_fleet(small_guest(costs, pages=PAGES, run_ms=60, host=host))
    guest = until_populated(fleet)
    fleet.run()
    log = fleet.host.vms[0].dirty_log
    assert log is not None
    counters = guest.machine.counters
    # A page in the log twice has lost its D bit in between; only a harvest takes it.
    left = len(unharvested(guest)) + len(bitmap(guest.machine, 1))
    assert log.harvested_pages + left == counters[C.pml__entries]
    assert unharvested(guest) == set(np.flatnonzero(guest.machine.ept & DIRTY).tolist())


def test_every_harvest_asks_for_one_flush_and_the_more_there_are_the_more_is_logged(costs: Costs) -> None:
    seldom, often = harvested(costs, 20, run_ms=80), harvested(costs, 5, run_ms=80)
    for period_ms, report in ((20, seldom), (5, often)):
        requests = report["kvm"]["remote_tlb_flush_requests"]
        assert abs(requests - 80 // period_ms) <= 1
        assert report["pml"]["entries"] >= report["pml"]["harvested_pages"] > 0
        assert report["pml"]["modelled_s"] >= report["pml"]["harvested_pages"] * costs.scan_pte_ps / PS_PER_S
    assert often["pml"]["entries"] > 2 * seldom["pml"]["entries"]


def test_without_a_harvest_a_page_is_logged_once(costs: Costs) -> None:
    report = harvested(costs, 0)
    assert "harvested_pages" not in report["pml"]
    assert report["pml"]["entries"] <= PAGES
    assert report["kvm"]["remote_tlb_flush_requests"] == 0


def test_a_read_only_program_logs_its_page_tables_and_nothing_else(costs: Costs) -> None:
    """No filter by address: a walk is a write to the page-table page (SDM vol. 3, 29.3.5)."""
    host = HostKernel(pml=True, pml_harvest_ps=5 * PS_PER_MS)
    config = small_guest(costs, pages=PAGES, run_ms=60, host=host)
    fleet = new_fleet(msgspec.structs.replace(config, workload="scan"))
    guest = until_populated(fleet)
    before = guest.machine.counters.copy()
    fleet.run()
    spent = guest.machine.counters - before
    tables = guest.machine.tables.upper.size
    # What populating left in the logs comes first; then only what walks dirty, once a harvest.
    assert spent[C.pml__entries] == spent[C.pml__useless] > 0
    assert spent[C.pml__useless] <= (60 // 5 + 1) * tables
