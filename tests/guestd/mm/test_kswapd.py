"""kswapd over a guest's view: it reaches its watermark, demotes in LRU order, conserves frames, and backs off."""

import numpy as np
import pytest

from guestd.guest import Guest
from guestd.instructions import mov_cr3_everywhere
from guestd.meter import KTHREAD
from guestd.mm.kswapd import BATCH, MAX_RECLAIM_RETRIES, RETRY_PS, Kswapd
from guestd.mm.nodes import ACTIVE, F_DEMOTED, FAST, INACTIVE, SLOW, WMARK_DEMOTE, WMARK_HIGH
from guestd.mm.page_alloc import is_free
from proto.costs import Costs
from proto.counters import C
from proto.entry import ACCESSED, FRAME_MASK, FRAME_SHIFT
from proto.units import PS_PER_MS, PS_PER_S
from tests.guestd.machines import guest_config, running_guest


@pytest.fixture
def guest(costs: Costs) -> Guest:
    """A guest whose fast node first touch has filled down to the low watermark."""
    guest = running_guest(guest_config(costs))
    guest.view.meter.context = KTHREAD
    guest.machine.counters[:] = 0
    assert guest.view.free(FAST) < guest.view.watermark(FAST, WMARK_HIGH)
    return guest


def set_young(guest: Guest, young: bool) -> None:
    """Set or clear the accessed bit of every page."""
    mapped = guest.machine.gpt != 0
    guest.machine.gpt[mapped] &= ~ACCESSED
    if young:
        guest.machine.gpt[mapped] |= ACCESSED


def assert_conserved(guest: Guest) -> None:
    """Every frame is free or maps exactly the page that maps it; every page but page tables' is on a list."""
    nodes, gpt = guest.nodes, guest.machine.gpt
    pages = np.flatnonzero(gpt)
    frames = (gpt[pages] & FRAME_MASK) >> FRAME_SHIFT
    assert np.unique(frames).size == pages.size, "no frame is mapped twice"
    assert (nodes.page[frames] == pages).all(), "the reverse map points back"
    assert int(nodes.size.sum()) == pages.size
    used = int((nodes.managed - nodes.free_count).sum())
    assert used == pages.size + guest.machine.tables.upper.size
    assert not is_free(nodes.free, nodes.page.size // 2)[frames].any()


@pytest.mark.parametrize("mark", [WMARK_HIGH, WMARK_DEMOTE])
def test_cold_pages_are_demoted_up_to_the_watermark_and_no_further(guest: Guest, mark: int) -> None:
    set_young(guest, False)
    kswapd = Kswapd(guest.view, mark, protect=False)
    goal = guest.view.watermark(FAST, mark)
    missing = goal - guest.view.free(FAST)
    assert kswapd.wanted
    kswapd.run(10 * PS_PER_MS)
    assert not kswapd.wanted
    assert goal <= guest.view.free(FAST) <= goal + max(32, missing), "it checks every 32 pages or twice the need"
    demoted = guest.view.free(FAST) - (goal - missing)
    assert guest.machine.counters[C.vmstat__pgdemote_kswapd] == demoted
    assert guest.machine.counters[C.vmstat__pgsteal_kswapd] == demoted
    assert_conserved(guest)
    assert np.count_nonzero(guest.nodes.flags & F_DEMOTED) == demoted


def test_demotion_takes_the_tail_of_the_inactive_list(guest: Guest) -> None:
    set_young(guest, False)
    nodes = guest.nodes
    head = nodes.page.size + 2 * FAST + INACTIVE
    tail = int(nodes.page[nodes.previous[head]])
    newest = int(nodes.page[nodes.next[head]])
    Kswapd(guest.view, WMARK_HIGH, protect=False).run(10 * PS_PER_MS)
    nodes_now = guest.view.frames(np.array([tail, newest], np.int64)) >= nodes.page.size // 2
    assert nodes_now.tolist() == [True, False]


def test_a_referenced_page_stays_once_and_is_active_the_second_time(guest: Guest) -> None:
    kswapd = Kswapd(guest.view, WMARK_DEMOTE, protect=False)
    inactive = int(guest.nodes.size[2 * FAST + INACTIVE])
    assert inactive < BATCH and guest.nodes.size[2 * FAST + ACTIVE] == 0
    passes = 0
    while not guest.machine.counters[C.vmstat__pgactivate]:
        # Every page is accessed again between two looks.
        set_young(guest, True)
        mov_cr3_everywhere(guest.machine.vcpus, guest.machine.walk_geometry)
        kswapd.run(1)
        passes += 1
        assert passes < 1000
    assert guest.machine.counters[C.vmstat__pgscan_kswapd] > inactive, "none is activated in the first round"
    assert guest.machine.counters[C.vmstat__pgdemote_kswapd] == 0
    assert_conserved(guest)


def test_after_16_rounds_without_success_it_backs_off_for_ten_seconds(guest: Guest) -> None:
    """No frame is left on the slow node, so nothing can be demoted."""
    guest.nodes.free_count[SLOW] = 0
    set_young(guest, False)
    kswapd = Kswapd(guest.view, WMARK_DEMOTE, protect=False)
    while kswapd.wanted:
        before = guest.view.now
        kswapd.run(PS_PER_MS)
        assert guest.view.now > before, "work takes time"
        assert guest.view.now < PS_PER_S
    assert MAX_RECLAIM_RETRIES == 16
    assert guest.machine.counters[C.vmstat__pgdemote_kswapd] == 0
    guest.view.meter.now += RETRY_PS
    assert kswapd.wanted


def test_a_budget_bounds_the_work(guest: Guest) -> None:
    set_young(guest, False)
    before, free = guest.view.now, guest.view.free(FAST)
    Kswapd(guest.view, WMARK_DEMOTE, protect=False).run(1)
    assert guest.view.now > before
    assert free < guest.view.free(FAST), "it does one batch at least"
    assert_conserved(guest)
